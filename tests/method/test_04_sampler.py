"""The sampler and the policy that it draws from: argrpo.py, section 2.  One idea a test."""

import math

import pytest
import torch
from conftest import Spy, same, tiny_condition, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import argrpo
from argrpo import filter_logits, generate, sample_inverse_cdf, token_logp

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])
POLICIES = pytest.mark.parametrize("cfg_scale, temperature",
                                   [(1.0, 1.0), (2.0, 1.0), (1.0, 0.7), (3.0, 1.3)])


def repeat(x, times):
    return None if x is None else x.repeat_interleave(times, dim=0)


# --- one draw ----------------------------------------------------------------------------------

def test_each_row_draws_for_itself():
    """Of generate: 50 pictures of one class, their first codes."""
    tokens, _ = generate(tiny_model(), torch.zeros(50, dtype=torch.long))
    assert len(tokens[:, 0].unique()) > 3, "every row needs a random number of its own"


def test_the_first_code_at_which_the_cumulative_probability_reaches_a_uniform_number():
    """Of (0, 0.25, 0.5, 0.25, 0): up to 0.25 is code 1, up to 0.75 code 2, up to 1 code 3.  See
    sample_inverse_cdf, which takes 1 - uniform, a number in (0, 1]."""
    numbers = torch.tensor([1e-9, 0.2499, 0.2501, 0.7499, 0.7501, 1.0], dtype=torch.double)
    p = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0])
    codes = sample_inverse_cdf(p.log().expand(6, 5), 1 - numbers).tolist()
    assert codes == [1, 1, 2, 2, 3, 3], "the first code whose cumulative probability reaches it"


def test_draws_follow_the_distribution():
    """20000 draws from five known probabilities.  A frequency's standard error is at most 0.0036:
    five of them make a false alarm rarer than one in a million."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    uniform = torch.rand(20000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    codes = sample_inverse_cdf(p.log().expand(20000, 5), uniform)
    frequencies = codes.bincount(minlength=5) / 20000
    same(frequencies, p, "frequencies are not the probabilities", rtol=0, atol=0.018)
    assert (codes != 4).all(), "a code of probability 0 is never drawn"


def test_a_draw_from_nothing_is_still_a_code():
    """A broken model's log-probabilities will say so; the sampler must not index out of range."""
    assert sample_inverse_cdf(torch.full((2, 5), torch.nan), torch.rand(2)).tolist() == [4, 4]


def test_the_probabilities_of_all_codes_at_a_place_add_up_to_one():
    """At the first place, of eleven images with a code each.  So log_softmax is over the codes, the
    last axis, in the learner and in the sampler."""
    model, cond = tiny_model(), torch.tensor([2]).expand(11)
    tokens = torch.arange(11)[:, None].repeat(1, 16)
    with torch.no_grad():
        learner, _ = token_logp(model, tokens, cond)
    _, sampler = generate(model, cond, prefix=tokens)
    for name, logp in (("token_logp", learner), ("generate", sampler)):
        same(logp[:, 0].exp().sum(), 1.0, f"{name}: the V codes' probabilities are not a "
             "distribution: the softmax is over the codes, and over no other axis", atol=1e-4)


# --- top-k and top-p ---------------------------------------------------------------------------

def kept(logits, **how):
    return torch.isfinite(filter_logits(logits.clone(), **how))[0].tolist()


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.3, 0.5, 0.05, 0.15]]).log()
    assert kept(logits) == [True] * 4, "0 and 1 filter nothing"
    assert kept(logits, top_k=2) == [True, True, False, False], "the two likeliest"
    assert kept(logits, top_k=9) == [True] * 4, "more than there are"
    assert kept(logits, top_p=0.4) == [False, True, False, False], "the likeliest always stays"
    assert kept(logits, top_p=0.7) == [True, True, False, False], (
        "0.5 does not reach 0.7, so the next one belongs to the nucleus")
    ours = filter_logits(logits, top_p=0.7)
    same(ours[0, :2], logits[0, :2], "what stays keeps its logit")


