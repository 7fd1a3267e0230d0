"""Evaluation: the same prompts and seeds, under the policy that is trained.

harness/before_after.py.

What also draws beside training, the pictures of progress, is held to the same policy.
"""

import math
import time
from dataclasses import fields

import pytest
import torch
from conftest import (
    NUMBERS,
    Blocks,
    Loop,
    Spy,
    brightness,
    came_true,
    check_setting,
    obedient_model,
    obedient_prompts,
    same,
    seeds_of,
    tiny_condition,
    tiny_model,
    weights,
)

import argrpo
from argrpo import GRPOConfig, Prompts
from diversity import group_diversity
from harness.before_after import (
    Watched,
    diversity_kept,
    evaluate,
    evaluate_all,
    evaluate_spread,
    known_mean,
    nothing,
)
from harness.gallery import Progress
from train_c2i import C2iSettings

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])
POLICY = dict(cfg_scale=2.0, temperature=1.3, micro_batch=5)


def tiny_settings(**changes):
    small = dict(eval_images=24, prompts_per_step=2, group_size=6)
    return C2iSettings(**(small | POLICY | changes))


def tiny_case(model_type="c2i"):
    torch.manual_seed(0)
    cond, mask = tiny_condition(model_type, rows=5)
    prompts = Prompts([f"prompt {k}" for k in range(5)], cond, mask)
    return tiny_model(model_type, block_size=4, n_layer=1), Blocks(), prompts


# --- whose images, under which policy ------------------------------------------------------------

@BOTH
def test_evaluations_reward_reads_each_images_own_prompt(model_type):
    """The model writes code k for "code k": all is right, by reward, measure and gallery alike."""
    def measure(images, texts):
        return {"measured": came_true(images, texts)[0]}
    scores, gallery = evaluate(obedient_model(model_type), Blocks(), obedient_prompts(model_type),
                               came_true, tiny_settings(eval_images=30), measure)
    assert scores["reward"] == scores["reward/came true"] == 1, "judged by another text"
    assert scores["measured"] == 1, "measured by another text"
    for text, pictures in zip(gallery["texts"], gallery["pictures"]):
        images = torch.from_numpy(pictures).movedim(-1, 1) / 255
        assert came_true(images, [text] * 5)[0].all(), "the gallery mixes up its prompts"
    assert (gallery["scores"][0] == 1).all() and gallery["names"][0] == "reward"
    assert gallery["texts"].tolist() == [f"code {NUMBERS[k]}" for k in gallery["prompts"]]


@BOTH
def test_spread_reads_each_images_own_prompt(model_type):
    spread = Spy(lambda images, texts: came_true(images, texts)[0])
    right = evaluate_spread(obedient_model(model_type), Blocks(), obedient_prompts(model_type),
                            tiny_settings(), spread)
    assert right.tolist() == [1.0] * 48, "eight images of each prompt, with that prompt's text"


@pytest.mark.parametrize("what", ["evaluate", "evaluate_spread", "progress"])
def test_it_draws_under_the_policy_that_is_trained(what, spy, tmp_path):
    """Guidance and temperature of the rollout, no top-k and top-p, and the captions' masks."""
    drawn, settings = spy(argrpo, "generate"), tiny_settings()
    model, vq, prompts = tiny_case("t2i")
    if what == "evaluate":
        evaluate(model, vq, prompts, brightness, settings)
    elif what == "evaluate_spread":
        evaluate_spread(model, vq, prompts, settings, lambda images, texts: {})
    else:
        now = time.perf_counter()
        Progress(vq, prompts, brightness, settings, nothing, tmp_path, now).draw(model, 3)
    assert drawn.calls, "something is drawn"
    for (_, cond, mask), how in drawn.calls:
        assert how["cfg_scale"] == 2.0, f"{what} must use the rollout's guidance"
        assert how["temperature"] == 1.3, f"{what} must use the rollout's temperature"
        assert not {"top_k", "top_p", "greedy"} & set(how), f"{what} must draw as the rollout draws"
        assert mask is not None and len(mask) == len(cond), f"{what} lost the captions' masks"


