"""What the tests share: tiny models and runs, and a tokenizer that can be read off.

The folders run in the order of pyproject.toml, which is the order of the house, method/ first.  Its
files run in the order in which argrpo.py is read.  So the first failure names the smallest idea
that is wrong, and not what stands on it.
"""

import copy
import json
import os
from math import isqrt

# Before torch is loaded: one thread for each process of a test, which does not spin while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import argrpo
from argrpo import GPTConfig, GRPOConfig, Prompts, Transformer
from vqgan import VQConfig, VQModel


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--course", action="store_true", help="run the grader's whole matrix, too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """pytest -n 2: a file's tests stay together, for they share runs that take seconds to make."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadfile"


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "course"):
        if config.getoption("--" + mark):
            continue
        for item in items:
            if item.get_closest_marker(mark):        # keywords know the folder "course", too
                item.add_marker(pytest.mark.skip(reason=f"{mark}: runs with --{mark}"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- comparisons with a message ----------------------------------------------------------------

def same(ours, right, idea, rtol=1e-4, atol=1e-5):
    """Fails, with the idea first and the numbers after it, if two tensors differ."""
    right = torch.as_tensor(right, dtype=ours.dtype)
    torch.testing.assert_close(ours, right, rtol=rtol, atol=atol,
                               msg=lambda numbers: f"{idea}\n{numbers}")


def check_setting(name, value, before, after, must, may=""):
    """Fails, naming the setting, unless it changes what it must and leaves the rest as it was.

    before and after are {part: tensor} of two runs; must and may are names of parts, separated by
    commas.  Numbers may differ by rounding."""
    must, may = ([part for part in text.split(", ") if part] for text in (must, may))
    assert set(must + may) <= set(before), "the table names a part that is not observed"
    for part, old in before.items():
        new = after[part]
        moved = old.shape != new.shape or not torch.allclose(old.double(), new.double(),
                                                             rtol=1e-3, atol=2e-5)
        if part in must:
            assert moved, f"{name} = {value!r} must change the {part}: is the setting ignored?"
        elif part not in may:
            assert not moved, f"{name} = {value!r} must not change the {part}"


def seeds_of(drawn):
    """The random streams that a Spy on `generate` has seen."""
    generators = [how.get("generator") for _, how in drawn.calls]
    assert None not in generators, "a draw without a stream of its own cannot be repeated"
    return [generator.initial_seed() for generator in generators]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- tiny models -------------------------------------------------------------------------------

def tiny_model(model_type="c2i", **changes):
    """A random transformer of 4 x 4 tokens from 11 codes, its predictions far from uniform."""
    config = dict(dim=16, n_layer=2, n_head=2, vocab_size=11, block_size=16, num_classes=5,
                  multiple_of=8)
    if model_type == "t2i":
        config |= dict(model_type="t2i", cls_token_num=4, caption_dim=6)
    model = Transformer(GPTConfig(**(config | changes)))
    if model_type == "t2i":
        model.cls_embedding.uncond_embedding.normal_(std=0.4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def tiny_condition(model_type, rows=3):
    """A condition and its mask for `tiny_model`.  The captions have 4, 2 and 1 words."""
    if model_type == "c2i":
        return torch.arange(rows), None
    words = torch.tensor([4, 2, 1])[torch.arange(rows) % 3]
    return torch.randn(rows, 4, 6), torch.arange(4) >= 4 - words[:, None]


def tiny_vq(**changes):
    """A random tokenizer of 5 codes, with 2 x 2 pixels a token."""
    config = dict(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5, codebook_embed_dim=2)
    return VQModel(VQConfig(**(config | changes)))


class Blocks(torch.nn.Module):
    """A tokenizer without a network: code k of 11 is a grey pixel of brightness k / 10."""

    def decode(self, tokens):
        side = isqrt(tokens.shape[1])
        return (tokens.float() / 5 - 1).view(-1, 1, side, side).expand(-1, 3, -1, -1)


def brightness(images, texts):
    scores = images.mean(dim=(1, 2, 3))
    return scores, {"brightness": scores}


@torch.no_grad()
def obedient_model(model_type="c2i"):
    """A transformer that writes nothing but code k for class k, or for a caption whose last word
    is word k.  So one sees in an image which prompt it was drawn from.

    Attention and feed-forward add nothing.  A class, a word and a code each are a direction, and
    the prediction is the code of the direction that was read last."""
    model = tiny_model(model_type, block_size=4, num_classes=6)
    for layer in model.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    directions = 10 * torch.eye(16)
    model.tok_embeddings.weight.copy_(directions[:11])
    model.output.weight.copy_(directions[:11])
    if model_type == "c2i":
        model.cls_embedding.embedding_table.weight.copy_(directions[:7])
        return model
    model.cls_embedding.cap_proj["fc1"].weight.copy_(directions[:, :6])
    model.cls_embedding.cap_proj["fc2"].weight.copy_(directions)
    model.cls_embedding.uncond_embedding.zero_()
    return model


NUMBERS = [4, 1, 5, 0, 3, 2]                     # no prompt's number is its place


def obedient_prompts(model_type="c2i"):
    """Six prompts for `obedient_model`: the text "code k" and the condition that makes it so."""
    texts = [f"code {k}" for k in NUMBERS]
    if model_type == "c2i":
        return Prompts(texts, torch.tensor(NUMBERS))
    cond = torch.zeros(6, 4, 6)
    cond[range(6), 3, NUMBERS] = 1
    return Prompts(texts, cond, torch.tensor([[False, False, True, True]] * 6))


def came_true(images, texts):
    """A reward that reads its prompts: 1 where all pixels have the code that the text names."""
    assert len(images) == len(texts), f"{len(images)} images came with {len(texts)} texts"
    wanted = torch.tensor([int(text.split()[1]) / 10 for text in texts])
    right = ((images - wanted.view(-1, 1, 1, 1)).abs() < 0.01).all(dim=(1, 2, 3)).float()
    return right, {"came true": right}


# --- tiny runs ---------------------------------------------------------------------------------

def tiny_run(model_type="c2i", model=None, reward_fn=brightness, first_step=0, optimizer=None,
             reference=None, seams=None, **changes):
    """Trains a tiny model: (model, list of metrics, optimizer)."""
    torch.manual_seed(0)
    model = tiny_model(model_type) if model is None else model
    cond, mask = tiny_condition(model_type, rows=5)
    settings = dict(steps=2, prompts_per_step=2, group_size=4, micro_batch=8, lr=1e-2, lr_end=1.0,
                    kl_beta=0.05)
    config = GRPOConfig(**(settings | changes))
    optimizer = optimizer or argrpo.make_optimizer(model, config)
    reference = reference or copy.deepcopy(model)
    prompts = Prompts([f"prompt {i}" for i in range(5)], cond, mask)
    steps = argrpo.train(model, reference, Blocks(), prompts, reward_fn, config, optimizer,
                         first_step, **(seams or {}))
    return model, [step.metrics for step in steps], optimizer


# Nothing is at a value that hides it: guidance and temperature are not 1, micro-batches and passes
# do not divide the images, the gradient and the ratio are clipped.
BASE = dict(steps=2, prompts_per_step=3, group_size=3, micro_batch=5, rollout_prompts=2,
            update_epochs=2, lr=1e-2, warmup_steps=2, lr_end=0.5, weight_decay=0.1,
            max_grad_norm=0.05, clip_eps=0.01, kl_beta=0.3, cfg_scale=2.0, temperature=1.3)


class Loop:
    """A run of `argrpo.train` on a tiny model, whose reference is another model."""

    def __init__(self, model_type="c2i", model=None, prompts=None, reward_fn=brightness, seams=None,
                 first_step=0, reference=None, **changes):
        torch.manual_seed(0)
        self.model = model or tiny_model(model_type, block_size=4, n_layer=1)
        self.reference = reference or tiny_model(model_type, block_size=4, n_layer=1)
        cond, mask = tiny_condition(model_type, rows=5)
        self.prompts = prompts or Prompts([f"prompt {k}" for k in range(5)], cond, mask)
        self.config = GRPOConfig(**(BASE | changes))
        self.optimizer = argrpo.make_optimizer(self.model, self.config)
        self.start = copy.deepcopy(self.model)
        self.steps = argrpo.train(self.model, self.reference, Blocks(), self.prompts, reward_fn,
                                  self.config, self.optimizer, first_step, **(seams or {}))

    def step(self):
        return next(self.steps)

    def policy(self, model, step):
        """Log-probabilities (B, N, V) of the step's images, in one plain pass: guidance, then
        temperature."""
        images = step.index.repeat_interleave(self.config.group_size)
        cond, mask = self.prompts.pick(images, "cpu")
        c, u = (model(step.tokens, given, mask) for given in (cond, model.null_cond(cond)))
        return ((u + self.config.cfg_scale * (c - u)) / self.config.temperature).log_softmax(-1)


def read_metrics(out, seconds=False):
    """The steps that a run logged in its folder, without the times they took."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in step.items() if seconds or "seconds" not in name}
            for step in steps]


def trained_weights(out):
    """{name: tensor} of a run's model.pt."""
    return torch.load(out / "model.pt", weights_only=True)["model"]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


class Spy:
    """Notes every call of a function, and lets it answer.  `calls` has (args, how) of each."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **how):
        self.calls.append((args, how))
        return self.function(*args, **how)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs leave their numbers and weights, but no pictures and no page, which take seconds, nor a
    closer look, which takes most of what is left."""
    monkeypatch.setattr("harness.run.mind_arrays", lambda *given: None)
    monkeypatch.setattr("harness.run.show", lambda *given: None)


@pytest.fixture
def quick(no_pictures, monkeypatch):
    """Nor do they draw hundreds of pictures to measure D: it is 1."""
    monkeypatch.setattr("harness.before_after.evaluate_spread", lambda *given: {"distance": 1.0})
    monkeypatch.setattr("toy.shipped_spread", lambda *given: None)


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name) replaces module.name by a Spy on it, and returns the Spy."""
    def watch(module, name):
        spied = Spy(getattr(module, name))
        monkeypatch.setattr(module, name, spied)
        return spied
    return watch