def test_ties_at_the_edge_of_the_nucleus_and_of_the_top_k():
    """Four equal codes: 0.5 is not more than 0.5, so two are not enough.  Top-k keeps ties."""
    equal = torch.zeros(1, 4)
    assert sum(kept(equal, top_p=0.5)) == 3, "the fewest codes of MORE than top_p together"
    assert kept(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), top_k=2) == [True, False, True, True], (
        "what is as large as the k-th largest stays")


def test_top_p_is_of_what_top_k_leaves():
    """(0.4, 0.3, 0.2, 0.1): of the first two, renormalised, 0.4 is 0.57 and more than 0.5."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(logits, top_k=2, top_p=0.5) == [True, False, False, False], "top-k comes first"


def test_the_nucleus_is_that_of_the_temperatures_distribution():
    """In generate: guidance, then temperature, then top-k and top-p."""
    model, (cond, _) = tiny_model(), tiny_condition("c2i")
    with torch.no_grad():
        c, u = (model(torch.zeros(3, 16, dtype=torch.long), given)[:, 0]
                for given in (cond, model.null_cond(cond)))
    right = filter_logits((u + 2 * (c - u)) / 3, 0, 0.6).log_softmax(-1)
    tokens, logp = generate(model, cond, cfg_scale=2.0, temperature=3.0, top_p=0.6)
    same(logp[:, 0], right.gather(1, tokens[:, :1])[:, 0],
         "log-probs are after guidance, temperature and filters, in this order")
    assert (generate(model, cond, top_k=1)[1] == 0).all(), "of one code left, the probability is 1"


# --- the policy --------------------------------------------------------------------------------

def test_a_code_is_scored_by_the_prediction_of_its_own_place():
    """logits[:, i] predicts token i: they are gathered at the same i, without guidance first."""
    model, tokens, cond = tiny_model(), torch.randint(11, (2, 16)), torch.arange(2)
    with torch.no_grad():
        logits = model(tokens, cond)
        ours, _ = token_logp(model, tokens, cond)
    right = logits.log_softmax(-1)
    for shift, says in ((1, "the next place"), (-1, "the place before")):
        other = right.roll(-shift, dims=1).gather(-1, tokens[..., None])[..., 0]
        assert not torch.allclose(ours[:, 1:-1], other[:, 1:-1]), f"token i is scored at {says}"
    same(ours, right.gather(-1, tokens[..., None])[..., 0], "log p of token i is at place i")


def test_guidance_and_temperature_by_hand():
    """softmax((null + 3 (cond - null)) / 2), gathered at the given tokens; and its entropy."""
    model, tokens, cond = tiny_model(), torch.randint(11, (2, 16)), torch.arange(2)
    c, u = model(tokens, cond), model(tokens, model.null_cond(cond))
    right = ((u + 3 * (c - u)) / 2).log_softmax(-1)
    logp, entropy = token_logp(model, tokens, cond, cfg_scale=3.0, temperature=2.0)
    same(logp, right.gather(-1, tokens[..., None])[..., 0],
         "log-probs are of null + scale (prompted - null), over the temperature")
    same(entropy, -(right.exp() * right).sum(-1), "the entropy is that of the same distribution")


@BOTH
def test_each_token_is_read_at_its_own_place(model_type):
    """Token i - 1, fed at place i - 1 with its caption's mask, predicts token i.  See generate."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    step = model.decode_step = Spy(model.decode_step)
    tokens, _ = generate(model, cond, mask, cfg_scale=2.0, samples_per_prompt=2)
    for i, (args, _) in enumerate(step.calls):
        assert args[1] == i, "token i is fed as number i"
        assert torch.equal(args[0], tokens[:, i].repeat(2)), "both branches read the same tokens"
        if mask is not None:
            right = mask.repeat_interleave(2, dim=0).repeat(2, 1)
            assert args[3] is not None, "the captions' masks are lost after the prefill"
            assert torch.equal(args[3], right), "each row has its own caption's mask"