def test_every_prompt_has_the_same_number_of_images(spy):
    """eval_images shared among at most a quarter as many prompts, evenly chosen, whole prompts."""
    drawn, (model, vq, prompts) = spy(argrpo, "generate"), tiny_case()
    asked = Spy(brightness)
    evaluate(model, vq, prompts, asked, tiny_settings(eval_images=24))
    texts = [text for (_, texts), _ in asked.calls for text in texts]
    assert texts == [f"prompt {k}" for k in (4, 3, 2, 1, 0) for _ in range(4)], (
        "24 images for 5 prompts are 4 each, neighbours, the last prompt first")
    assert [len(args[1]) for args, _ in drawn.calls] == [3, 2], "no more at a time than a rollout"
    asked.calls.clear()
    evaluate(model, vq, prompts, asked, tiny_settings(eval_images=8))
    texts = [text for (_, texts), _ in asked.calls for text in texts]
    assert texts == ["prompt 4"] * 4 + ["prompt 0"] * 4, "few images: fewer prompts, evenly chosen"


def test_the_scores_are_means_over_all_images():
    """Over the batches together; NaN is left out, and None where nothing is known."""
    model, vq, prompts = tiny_case()
    seen = []

    def reward_fn(images, texts):
        scores = images.mean(dim=(1, 2, 3))
        seen.append((images, scores))
        return scores, {"half": scores.masked_fill(torch.arange(len(scores)) % 2 == 0, math.nan)}

    def measure(images, texts):
        return {"nothing": torch.full((len(texts),), math.nan)}
    scores, _ = evaluate(model, vq, prompts, reward_fn, tiny_settings(), measure)
    images, rewards = (torch.cat(column) for column in zip(*seen))
    assert scores["reward"] == pytest.approx(rewards.mean().item()), "the mean over all 20 images"
    odd = torch.cat([scores[1::2] for _, scores in seen])
    assert scores["reward/half"] == pytest.approx(odd.mean().item()), "NaN is left out"
    assert scores["nothing"] is None, "where nothing is known there is no number"
    assert scores["diversity"] == pytest.approx(group_diversity(images, 4).mean().item()), (
        "the mean distance of two images of one prompt, prompts weighing alike")


def test_the_entropy_is_minus_the_mean_log_prob_of_what_was_drawn(monkeypatch):
    model, vq, prompts = tiny_case()
    logps, draw = [], argrpo.draw_images

    def noted(*args, **how):
        tokens, logp, images = draw(*args, **how)
        logps.append(logp)
        return tokens, logp, images
    monkeypatch.setattr(argrpo, "draw_images", noted)
    scores, _ = evaluate(model, vq, prompts, brightness, tiny_settings())
    assert scores["entropy"] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-5), (
        "minus the mean log-prob of all codes that were drawn")
    assert scores["entropy"] > 0, "an entropy is positive"


def test_other_guidance_scales_are_evaluated_besides(spy):
    """See evaluate_all: the same prompts and seeds, so that only the guidance differs."""
    drawn, (model, vq, prompts) = spy(argrpo, "generate"), tiny_case()
    settings = tiny_settings(eval_cfg_scales="1,2,4", eval_images=8, prompts_per_step=4)
    scores, *_ = evaluate_all(model, vq, prompts, brightness, settings, Watched())
    assert set(scores["guidance"]) == {"1", "4"}, "2 is the rollout's own"
    assert [how["cfg_scale"] for _, how in drawn.calls] == [2.0, 1.0, 4.0], (
        "the rollout's scale, then the others")
    assert len(set(seeds_of(drawn))) == 1, (
        "the same random numbers at each scale: only guidance differs")
    for scale in (1.0, 4.0):
        right, _ = evaluate(model, vq, prompts, brightness, settings, cfg_scale=scale)
        assert scores["guidance"][f"{scale:g}"] == right, "each scale's scores are its own"
    assert scores == evaluate(model, vq, prompts, brightness, settings)[0] | {
        "guidance": scores["guidance"]}, "the main scores are the rollout's guidance's"


