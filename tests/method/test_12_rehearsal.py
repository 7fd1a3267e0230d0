"""Rehearsal: what the reference gets right is kept likely.  diversity.py's second half."""

from dataclasses import fields

import pytest
import torch
from conftest import (
    NUMBERS,
    Blocks,
    Spy,
    came_true,
    check_setting,
    obedient_model,
    obedient_prompts,
    same,
    tiny_condition,
    tiny_model,
    weights,
)

import argrpo
from argrpo import GRPOConfig, Prompts
from diversity import Rehearsal
from harness.device import frozen_copy

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])


def dark(images, texts):
    """Right is a picture that is darker than half grey."""
    right = (images.mean(dim=(1, 2, 3)) < 0.5).float()
    return right, {"dark": right}


def tiny_rehearsal(model_type="c2i", model=None, groups=2, reward_fn=dark, weight=0.5, **changes):
    torch.manual_seed(0)
    model = tiny_model(model_type, block_size=4) if model is None else model
    cond, mask = tiny_condition(model_type, rows=5)
    settings = dict(steps=4, prompts_per_step=2, group_size=4, micro_batch=3, kl_beta=0.0) | changes
    config = GRPOConfig(**settings)
    prompts = Prompts([f"prompt {k}" for k in range(5)], cond, mask)
    rehearsal = Rehearsal(frozen_copy(model), Blocks(), prompts, reward_fn, config, weight, groups)
    return model, rehearsal, config, prompts


# --- what is remembered ------------------------------------------------------------------------

@BOTH
def test_rehearsals_reward_reads_each_images_own_prompt(model_type):
    """The reference writes code k for "code k", and all of it is right."""
    config = GRPOConfig(group_size=4, cfg_scale=1.5, temperature=1.3, micro_batch=3)
    rehearsal = Rehearsal(obedient_model(model_type), Blocks(), obedient_prompts(model_type),
                          came_true, config, 1.0, 2)
    rehearsal.remember(torch.tensor([5, 0, 2]))
    assert list(rehearsal.remembered) == [f"code {NUMBERS[k]}" for k in (5, 0, 2)], (
        "the prompts of the step, by their texts")
    for text, tokens in rehearsal.remembered.items():
        assert len(tokens) == 8, "all 2 x 4 images of a prompt are right by its own text"
        assert (tokens == int(text.split()[1])).all(), f"{text} remembers another prompt's images"


@BOTH
def test_the_reference_draws_what_is_rehearsed(model_type, spy):
    """Not the policy; with the rollout's guidance and temperature, G images a group."""
    drawn = spy(argrpo, "generate")
    model, rehearsal, _, prompts = tiny_rehearsal(model_type, groups=3, cfg_scale=2.0,
                                                  temperature=1.3)
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0                             # training has moved the policy
    rehearsal(model, torch.tensor([3, 1]), step=5)
    passes = [3, 3], [3, 1], [1, 1]
    assert len(drawn.calls) == len(passes), "three groups of each prompt, two groups at a time"
    for ((drawer, cond, mask), how), numbers in zip(drawn.calls, passes):
        assert drawer is rehearsal.reference, "the pretrained model draws, and not the policy"
        assert (how["cfg_scale"], how["temperature"]) == (2.0, 1.3), "under the rollout's policy"
        assert how["samples_per_prompt"] == 4, "whole groups of G images"
        assert torch.equal(cond, prompts.cond[numbers]), "the new prompts of a step, side by side"
        assert mask is None or torch.equal(mask, prompts.cond_mask[numbers])