@BOTH
@POLICIES
def test_the_sampled_policy_is_the_trained_policy(model_type, cfg_scale, temperature):
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    policy = dict(cfg_scale=cfg_scale, temperature=temperature)
    tokens, sampled = generate(model, cond, mask, samples_per_prompt=4, **policy)
    with torch.no_grad():
        logp, entropy = token_logp(model, tokens, repeat(cond, 4), repeat(mask, 4), **policy)
    assert tokens.shape == logp.shape == entropy.shape == (12, 16)
    same(sampled, logp, "generate's log-probs must be token_logp's: one policy", atol=1e-4)


def test_guidance_changes_the_policy():
    model, (cond, mask) = tiny_model(), tiny_condition("c2i")
    tokens, sampled = generate(model, cond, mask, cfg_scale=3.0)
    assert (sampled - token_logp(model, tokens, cond, mask)[0]).abs().max() > 0.1, (
        "guidance 3 draws from another distribution than none")


def test_the_entropy_can_be_trained():
    """token_logp's entropy has a gradient: other losses may want it."""
    model, tokens, cond = tiny_model(), torch.randint(11, (2, 16)), torch.arange(2)
    entropy = token_logp(model, tokens, cond)[1]
    assert entropy.requires_grad, "the entropy has no graph: an entropy bonus could not be trained"
    logits = model(tokens, cond)
    by_hand = torch.distributions.Categorical(logits=logits).entropy()
    weight = model.layers[0].attention.wo.weight
    ours, right = (torch.autograd.grad(h.mean(), weight)[0] for h in (entropy, by_hand))
    assert right.abs().max() > 1e-6
    same(ours / right.abs().max(), right / right.abs().max(),
         "the entropy's gradient: with none an entropy bonus would do nothing")


def test_the_gradient_of_guided_log_probs_reaches_the_null_branch():
    """Departure 1 of argrpo.py: both branches are trained."""
    model, cond = tiny_model(), torch.tensor([1, 2])
    logp, _ = token_logp(model, torch.randint(11, (2, 16)), cond, cfg_scale=2.0)
    logp.mean().backward()
    moved = model.cls_embedding.embedding_table.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, True, True, False, False, True], (
        "the gradient is for the two classes and for the null class, number 5")


# --- many draws: images ------------------------------------------------------------------------

@BOTH
def test_samples_of_a_prompt_are_neighbours(model_type):
    """Greedy samples of one prompt are equal, and equal to those of the prompt on its own."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    once, _ = generate(model, cond, mask, greedy=True)
    tokens, _ = generate(model, cond, mask, samples_per_prompt=5, greedy=True)
    right = once.repeat_interleave(5, dim=0)
    assert torch.equal(tokens, right), "rows are prompt-major: G of the first prompt, then .."


@BOTH
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_greedy_takes_the_likeliest_code(model_type, cfg_scale):
    """And reports the log-probability of that code."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    tokens, logp = generate(model, cond, mask, greedy=True, cfg_scale=cfg_scale)
    with torch.no_grad():
        logits = model(tokens, cond, mask)
        if cfg_scale != 1:
            null = model(tokens, model.null_cond(cond), mask)
            logits = null + cfg_scale * (logits - null)
    same(logp, logits.log_softmax(-1).amax(-1), "greedy is the arg-max, and its logp", atol=1e-4)


def test_samples_of_a_prompt_differ():
    model, (cond, mask) = tiny_model(), tiny_condition("c2i")
    tokens, _ = generate(model, cond, mask, samples_per_prompt=6)
    assert len({tuple(row) for row in tokens.tolist()}) == 18, "18 images, each drawn for itself"


def test_the_generator_makes_it_repeatable():
    """And torch's own stream is left where it was."""
    model, (cond, mask) = tiny_model(), tiny_condition("c2i")
    state = torch.get_rng_state()
    a, b, c = (generate(model, cond, mask, generator=torch.Generator().manual_seed(seed))[0]
               for seed in (1, 1, 2))
    assert torch.equal(a, b), "the same stream, the same images"
    assert not torch.equal(a, c), "another stream, other images"
    assert torch.equal(torch.get_rng_state(), state), "a generator is given: use it, and no other"


