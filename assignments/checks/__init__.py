"""What each function of the assignment must do, as checks with drawn inputs.

A check belongs to an item ("1.5"), says in one sentence what it asks for, and computes something
with the functions of a module m, which is argrpo.py, from inputs that depend on a seed:

    @check("1.5", "at scale 0 only the null branch is left")
    def _(m, d):
        return m.guide(d.normal(2 * d.size(1, 4), d.size(2, 9)), 0.0)

The public tests and the hidden ones are these checks with different seeds.  What they compute is
compared with what the reference computes, to 1e-5 (frequencies of draws: to 0.02).  Every check
runs at three sizes, the smallest first.
"""

import random
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple
from unittest.mock import patch

import torch

LEVELS = 3
FEW = 12                                         # numbers that a message shows; of more, the shape


class Check(NamedTuple):
    item: str
    says: str
    compute: object                              # (m, Draw) -> tensors, numbers, texts, in lists
    tolerance: float


CHECKS = []


def check(item, says, tolerance=1e-5):
    def decorator(function):
        CHECKS.append(Check(item, says, function, tolerance))
        return function
    return decorator


def of_item(item):
    return [check for check in CHECKS if check.item == item]


class Draw:
    """Inputs at random: the same for the same seed, check and level, 0 (smallest) to 2."""

    def __init__(self, seed, says, level):
        self.random = random.Random(f"{seed} {says} {level}")
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.level = level
        torch.manual_seed(self.random.getrandbits(60))

    def size(self, low, high):
        """low at level 0, and larger ones, up to 2 * high - low, at the others."""
        spread = high - low
        return low + (0, self.random.randint(0, spread), self.random.randint(spread, 2 * spread)
                      )[self.level]

    def number(self, low, high):
        return self.random.uniform(low, high)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.torch)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.torch, dtype=torch.float64)

    def generator(self):
        return torch.Generator().manual_seed(self.random.getrandbits(60))

    def codes(self, V, *shape):
        return torch.randint(V, shape, generator=self.torch)


@contextmanager
def watched(m, item):
    """Notes the calls of the item's function in m, in words, in the list that it gives.
    Raises TypeError if the function returns another number of values than item["values"]."""
    calls, (*cls, name) = [], item.get("function", "train").split(".")
    owner, values = getattr(m, cls[0]) if cls else m, item.get("values", 1)
    function = getattr(owner, name)

    def watching(*args, **how):
        words = [*map(shown, args[len(cls):]), *(f"{k}={shown(x)}" for k, x in how.items())]
        calls.append(f"{item['function']}({', '.join(words)})")
        result = function(*args, **how)
        got = len(result) if isinstance(result, (tuple, list)) else 1
        if got != values:
            raise TypeError(f"{item['function']} must return {values} values, not {got}")
        return result

    with patch.object(owner, name, watching if "function" in item else function):
        yield calls


def flat(value):
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value.detach() if torch.is_tensor(value) else value]


def same(got, wanted, tolerance):
    """Whether two flat lists agree: kinds of numbers, shapes, and values within the tolerance,
    which is relative to the largest value of a tensor if that is above 1."""
    if len(got) != len(wanted):
        return False
    return all(same_leaf(a, b, tolerance) for a, b in zip(got, wanted))


def same_leaf(a, b, tolerance):
    if not (torch.is_tensor(a) or isinstance(a, (int, float, bool))):
        return a == b
    if not (torch.is_tensor(b) or isinstance(b, (int, float, bool))):
        return False
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
        return False
    return close(a, b, tolerance).all().item()


def close(a, b, tolerance):
    """Where two tensors of one shape agree: bool."""
    a, b = a.double(), b.double()
    finite = b[b.isfinite()].abs()
    scale = max(1.0, finite.max().item()) if len(finite) else 1.0
    return torch.isclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------

def describe(check, calls, got, wanted, error=""):
    """A failed check in words: the first calls, or that with the error, and the first value that is
    wrong.  got and wanted are flat lists."""
    text = f"not so: {check.says}."
    if calls:
        text += "\n  for " + "\n  and ".join(calls[-1:] if error else [*dict.fromkeys(calls)][:2])
    if error:
        return f"{text}\n  {error}"
    pairs = zip_longest(got, wanted, fillvalue="nothing")
    a, b = next(pair for pair in pairs if not same_leaf(*pair, check.tolerance))
    place = ""
    if torch.is_tensor(a) and torch.is_tensor(b) and a.shape == b.shape and a.numel() > FEW:
        places = (~close(a, b, check.tolerance)).nonzero().tolist()
        if places:                               # else the kinds of numbers differ
            place, a, b = f" at {places[0]}", a[tuple(places[0])], b[tuple(places[0])]
    return f"{text}\n  expected {shown(b)}{place}\n  got      {shown(a)}{place}"


def shown(value):
    """In words: few numbers, rounded, or the shape; or the name of what is long."""
    if torch.is_tensor(value):
        if value.numel() > FEW:
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return str(float(f"{value:.5g}"))
    text = str(value)
    return type(value).__name__ if len(text) > 200 or text.startswith("<") else text


def raises(function, *args, **kwargs):
    """Which kind of exception the call raises, as a text, or "no error"."""
    try:
        function(*args, **kwargs)
    except NotImplementedError:
        raise
    except Exception as error:
        return type(error).__name__
    return "no error"


def with_gradients(function, *inputs):
    """What function(*inputs) returns, and the gradient of a weighted sum of it by each input."""
    inputs = [x.requires_grad_() for x in inputs]
    output = function(*inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    weighted = 0
    for x in outputs:
        x = x.masked_fill(x.isinf(), 0.0)
        weighted = weighted + (x * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).sum()
    return list(outputs), torch.autograd.grad(weighted, inputs, allow_unused=True)


def config(m, d, **changes):
    H = d.size(1, 2)
    values = dict(dim=8 * H, n_layer=d.size(1, 2), n_head=H, vocab_size=d.size(5, 8), block_size=4,
                  num_classes=3, multiple_of=8)
    return m.GPTConfig(**values | changes)


def transformer(m, d, **changes):
    """A random transformer whose predictions are far from uniform."""
    model = m.Transformer(config(m, d, **changes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.5 * d.normal(*parameter.shape)
    return model


CAPTIONS = dict(model_type="t2i", cls_token_num=3, caption_dim=5)      # a config of captions


def conditions(d, model, P):
    """The condition and mask of P prompts."""
    c = model.config
    if c.model_type == "c2i":
        return d.codes(c.num_classes, P), None
    words = 1 + d.codes(c.cls_token_num, P)
    mask = torch.arange(c.cls_token_num) >= c.cls_token_num - words[:, None]
    return d.normal(P, c.cls_token_num, c.caption_dim), mask


from checks import part1, part2, part3  # noqa: E402, F401