@BOTH
def test_only_right_images_are_remembered(model_type):
    _, rehearsal, _, _ = tiny_rehearsal(model_type)
    rehearsal.remember(torch.tensor([3, 1, 3]))
    assert list(rehearsal.remembered) == ["prompt 3", "prompt 1"], "each prompt that came up, once"
    for tokens in rehearsal.remembered.values():
        assert 0 < len(tokens) <= 8, "some of two groups of four"
        assert dark(argrpo.to_images(Blocks(), tokens), None)[0].all(), "right ones by themselves"
    for name, tokens in rehearsal.wrong.items():
        assert not dark(argrpo.to_images(Blocks(), tokens), None)[0].any(), "and wrong ones"
        assert len(tokens) + len(rehearsal.remembered[name]) == 8, "each image is one or the other"
    before = rehearsal.remembered["prompt 1"]
    rehearsal.remember(torch.tensor([1, 2]))
    assert rehearsal.remembered["prompt 1"] is before, "a prompt's images are drawn once"
    assert "prompt 2" in rehearsal.remembered, "a new prompt is drawn when it comes up"


def test_what_is_drawn_depends_on_the_text_alone():
    """Not on the step, on other prompts, on how many groups a pass has, nor on the process: so it
    can be drawn again."""
    _, first, _, _ = tiny_rehearsal()
    _, second, _, _ = tiny_rehearsal(rollout_prompts=1)
    first.remember(torch.tensor([0, 4, 2]))
    second.remember(torch.tensor([2]))
    second.remember(torch.tensor([3, 0]))
    for text in ("prompt 0", "prompt 2"):
        assert torch.equal(first.remembered[text], second.remembered[text]), (
            "other prompts or another order, and other images")


@pytest.mark.parametrize("label, names", [(1, ["prompt 1"]), (3, ["prompt 1", "prompt 1 (3)"])])
def test_a_prompt_that_stands_twice_is_drawn_once_and_two_classes_of_one_text_are_two(label, names):
    """ImageNet has two classes "missile": each has pictures of its own."""
    _, known, config, prompts = tiny_rehearsal(groups=1)
    prompts.texts[3] = prompts.texts[1]
    prompts.cond[3] = label
    rehearsal = Rehearsal(known.reference, Blocks(), prompts, dark, config, 0.5, groups=9)
    rehearsal.remember(torch.tensor([1, 3]))
    assert list(rehearsal.remembered) == names, "equal text and equal condition are one prompt"
    _, chosen = rehearsal.choose(rehearsal.remembered, torch.tensor([3]), 0)
    assert chosen.unique().tolist() == [3], "an image is scored with the prompt of the step"
    if label == 3:
        assert not torch.equal(*rehearsal.remembered.values())


def test_no_two_draws_of_rehearsal_share_random_numbers(spy):
    """Over prompts, images and seeds; and no stream is a rollout's."""
    drawn, made = spy(argrpo, "generate"), spy(argrpo, "rng_for")
    for seed in (0, 1):
        model, rehearsal, config, prompts = tiny_rehearsal(seed=seed, rollout_prompts=1, steps=3)
        for _ in argrpo.train(model, rehearsal.reference, Blocks(), prompts, dark, config,
                              argrpo.make_optimizer(model, config), extra_loss=rehearsal):
            pass
    numbers = torch.cat([how["uniform"] for _, how in drawn.calls if "uniform" in how])
    assert len(numbers) == 2 * 5 * 8 and len(numbers.unique()) == numbers.numel()
    keys = [key for (_, *key), _ in made.calls if key[1] in ("rollout", "rehearsal")]
    assert len({str(key) for key in keys}) == len(keys), "two draws from one stream"


# --- what is rehearsed -------------------------------------------------------------------------

def test_a_step_rehearses_half_a_group_of_each_prompt():
    """Other ones in each step, and never another prompt's."""
    _, rehearsal, _, _ = tiny_rehearsal()
    rehearsal.remembered = {f"prompt {k}": k + torch.zeros(8, 4, dtype=torch.long)
                            for k in range(5)}
    for tokens in rehearsal.remembered.values():
        tokens[:, 0] = torch.arange(8)
    chosen = []
    for step in range(6):
        tokens, prompts = rehearsal.choose(rehearsal.remembered, torch.tensor([4, 2]), step)
        assert prompts.tolist() == [4, 4, 2, 2], "half a group of each, in the prompts' order"
        assert torch.equal(tokens[:, 1], prompts), "tokens and prompts must stay together"
        chosen.append(tuple(tokens[:, 0].tolist()))
    assert len(set(chosen)) > 3, "each step chooses anew: a fixed choice is learnt by heart"
    assert len({number for step in chosen for number in step}) > 5, "among all that is remembered"
    again, _ = rehearsal.choose(rehearsal.remembered, torch.tensor([4, 2]), 5)
    assert tuple(again[:, 0].tolist()) == chosen[-1], "a step's choice depends on its number alone"


