"""The sampler: its cache, its log-probabilities, and the distribution that it draws from."""

import pytest
import torch
from conftest import tiny_condition, tiny_model

from argrpo import filter_logits, generate, sample_inverse_cdf, token_logp

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])


def repeat(x, times):
    return None if x is None else x.repeat_interleave(times, dim=0)


@BOTH
def test_cached_logits_equal_uncached_ones(model_type):
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    tokens = torch.randint(11, (3, 16))
    with torch.no_grad():
        logits, cache = model.prefill(cond, mask)
        steps = [logits] + [model.decode_step(tokens[:, i], i, cache, mask) for i in range(15)]
        torch.testing.assert_close(
            torch.stack(steps, dim=1), model(tokens, cond, mask), rtol=1e-4, atol=1e-4
        )


@BOTH
@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (2.0, 1.0), (1.0, 0.7), (3.0, 1.3)])
def test_the_sampled_policy_is_the_trained_policy(model_type, cfg_scale, temperature):
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    policy = dict(cfg_scale=cfg_scale, temperature=temperature)
    tokens, sampled = generate(model, cond, mask, samples_per_prompt=4, **policy)
    logp, entropy = token_logp(model, tokens, repeat(cond, 4), repeat(mask, 4), **policy)
    assert tokens.shape == logp.shape == entropy.shape == (12, 16)
    torch.testing.assert_close(sampled, logp.detach(), rtol=1e-4, atol=1e-4)


def test_guidance_changes_the_policy():
    model, (cond, mask) = tiny_model(), tiny_condition("c2i")
    tokens, sampled = generate(model, cond, mask, cfg_scale=3.0)
    assert (sampled - token_logp(model, tokens, cond, mask)[0]).abs().max() > 0.1


@BOTH
def test_samples_of_a_prompt_are_neighbours(model_type):
    """Greedy samples of one prompt are equal, and equal to those of the prompt on its own."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    once, _ = generate(model, cond, mask, greedy=True)
    tokens, _ = generate(model, cond, mask, samples_per_prompt=5, greedy=True)
    assert torch.equal(tokens, once.repeat_interleave(5, dim=0))


def test_padding_does_not_matter():
    """What stands in a caption's masked positions changes nothing, guided or not."""
    model, (cond, mask) = tiny_model("t2i"), tiny_condition("t2i")
    tokens, junk = torch.randint(11, (3, 16)), torch.where(mask[..., None], cond, 100.0)
    for cfg_scale in (1.0, 4.0):
        expected = token_logp(model, tokens, cond, mask, cfg_scale=cfg_scale)
        given = token_logp(model, tokens, junk, mask, cfg_scale=cfg_scale)
        torch.testing.assert_close(given, expected)


def test_a_caption_without_words_is_still_finite():
    model, cond, mask = tiny_model("t2i"), torch.randn(1, 4, 6), torch.zeros(1, 4, dtype=torch.bool)
    tokens, sampled = generate(model, cond, mask)
    torch.testing.assert_close(
        sampled, token_logp(model, tokens, cond, mask)[0].detach(), rtol=1e-4, atol=1e-4
    )


def test_generator_makes_it_repeatable():
    model, (cond, mask) = tiny_model(), tiny_condition("c2i")
    a, b, c = (
        generate(model, cond, mask, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_draws_follow_the_distribution():
    """20000 draws from five known probabilities.  A frequency's standard error is at most 0.0036:
    five of them make a false alarm rarer than one in a million."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    codes = sample_inverse_cdf(p.log().expand(20000, 5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(codes.bincount(minlength=5) / 20000, p, rtol=0, atol=0.018)
    assert (codes != 4).all()


def test_a_draw_from_nothing_is_still_a_code():
    """A broken model's log-probabilities will say so; the sampler must not index out of range."""
    assert sample_inverse_cdf(torch.full((2, 5), torch.nan)).tolist() == [4, 4]


@BOTH
def test_a_prefix_is_kept_and_the_rest_is_drawn(model_type):
    """Its log-probabilities are those of the policy, and what follows depends on it."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    prefix = torch.randint(11, (6, 5))
    tokens, sampled = generate(
        model, cond, mask, samples_per_prompt=2, cfg_scale=2.0, prefix=prefix
    )
    assert torch.equal(tokens[:, :5], prefix)
    logp, _ = token_logp(model, tokens, repeat(cond, 2), repeat(mask, 2), cfg_scale=2.0)
    torch.testing.assert_close(sampled, logp.detach(), rtol=1e-4, atol=1e-4)
    whole, _ = generate(model, cond, mask, samples_per_prompt=2, prefix=tokens)
    assert torch.equal(whole, tokens)
    with pytest.raises(ValueError, match="6 rows"):
        generate(model, cond, mask, samples_per_prompt=2, prefix=prefix[:3])


@pytest.mark.slow
def test_the_compiled_step_is_the_same_policy():
    model, (cond, mask) = tiny_model("t2i"), tiny_condition("t2i")
    plain = generate(model, cond, mask, cfg_scale=2.0, generator=torch.Generator().manual_seed(0))
    model.decode_step = torch.compile(model.decode_step, dynamic=True)
    compiled = generate(
        model, cond, mask, cfg_scale=2.0, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(plain[1], compiled[1], rtol=1e-4, atol=1e-4)


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(**how):
        return torch.isfinite(filter_logits(logits, **how))[0].tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.4) == [True, False, False, False]  # the first always stays
    assert kept(top_p=0.7) == [
        True,
        True,
        False,
        False,
    ]  # 0.5 does not reach 0.7, so the second belongs to it
    assert kept() == [True] * 4
    # The log-probability that generate reports is that of the filtered, renormalised distribution.
    model, (cond, mask) = tiny_model(), tiny_condition("c2i")
    assert (generate(model, cond, mask, top_k=1)[1] == 0).all()


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=0.0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(top_k=-1),
        dict(samples_per_prompt=0),
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="generate needs"):
        generate(tiny_model(), torch.arange(2), **bad)


def test_wrong_number_of_tokens():
    with pytest.raises(ValueError, match=r"\(B, 16\), not \(2, 15\)"):
        tiny_model()(torch.zeros(2, 15, dtype=torch.long), torch.arange(2))