# --- seeds -------------------------------------------------------------------------------------

def test_evaluation_never_draws_what_training_draws(spy):
    """Streams of its own; every batch another; another seed, others; but the same each time."""
    drawn, (model, vq, prompts) = spy(argrpo, "generate"), tiny_case()

    def once(**changes):
        drawn.calls.clear()
        settings = tiny_settings(**changes)
        evaluate(model, vq, prompts, brightness, settings)
        evaluate_spread(model, vq, prompts, settings, lambda images, texts: {})
        return seeds_of(drawn)
    first, again, other = once(), once(), once(seed=1)
    assert len(set(first)) == len(first), "two batches with the same random numbers"
    assert first == again, "before and after training the same seeds are drawn"
    assert not set(first) & set(other), "another seed, another evaluation"
    drawn.calls.clear()
    list(Loop(steps=4).steps)
    assert not set(first) & set(seeds_of(drawn)), "evaluation must not draw with training's streams"


def test_evaluation_leaves_everything_as_it_was():
    model, vq, prompts = tiny_case("t2i")
    before, cond, state = weights(model), prompts.cond.clone(), torch.get_rng_state()
    settings = tiny_settings()
    evaluate_all(model, vq, prompts, brightness, settings, Watched())
    assert torch.equal(weights(model), before) and torch.equal(prompts.cond, cond), (
        "an evaluation changes no weight and no condition")
    assert all(p.grad is None and p.requires_grad for p in model.parameters()), "it is no training"
    assert torch.equal(torch.get_rng_state(), state), "its draws have generators of their own"
    assert settings == tiny_settings(), "nor a setting"


def test_a_signal_ends_an_evaluation():
    class Stop:
        def check(self):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny_case(), brightness, tiny_settings(), stop=Stop())


# --- D -----------------------------------------------------------------------------------------

def test_d_is_the_mean_of_after_over_before():
    kept = diversity_kept({"distance": 0.2, "centres": 4.0}, {"distance": 0.1, "centres": 3.0})
    assert kept["diversity_kept/distance"] == pytest.approx(0.5), "after / before"
    assert kept["diversity_kept/centres"] == pytest.approx(0.75), "after / before: 3 / 4"
    assert kept["diversity_kept"] == pytest.approx(0.625), "D is the mean of its parts"
    unknown = diversity_kept({"distance": 0.2, "centres": None}, {"distance": 0.1, "centres": 3.0})
    assert unknown["diversity_kept"] is None and unknown["diversity_kept/centres"] is None, (
        "where a part is unknown, so is D")
    nothing_left = diversity_kept({"distance": 0.2}, {"distance": 0.0})
    assert nothing_left["diversity_kept"] == 0, "0 is a number: nothing was kept"
    assert diversity_kept({"distance": 0.2}, {"distance": None})["diversity_kept"] is None, (
        "what is unknown after is no 0")


def test_guidance_0_is_a_scale_like_any_other(monkeypatch):
    """That of the null branch alone, and not the rollout's."""
    model, vq, prompts = tiny_case()
    drawn = Spy(argrpo.draw_images)
    monkeypatch.setattr(argrpo, "draw_images", drawn)
    for scale, used in ((0.0, 0.0), (3.0, 3.0), (None, POLICY["cfg_scale"])):
        evaluate(model, vq, prompts, brightness, tiny_settings(), cfg_scale=scale)
        assert drawn.calls[-1][1]["cfg_scale"] == used