@BOTH
@pytest.mark.parametrize("logprob_cfg", ["guided", "none"])
def test_the_gradient_is_that_of_the_likelihood(model_type, logprob_cfg):
    """All that is remembered, two images a prompt, in micro-batches of three, against one plain
    pass of the policy with its guidance and temperature."""
    model, rehearsal, _, prompts = tiny_rehearsal(
        model_type, weight=0.5, cfg_scale=2.0, temperature=1.3, logprob_cfg=logprob_cfg)
    index = torch.tensor([0, 4])
    rehearsal.remembered = {f"prompt {k}": torch.randint(11, (2, 4)) for k in (0, 4)}
    logged = rehearsal(model, index, step=0)
    added = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens = torch.cat([rehearsal.remembered["prompt 0"], rehearsal.remembered["prompt 4"]])
    cond, mask = prompts.pick(index.repeat_interleave(2), torch.device("cpu"))
    logits = model(tokens, cond, mask)
    if logprob_cfg == "guided":
        null = model(tokens, model.null_cond(cond), mask)
        logits = null + 2 * (logits - null)
    loss = -(logits / 1.3).log_softmax(-1).gather(-1, tokens[..., None]).mean()
    (0.5 * loss).backward()
    assert logged["rehearsal"] == pytest.approx(loss.item(), rel=1e-4), (
        "the loss is minus the mean log-prob a token, under the policy that is trained")
    for ours, p in zip(added, model.parameters(), strict=True):
        if ours is None or p.grad is None:
            assert ours is p.grad
        else:
            same(ours, p.grad, "the gradient is the weight times the loss's", atol=1e-6)
    assert all(p.grad is None for p in rehearsal.reference.parameters()), (
        "the reference is not trained")


def test_rehearsal_adds_to_the_gradient_that_is_there():
    model, rehearsal, _, _ = tiny_rehearsal()
    index = torch.tensor([0, 4])
    rehearsal(model, index, step=0)
    alone = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    rehearsal(model, index, step=0)
    for p, gradient in zip(model.parameters(), alone):
        same(p.grad, 1 + gradient, "GRPO's gradient must stay in .grad")


def test_a_prompt_that_is_never_right_adds_nothing():
    def never(images, texts):
        return torch.zeros(len(images)), {}
    model, rehearsal, _, _ = tiny_rehearsal(reward_fn=never)
    assert rehearsal(model, torch.tensor([0, 1]), step=0) == {"rehearsal": 0.0}, (
        "with nothing to rehearse the loss is 0")
    assert all(p.grad is None for p in model.parameters()), "and has no gradient"


# --- alone, before the first rollout -----------------------------------------------------------

def test_a_picture_that_nobody_can_judge_is_neither_right_nor_wrong():
    def misses(images, texts):
        right, _ = dark(images, texts)
        return torch.where(right == 0, torch.nan, right), {}
    _, rehearsal, _, _ = tiny_rehearsal(reward_fn=misses)
    rehearsal.remember(torch.tensor([3, 1]))
    assert all(len(tokens) > 0 for tokens in rehearsal.remembered.values())
    assert all(len(tokens) == 0 for tokens in rehearsal.wrong.values()), "NaN is no verdict"