@BOTH
def test_a_prefix_is_kept_and_the_rest_is_drawn(model_type):
    """Its log-probabilities are those of the policy, and what follows depends on it."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    prefix = torch.randint(11, (6, 5))
    tokens, sampled = generate(model, cond, mask, samples_per_prompt=2, cfg_scale=2.0,
                               prefix=prefix)
    assert torch.equal(tokens[:, :5], prefix), "the given codes stand in front"
    with torch.no_grad():
        logp, _ = token_logp(model, tokens, repeat(cond, 2), repeat(mask, 2), cfg_scale=2.0)
    same(sampled, logp, "log-probs of given and of drawn codes are the policy's", atol=1e-4)
    whole, _ = generate(model, cond, mask, samples_per_prompt=2, prefix=tokens)
    assert torch.equal(whole, tokens), "where all codes are given none is drawn"
    with pytest.raises(ValueError, match="6 rows"):
        generate(model, cond, mask, samples_per_prompt=2, prefix=prefix[:3])


def test_a_caption_without_words_is_still_finite():
    model, cond, mask = tiny_model("t2i"), torch.randn(1, 4, 6), torch.zeros(1, 4, dtype=torch.bool)
    tokens, sampled = generate(model, cond, mask)
    same(sampled, token_logp(model, tokens, cond, mask)[0].detach(),
         "a fully masked row still sees itself", atol=1e-4)


# --- bfloat16 -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, capability, on", [
    ("cuda", (8, 0), True), ("cuda", (12, 1), True), ("cuda", (7, 5), False), ("cpu", None, False),
    ("mps", None, False), ("xpu", None, False)])
def test_autocast_is_for_gpus_that_have_bfloat16(monkeypatch, kind, capability, on):
    """A T4 (7, 5) says that it supports bfloat16, and emulates it.  See argrpo.autocast."""
    made = Spy(lambda *given, **how: (given, how))
    monkeypatch.setattr(torch, "autocast", made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *given, **how: True)
    given, how = argrpo.autocast(torch.device(kind))
    assert (given, how) == ((kind,), dict(dtype=torch.bfloat16, enabled=on)), (
        f"bfloat16 is for GPUs of compute capability 8 and more, not for {kind} {capability}")


def test_random_numbers_are_as_fine_as_the_device_can_have_them():
    """Apple's GPUs (mps) refuse float64, as do many of Intel's.  See argrpo.finest_float."""
    for kinds, dtype in ((("cpu", "cuda"), torch.float64), (("mps", "xpu"), torch.float32)):
        for kind in kinds:
            assert argrpo.finest_float(torch.device(kind)) == dtype, kind


@BOTH
def test_autocast_rounds_each_weight_once_in_a_rollout_and_once_in_a_pass(model_type, monkeypatch):
    """Its cache keeps what was rounded.  In a pass with gradients each weight is used once, so no
    two products share a rounded copy, whose gradient would be added up in bfloat16."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    rounded, weights = [], {id(p) for p in model.parameters()}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and id(args[0]) in weights:
                rounded.append(id(args[0]))
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Count():
        tokens, _ = generate(model, cond, mask, cfg_scale=2.0)
    assert rounded and len(rounded) == len(set(rounded)), "a rollout rounds a weight only once"
    rounded.clear()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Count():
        token_logp(model, tokens, cond, mask, cfg_scale=2.0)
    assert rounded and len(rounded) == len(set(rounded)), "a pass uses each weight in one product"


# --- bad input ---------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [dict(temperature=0.0), dict(top_p=0.0), dict(top_p=1.5),
                                 dict(top_k=-1), dict(samples_per_prompt=0),
                                 dict(temperature=math.nan), dict(temperature=math.inf),
                                 dict(cfg_scale=math.nan), dict(top_p=math.nan)])
def test_settings_out_of_range(bad):
    """NaN and infinity would give pictures, and nobody would know of what."""
    with pytest.raises(ValueError, match="a policy needs"):
        generate(tiny_model(), torch.arange(2), **bad)