@pytest.mark.parametrize("images, each", [(60, 8), (540, 32), (1080, 64)])
def test_the_spread_is_that_of_prompts_evenly_chosen_and_of_so_many_pictures(images, each,
                                                                             monkeypatch):
    """Of at most 27, the first and the last among them."""
    settings, seen = tiny_settings(eval_images=images), []

    def draw(model, vq, prompts, index, settings, samples, *stream):
        seen.extend(index.tolist())
        return ["a"] * samples * len(index), None, None, torch.zeros(samples * len(index), 1)
    monkeypatch.setattr("harness.before_after.draw_like_rollout", draw)
    many = Prompts([str(k) for k in range(100)], torch.arange(100))
    count = evaluate_spread(None, None, many, settings, lambda images, texts: len(images))
    prompts = min(27, images // 4)
    assert len(seen) == prompts and (seen[0], seen[-1]) == (0, 99), "evenly chosen"
    assert count == prompts * each


# --- the settings ------------------------------------------------------------------------------

def observe(monkeypatch, **changes):
    """An evaluation, and a measurement of spread, from outside."""
    with monkeypatch.context() as patch:
        drawn, decoded = Spy(argrpo.generate), []
        patch.setattr(argrpo, "generate", drawn)
        model, vq, prompts = tiny_case()
        decode = vq.decode
        vq.decode = lambda tokens: [decoded.append(len(tokens)), decode(tokens)][1]
        seen = []

        def look(images, texts):
            seen.append((images, [NUMBERS[int(text[-1])] for text in texts]))
            return brightness(images, texts)
        settings = tiny_settings(**changes)
        evaluate(model, vq, prompts, look, settings)
        passes = torch.tensor([len(args[1]) for args, _ in drawn.calls])
        evaluate_spread(model, vq, prompts, settings, look)
    texts = torch.tensor([text for _, texts in seen[:-1] for text in texts])
    return {"texts": texts, "passes": passes, "streams": torch.tensor(sorted(seeds_of(drawn))),
            "images": torch.cat([images for images, _ in seen[:-1]]), "spread": seen[-1][0],
            "decoded at once": torch.tensor(decoded)}


# What each changes; all other settings of the loop change nothing.
SETTINGS = {
    "eval_images": (9, "texts, passes, images, spread", "streams, decoded at once"),
    "seed": (1, "streams, images, spread", ""),
    "prompts_per_step": (4, "passes", "streams, images, spread, decoded at once"),
    "rollout_prompts": (1, "passes", "streams, images, spread, decoded at once"),
    "group_size": (3, "passes", "streams, images, spread, decoded at once"),
    "micro_batch": (3, "decoded at once", ""),
    "cfg_scale": (1.0, "images, spread", ""),
    "temperature": (0.7, "images, spread", "")}
OTHERS = {"steps": 9, "update_epochs": 3, "lr": 1.0, "warmup_steps": 9, "lr_end": 1.0,
          "weight_decay": 1.0, "max_grad_norm": 0.1, "clip_eps": 0.9, "clip_eps_high": 0.9,
          "kl_beta": 0.9, "scale_advantages": False, "logprob_cfg": "none", "rehearsal": 1.0,
          "rehearsal_groups": 3, "rehearsal_steps": 3, "rehearsal_lr_factor": 1.0,
          "diversity_bonus": 1.0, "save_every": 3}


def test_the_tables_name_every_setting_of_the_loop():
    names = {field.name for field in fields(GRPOConfig)}
    assert names <= set(SETTINGS) | set(OTHERS), "say what a new setting means for evaluation"


@pytest.mark.parametrize("name", [*SETTINGS, "all others"])
def test_a_setting_changes_what_it_should_of_evaluation(name, monkeypatch):
    base = observe(monkeypatch)
    value, must, may = SETTINGS.get(name, ("other values", "", ""))
    seen = observe(monkeypatch, **({name: value} if name in SETTINGS else OTHERS))
    check_setting(name, value, base, seen, must, may)


def test_known_mean_is_none_where_nothing_is_known():
    assert known_mean(torch.tensor([1.0, math.nan, 2.0])) == 1.5, "NaN is left out"
    assert known_mean(torch.tensor([math.nan])) is None, "of nothing there is no mean"
    same(torch.tensor(known_mean(torch.tensor([0.0]))), 0.0, "0 is known")