def test_wrong_images_become_less_likely_and_not_without_end():
    """Negative preference optimization: at the reference half the gradient of the likelihood, and
    the less the less likely an image is."""
    model, rehearsal, config, prompts = tiny_rehearsal()
    tokens, index = torch.randint(11, (2, 4)), torch.tensor([0, 4])
    given = prompts, index, tokens, config
    reference, _ = argrpo.policy_logp(rehearsal.reference, *given)
    for change in (0.0, -2.0, 1.0):              # nats an image
        logp = (reference.detach() + change / 4).requires_grad_()
        loss = rehearsal.unlikelihood(logp, *given)
        want = torch.tensor(0.5 * change).exp().log1p() / 0.5
        same(loss, want.expand(2), "softplus(beta log pi / pi_ref) / beta, beta 0.5")
        loss.sum().backward()
        share = torch.tensor(0.5 * change).sigmoid()
        same(logp.grad, share.expand(2, 4), "pushed down, and the less the less likely it is")


def test_alone_it_makes_steps_by_right_and_wrong_images(spy):
    """Three of them, the same as by hand, and the policy draws nothing.  The rate falls from
    a multiple of the run's in a line, which is warmed up in two steps."""
    drawn = spy(argrpo, "generate")
    model, rehearsal, config, _ = tiny_rehearsal(lr=0.01, warmup_steps=2)
    by_hand, again, _, _ = tiny_rehearsal(lr=0.01, warmup_steps=2)
    optimizer = argrpo.make_optimizer(by_hand, config)
    for step, rate in enumerate([0.03 / 2, 0.03 * 2 / 3, 0.03 / 3]):
        index = argrpo.pick_prompts(5, step, config.prompts_per_step, config.seed)
        again(by_hand, index, step - 3)
        again.add_gradient(by_hand, again.wrong, index, step - 3, again.unlikelihood)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    start = weights(model)
    logged = list(rehearsal.alone(model, argrpo.make_optimizer(model, config), 3, 3.0))
    same(weights(model), weights(by_hand), "the gradients of right and wrong images")
    assert not torch.equal(start, weights(model))
    assert len(logged) == 3 and all(said["rehearsal"] > 0 < said["wrong"] for said in logged)
    assert all(p.grad is None for p in model.parameters()), "GRPO begins without a gradient"
    assert all(args[0] is not model for args, _ in drawn.calls), "the reference alone draws"