@pytest.mark.parametrize("bad", [dict(temperature=math.nan), dict(cfg_scale=math.nan)])
def test_log_probs_of_no_policy(bad):
    with pytest.raises(ValueError, match="not .*nan"):
        token_logp(tiny_model(), torch.zeros(2, 16, dtype=torch.long), torch.arange(2), **bad)


def test_wrong_number_of_tokens():
    with pytest.raises(ValueError, match=r"\(B, 16\), not \(2, 15\)"):
        tiny_model()(torch.zeros(2, 15, dtype=torch.long), torch.arange(2))


def test_rows_may_bring_their_random_numbers():
    """Then what an image becomes does not depend on what is drawn beside it."""
    model, labels = tiny_model(), torch.tensor([0, 0, 1, 1])
    uniform = torch.rand(4, 16, dtype=torch.double)

    def draw(rows, **how):
        return generate(model, labels[rows], uniform=uniform[rows], **how)[0]

    together, order = draw([0, 1, 2, 3]), [3, 1]
    assert torch.equal(draw(order), together[order]), "a row's codes come from its own numbers"
    assert not torch.equal(together[0], together[1]), "other numbers, another image of a class"
    prefix = together[:, :5]
    after, _ = generate(model, labels, uniform=uniform[:, 5:], prefix=prefix)
    assert torch.equal(after, together), "uniform is of the tokens that are drawn, after the prefix"


def test_random_numbers_of_a_generator_are_those_of_each_token_in_turn():
    """So that pictures of a seed stay what they were: first all rows' first token, then the next.
    """
    model, labels = tiny_model(), torch.arange(3)
    rng = torch.Generator().manual_seed(7)
    uniform = torch.stack([torch.rand(3, generator=rng, dtype=torch.double) for _ in range(16)], 1)
    ours, _ = generate(model, labels, generator=torch.Generator().manual_seed(7))
    assert torch.equal(ours, generate(model, labels, uniform=uniform)[0])
    rng = torch.Generator().manual_seed(7)
    generate(model, labels, greedy=True, generator=rng)
    assert torch.equal(rng.get_state(), torch.Generator().manual_seed(7).get_state()), (
        "greedy decoding needs no random number")


# --- functions leave what they are given alone -------------------------------------------------

def test_functions_leave_their_inputs_alone():
    """Maths and sampling: no tensor that goes in is written to."""
    r, logp, logits = torch.rand(6), torch.randn(6, 4), torch.randn(6, 11)
    model, (cond, mask) = tiny_model("t2i", block_size=4), tiny_condition("t2i", rows=6)
    tokens, hidden = torch.randint(11, (6, 4)), torch.randn(6, 2, 3, 4)
    calls = {
        argrpo.group_statistics: (r, 3), argrpo.group_advantages: (r, 3),
        argrpo.kl_k3: (logp, -logp), argrpo.kl_exact: (logits, -logits),
        argrpo.grpo_loss: (logp, -logp, logp, r), argrpo.guide: (logits, 2.0),
        argrpo.sample_inverse_cdf: (logits.log_softmax(-1), torch.rand(6)),
        filter_logits: (logits, 0, 0.5),
        argrpo.RMSNorm(4, 1e-5): (logp,), argrpo.apply_rope: (hidden, torch.randn(3, 2, 2)),
        argrpo.both_branches: (model, cond, mask, 2.0), model: (tokens, cond, mask),
        argrpo.token_logp: (model, tokens, cond, mask), model.prefill: (cond, mask, 2)}
    for function, given in calls.items():
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        function(*given)
        check_unchanged(function, given, before)
    before = [x.clone() for x in (cond, mask, logits, tokens)]
    generate(model, cond, mask, cfg_scale=2.0, prefix=tokens[:, :2])
    filter_logits(logits, 2, 0.5)
    check_unchanged(generate, (cond, mask, logits, tokens), before)


def check_unchanged(function, given, before):
    for x, was in zip(given, before):
        changed = isinstance(x, torch.Tensor) and not torch.equal(x, was)
        assert not changed, f"{getattr(function, '__name__', function)} writes into its input"