def test_alone_processes_share_the_prompts_and_average_their_gradients():
    """The second of two processes takes the second half, and its gradients are what sync leaves."""
    seen = []

    def sync(model):
        seen.append(sum(p.grad.abs().sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad.zero_()
    model, rehearsal, config, prompts = tiny_rehearsal()
    start = weights(model)
    for _ in rehearsal.alone(model, argrpo.make_optimizer(model, config), 2, 1.0,
                             (1, 2), sync):
        pass
    second = {argrpo.pick_prompts(5, step, 2, config.seed)[1].item() for step in range(2)}
    assert set(rehearsal.remembered) == {prompts.texts[k] for k in second}
    assert len(seen) == 2 and min(seen) > 0 and torch.equal(start, weights(model))


# --- its settings ------------------------------------------------------------------------------

def observe(monkeypatch, weight=0.5, groups=2, **changes):
    """One call of a Rehearsal from outside."""
    with monkeypatch.context() as patch:
        drawn, scored = Spy(argrpo.generate), Spy(argrpo.token_logp)
        patch.setattr(argrpo, "generate", drawn)
        patch.setattr(argrpo, "token_logp", scored)
        settings = dict(cfg_scale=2.0, temperature=1.3, rollout_prompts=2) | changes
        model, rehearsal, _, _ = tiny_rehearsal(weight=weight, groups=groups, **settings)
        logged = rehearsal(model, torch.tensor([3, 0, 4]), step=2)
        kept = torch.cat(list(rehearsal.remembered.values()))
        gradients = [p.grad.flatten() for p in model.parameters()]
    return {"passes": torch.tensor([len(args[1]) for args, _ in drawn.calls]),
            "numbers": torch.cat([how["uniform"].flatten() for _, how in drawn.calls]),
            "remembered": kept,
            "rows at once": torch.tensor([len(args[1]) for args, _ in scored.calls]),
            "loss": torch.tensor(logged["rehearsal"]), "gradient": torch.cat(gradients)}


# What each changes; all other settings of the loop change nothing.
SETTINGS = {
    "weight": (1.0, "gradient", ""), "groups": (4, "passes, numbers, remembered, loss", "*"),
    "seed": (1, "numbers, remembered, loss, gradient", "rows at once"),
    "group_size": (6, "numbers, remembered, rows at once, loss, gradient", ""),
    "micro_batch": (2, "rows at once", ""),
    "rollout_prompts": (1, "passes", ""),
    "cfg_scale": (1.0, "loss, gradient", "remembered, rows at once"),
    "temperature": (0.8, "loss, gradient", "remembered, rows at once"),
    "logprob_cfg": ("none", "loss, gradient", "")}
OTHERS = {"steps": 9, "prompts_per_step": 7, "update_epochs": 3, "lr": 1.0, "warmup_steps": 9,
          "lr_end": 1.0, "weight_decay": 1.0, "max_grad_norm": 0.1, "clip_eps": 0.9,
          "clip_eps_high": 0.9, "kl_beta": 0.9, "scale_advantages": False}


def test_the_tables_name_every_setting_of_the_loop():
    names = {field.name for field in fields(GRPOConfig)} | {"weight", "groups"}
    assert set(SETTINGS) | set(OTHERS) == names, "say what a new setting means for rehearsal"


@pytest.mark.parametrize("name", [*SETTINGS, "all others"])
def test_a_setting_changes_what_it_should_of_rehearsal(name, monkeypatch):
    base = observe(monkeypatch)
    value, must, may = SETTINGS.get(name, ("other values", "", ""))
    seen = observe(monkeypatch, **({name: value} if name in SETTINGS else OTHERS))
    may = ", ".join(base) if may == "*" else may
    check_setting(name, value, base, seen, must, may)


# --- where it leads ----------------------------------------------------------------------------

def first_code(model, label):
    """The probabilities of the first code (V,)."""
    nothing = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        return model(nothing, label).softmax(-1)[0, 0]


def test_it_leads_to_what_the_reference_does_when_it_is_right():
    """One token, so that the right codes' probabilities are known: of 11 codes, those of brightness
    below a half are right.

    3000 images of the reference say what they are, with a standard error below 0.01."""
    model, label = tiny_model(block_size=1, num_classes=1), torch.tensor([0])
    p = first_code(model, label)
    wanted = torch.where(torch.arange(11) < 5, p, 0) / p[:5].sum()
    assert 0.2 < p[:5].sum() < 0.8 and wanted.max() < 0.8        # there is something to do, and
                                                                 # more than one way
    config = GRPOConfig(steps=60, prompts_per_step=1, group_size=3000, micro_batch=None)
    rehearsal = Rehearsal(frozen_copy(model), Blocks(), Prompts(["dark"], label), dark, config, 1.0,
                          1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(60):
        optimizer.zero_grad()
        rehearsal(model, torch.tensor([0]), step)
        optimizer.step()
    same(first_code(model, label), wanted, "the end is pi_ref( . | right): right, and as varied",
         rtol=0, atol=0.05)


def test_continuing_with_what_was_remembered_equals_never_stopping():
    """In the loop: four steps in one go, and two and two."""
    def run(model, first_step, steps, optimizer=None, remembered=()):
        start, rehearsal, config, prompts = tiny_rehearsal(lr=1e-2, steps=steps, lr_end=1.0)
        rehearsal.remembered |= dict(remembered)
        model = model or start
        optimizer = optimizer or argrpo.make_optimizer(model, config)
        logged = [step.metrics["rehearsal"] for step in argrpo.train(
            model, rehearsal.reference, Blocks(), prompts, dark, config, optimizer, first_step,
            extra_loss=rehearsal)]
        return model, logged, optimizer, rehearsal.remembered

    straight, logged, _, _ = run(None, 0, 4)
    model, first, optimizer, remembered = run(None, 0, 2)
    model, second, _, _ = run(model, 2, 4, optimizer, remembered)
    assert torch.equal(weights(model), weights(straight)), (
        "stopping after two steps changes the weights")
    assert first + second == logged and logged[0] > 0, "and the losses"
