"""The loop's wiring: every stage gets what it is meant to get.  argrpo.py, sections 4 and 5.

First the stages of one step in their order, each against a plain computation; then the order of
operations in the update; then a table that says of every setting what it changes and what not.

Shapes: P prompts, G samples of each, B = P G images, N tokens, V codes.
"""

import copy
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from conftest import (
    NUMBERS,
    Blocks,
    Spy,
    brightness,
    came_true,
    obedient_model,
    obedient_prompts,
    same,
    tiny_condition,
    tiny_model,
    weights,
)

import argrpo
from argrpo import GRPOConfig, Prompts

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])

# Nothing is at a value that hides it: guidance and temperature are not 1, micro-batches and passes
# do not divide the images, the gradient and the ratio are clipped.
BASE = dict(steps=2, prompts_per_step=3, group_size=3, micro_batch=5, rollout_prompts=2,
            update_epochs=2, lr=1e-2, warmup_steps=2, lr_end=0.5, weight_decay=0.1,
            max_grad_norm=0.05, clip_eps=0.01, kl_beta=0.3, cfg_scale=2.0, temperature=1.3)


class Loop:
    """A run of `argrpo.train` on a tiny model, whose reference is another model."""

    def __init__(self, model_type="c2i", model=None, prompts=None, reward_fn=brightness, seams=None,
                 first_step=0, **changes):
        torch.manual_seed(0)
        self.model = model or tiny_model(model_type, block_size=4, n_layer=1)
        self.reference = tiny_model(model_type, block_size=4, n_layer=1)
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
        _, cond, mask = self.prompts.pick(images, "cpu")
        c, u = (model(step.tokens, given, mask) for given in (cond, model.null_cond(cond)))
        return ((u + self.config.cfg_scale * (c - u)) / self.config.temperature).log_softmax(-1)


def of_tokens(logp, tokens):
    """(B, N, V) -> (B, N)"""
    return logp.gather(-1, tokens[..., None])[..., 0]


# --- one step, stage by stage --------------------------------------------------------------------

@BOTH
def test_the_reward_reads_each_images_own_prompt(model_type):
    """The model writes code k for the prompt "code k", and the reward finds all of it true."""
    loop = Loop(model_type, obedient_model(model_type), obedient_prompts(model_type), came_true,
                cfg_scale=1.5)
    for step in loop.steps:
        texts = [f"code {NUMBERS[k]}" for k in step.index.tolist() for _ in range(3)]
        assert step.texts == texts, (
            "texts must be those of the step's prompts, each G times, neighbours as the images are")
        assert step.rewards.tolist() == [1.0] * 9, (
            f"image i must be drawn from, and judged by, the prompt of text i: {step.rewards}")


@BOTH
def test_the_rollout_draws_with_the_settings_of_the_policy(model_type, spy):
    """Guidance and temperature of the config, no top-k and top-p, G images of each prompt."""
    drawn, loop = spy(argrpo, "generate"), Loop(model_type)
    step = loop.step()
    for (model, *_), how in drawn.calls:
        assert model is loop.model, "without the sampler seam the model itself draws the rollout"
        assert (how["cfg_scale"], how["temperature"]) == (2.0, 1.3), (
            "the rollout is drawn with the config's cfg_scale and temperature")
        assert how["samples_per_prompt"] == 3, "group_size images of each prompt"
        assert not {"top_k", "top_p", "greedy", "prefix"} & set(how), "all codes can be drawn"
    assert step.metrics["mismatch"] < 1e-4, "the sampler's log-probs are the learner's"


@BOTH
def test_the_old_log_probs_are_the_policys_own(model_type):
    """With guidance, temperature and mask as at rollout, before the update."""
    loop = Loop(model_type)
    step = loop.step()
    with torch.no_grad():
        right = loop.policy(loop.start, step)
    same(step.logp, of_tokens(right, step.tokens), "pi_old is the policy that drew the images")
    same(step.entropy, -(right.exp() * right).sum(-1), "the entropy is that of pi_old")


@BOTH
def test_the_reference_scores_the_same_images_under_the_same_settings(model_type):
    """Its guidance, temperature and mask are the policy's, or the KL would compare other things."""
    loop = Loop(model_type)
    step = loop.step()
    with torch.no_grad():
        right = of_tokens(loop.policy(loop.reference, step), step.tokens)
    same(step.ref_logp, right, "ref_logp is the reference's, with the policy's cfg and temperature")
    assert not step.ref_logp.requires_grad


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_compare_an_image_with_its_own_group(scale):
    step = Loop(scale_advantages=scale).step()
    right = []
    for rewards in step.images.mean(dim=(1, 2, 3)).split(3):         # the images of a prompt
        centred = rewards - rewards.mean()
        right.append(centred / (rewards.std() + 1e-4) if scale else centred)
    same(step.advantages, torch.cat(right), "(r - mean) / (std + 1e-4) over the G of one prompt")


def gradients_by_hand(loop, step, old_logp, model):
    """Of the loss in argrpo.py's head, over all B images at once."""
    config = loop.config
    logp = of_tokens(loop.policy(model, step), step.tokens)
    ratio, A = (logp - old_logp).exp(), step.advantages[:, None]
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    d = step.ref_logp - logp
    loss = (-torch.minimum(ratio * A, clipped * A) + config.kl_beta * (d.exp() - d - 1)).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@BOTH
def test_the_gradient_of_each_epoch_is_that_of_the_loss(model_type):
    """Summed over micro-batches of 5 and 4 images weighted by b / B; in the second epoch of a
    step with the first one's log-probs as old ones; and nothing is left over from the step before.
    """
    seen = []

    def sync(model):
        seen.append((gradient(model), copy.deepcopy(model)))
    loop = Loop(model_type, seams=dict(sync=sync))
    for number in range(2):
        start = copy.deepcopy(loop.model)
        step = loop.step()
        with torch.no_grad():
            old_logp = of_tokens(loop.policy(start, step), step.tokens)
        for epoch, (ours, model) in enumerate(seen):
            right = gradients_by_hand(loop, step, old_logp, model)
            idea = {
                (0, 0): "the micro-batches' gradients, weighted by b / B, are the loss's",
                (0, 1): "the second epoch's ratio is to pi_old, the policy before the first",
                (1, 0): "the second step starts with a gradient of zero",
                (1, 1): "the second step's second epoch"}[number, epoch]
            same(ours, right, f"step {number}, epoch {epoch}: {idea}", rtol=1e-3, atol=1e-5)
        seen.clear()


def test_a_gradient_from_before_the_run_is_forgotten():
    clean, dirty = Loop(), Loop()
    for p in dirty.model.parameters():
        p.grad = torch.ones_like(p)
    dirty.optimizer.zero_grad = Spy(dirty.optimizer.zero_grad)
    clean.step(), dirty.step()
    # The loop's generator has started only now, after the gradient was there.
    same(weights(dirty.model), weights(clean.model), "the loop starts with optimizer.zero_grad()")


def test_the_weights_after_a_step_are_adamws():
    """Clipped to max_grad_norm, with the step's learning rate, betas (0.9, 0.95) and the config's
    weight decay: written out for both epochs of the first step."""
    loop = Loop()
    step, model = loop.step(), loop.start
    with torch.no_grad():
        old_logp = of_tokens(loop.policy(model, step), step.tokens)
    m = v = torch.zeros_like(weights(model))
    lr = 1e-2 * 1 / 2                            # the first of two warm-up steps
    for t in (1, 2):
        g = gradients_by_hand(loop, step, old_logp, model)
        g = g * min(1.0, 0.05 / g.norm())
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g ** 2
        update = (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
        new = weights(model) * (1 - lr * 0.1) - lr * update
        torch.nn.utils.vector_to_parameters(new, model.parameters())
    difference = (weights(loop.model) - weights(model)).abs()
    assert difference.median() < 1e-5 and (difference < 1e-3).float().mean() > 0.99, (
        "the weights after a step are not those of two AdamW steps on the clipped gradients")


def test_the_metrics_of_a_step_are_those_of_its_tensors():
    """Statistics of the last epoch, but the entropy of pi_old.  See the end of argrpo.train."""
    seen = []
    loop = Loop(seams=dict(sync=lambda model: seen.append((gradient(model), copy.deepcopy(model)))))
    step = loop.step()
    with torch.no_grad():
        logp = of_tokens(loop.policy(seen[-1][1], step), step.tokens)
        first = of_tokens(loop.policy(loop.start, step), step.tokens)
    ratio, d, A = (logp - first).exp(), step.ref_logp - logp, step.advantages[:, None]
    kl, clipped = (d.exp() - d - 1).mean(), ratio.clamp(0.99, 1.01)
    groups = step.rewards.view(3, 3)
    right = {
        "step": 0, "reward": step.rewards.mean(), "reward/brightness": step.rewards.mean(),
        "reward_std": groups.std(dim=1).mean(), "flat_groups": 0.0, "missing": 0.0,
        "entropy": step.entropy.mean(), "ratio": ratio.mean(), "ratio_max": ratio.max(), "kl": kl,
        "clip_frac": (clipped * A < ratio * A).float().mean(),
        "loss": 0.3 * kl - torch.minimum(ratio * A, clipped * A).mean(),
        "grad_norm": seen[-1][0].norm()}
    for name, value in right.items():
        assert step.metrics[name] == pytest.approx(float(value), rel=2e-3, abs=1e-5), (
            f"the metric {name!r} is not what its tensors say")


# --- the reference, and what the step must not touch -------------------------------------------

def test_the_reference_stays_and_the_policy_leaves_it():
    """So the KL, which is 0 at first, is above 0 after some steps."""
    loop = Loop(steps=4, kl_beta=0.05, update_epochs=1, lr=0.05)
    loop.reference.load_state_dict(loop.model.state_dict())
    kls = [step.metrics["kl"] for step in loop.steps]
    assert torch.equal(weights(loop.reference), weights(loop.start)), "the reference must not learn"
    assert all(p.grad is None for p in loop.reference.parameters()), "nor get a gradient"
    assert not torch.equal(weights(loop.model), weights(loop.start))
    assert abs(kls[0]) < 1e-6, "the policy starts at its reference, KL 0"
    assert min(kls[1:]) > 1e-3, f"after a step the policy differs from the reference: KL {kls}"


def test_the_loop_leaves_its_inputs_alone():
    """Settings, prompts, and what the reward has returned."""
    returned = []

    def reward_fn(images, texts):
        rewards, parts = brightness(images, texts)
        returned.append((rewards, rewards.clone(), images, images.clone()))
        return rewards, parts
    loop = Loop("t2i", reward_fn=reward_fn)
    config, prompts = copy.deepcopy(loop.config), copy.deepcopy(loop.prompts)
    for step in loop.steps:
        rewards, its_copy, images, their_copy = returned[-1]
        assert step.rewards is rewards and torch.equal(rewards, its_copy), "rewards are not changed"
        assert torch.equal(images, their_copy) and torch.equal(step.images, images)
    assert loop.config == config and loop.prompts.texts == prompts.texts
    assert torch.equal(loop.prompts.cond, prompts.cond)
    assert torch.equal(loop.prompts.cond_mask, prompts.cond_mask)


def test_nothing_of_the_graph_is_left_in_a_step():
    """A consumer may keep every Step: their tensors hold no gradients and no graph."""
    loop = Loop()
    step = loop.step()
    for name, value in step._asdict().items():
        assert not getattr(value, "requires_grad", False), f"Step.{name} still has its graph"
    assert all(isinstance(value, (int, float)) for value in step.metrics.values())
    assert all(p.grad is None for p in loop.model.parameters()), (
        "gradients are freed after the update: the next rollout needs their memory")


# --- the order of operations -------------------------------------------------------------------

def test_the_order_of_a_step(monkeypatch):
    """Rollout, reward, reference once, and in each epoch: gradients, extra loss, sync, clip,
    optimizer, zero_grad."""
    events = []

    def note(event, function):
        def noted(*args, **how):
            events.append(event)
            return function(*args, **how)
        return noted
    scores = argrpo.token_logp

    def token_logp(model, *args, **how):
        events.append("reference" if model is loop.reference else "policy")
        return scores(model, *args, **how)
    monkeypatch.setattr(argrpo, "token_logp", token_logp)
    monkeypatch.setattr(argrpo, "generate", note("rollout", argrpo.generate))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        note("clip", torch.nn.utils.clip_grad_norm_))
    loop = Loop(micro_batch=None, rollout_prompts=0, reward_fn=note("reward", brightness),
                seams=dict(
        sampler=note("sampler", lambda model: model),
        advantage_fn=note("advantages", lambda rewards, *_: rewards),
        extra_loss=note("extra loss", lambda *_: {}), sync=note("sync", lambda model: None)))
    loop.optimizer.step = note("optimizer", loop.optimizer.step)
    loop.optimizer.zero_grad = note("zero_grad", loop.optimizer.zero_grad)
    epoch = ["policy", "extra loss", "sync", "clip", "optimizer", "zero_grad"]
    step = ["sampler", "rollout", "reward", "advantages", "reference", *epoch, *epoch]
    loop.step()
    assert events == ["zero_grad", *step]
    events.clear()
    loop.step()
    assert events == step, "the second step, like the first, draws anew from the present weights"


def test_an_update_uses_its_own_steps_learning_rate():
    """Also after a resume: the schedule follows the step's number, not how many were made here."""
    for first_step in (0, 2):
        rates = []
        loop = Loop(steps=4, first_step=first_step)
        loop.optimizer.register_step_pre_hook(
            lambda optimizer, *_, into=rates: into.append(optimizer.param_groups[0]["lr"]))
        numbers = [step.metrics["step"] for step in loop.steps]
        assert numbers == list(range(first_step, 4))
        right = [argrpo.learning_rate(loop.config, k) for k in numbers for _ in range(2)]
        assert rates == pytest.approx(right), "learning_rate(config, step), set before the update"


def test_the_clip_sees_the_synced_gradient_and_the_extra_loss():
    """Clipping to max_grad_norm comes last, so that all processes take the same, clipped step."""
    clipped = []

    def extra_loss(model, index, step):
        for p in model.parameters():
            p.grad += 1.0
        return {"extra": 1.0}

    def sync(model):
        for p in model.parameters():
            p.grad *= 2.0
    loop = Loop(seams=dict(extra_loss=extra_loss, sync=sync))
    loop.optimizer.register_step_pre_hook(lambda *_: clipped.append(gradient(loop.model).norm()))
    step = loop.step()
    assert max(clipped) < 0.0501, "what the optimizer gets is no longer than max_grad_norm"
    n = len(weights(loop.model))
    assert step.metrics["grad_norm"] > 1.8 * n ** 0.5, "grad_norm is of the unclipped gradient"


def test_seams_are_asked_in_every_epoch_and_told_the_step():
    """extra_loss(model, index, step) and loss_fn's arguments, row by row."""
    extra, pieces = Spy(lambda model, index, step: {}), []

    def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
        pieces.append([x.detach().clone() for x in (logp, old_logp, ref_logp, advantages, entropy)])
        return argrpo.grpo_loss(logp, old_logp, ref_logp, advantages, kl_beta=0.3)
    loop = Loop(steps=3, first_step=1, seams=dict(extra_loss=extra, loss_fn=loss_fn))
    for step in loop.steps:
        *epochs, log = pieces                    # two micro-batches an epoch, then the log's call
        for k, piece in enumerate(epochs):
            rows = torch.arange(9).split(5)[k % 2]
            for name, ours, whole in (("old_logp", piece[1], step.logp),
                                      ("ref_logp", piece[2], step.ref_logp),
                                      ("advantages", piece[3], step.advantages)):
                same(ours, whole[rows], f"loss_fn's {name} are those of the micro-batch's rows")
        for given, whole in zip(log[1:], (step.logp, step.ref_logp, step.advantages, step.entropy)):
            same(given, whole, "the log's statistics are of all images of the step")
        pieces.clear()
        for (model, index, number), _ in extra.calls:
            assert model is loop.model and torch.equal(index, step.index)
            assert number == step.metrics["step"], "extra_loss is told the step's number"
        assert len(extra.calls) == 2, "extra_loss adds its gradient in every epoch"
        extra.calls.clear()


def test_bfloat16_is_for_the_transformer_alone(monkeypatch, spy):
    """On a GPU rollout, reference and policy run under autocast; loss and reward do not."""
    @contextmanager
    def autocast(device):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            yield
    inside = []
    monkeypatch.setattr(argrpo, "autocast", autocast)
    honest = {name: getattr(argrpo, name) for name in ("generate", "token_logp", "to_images")}
    for name, function in honest.items():
        def noted(*args, name=name, function=function, **how):
            inside.append((name, torch.is_autocast_enabled("cpu")))
            return function(*args, **how)
        monkeypatch.setattr(argrpo, name, noted)

    def reward_fn(images, texts):
        inside.append(("reward", torch.is_autocast_enabled("cpu")))
        return brightness(images, texts)

    def loss_fn(*given):
        inside.append(("loss", torch.is_autocast_enabled("cpu")))
        return argrpo.grpo_loss(*given)
    loop = Loop(reward_fn=reward_fn, seams=dict(loss_fn=loss_fn))
    step = loop.step()
    wanted = {"generate": True, "token_logp": True, "to_images": False, "reward": False,
              "loss": False}
    for name, on in inside:
        assert on == wanted[name], f"{name} {'without' if wanted[name] else 'under'} autocast"
    assert step.logp.dtype == step.ref_logp.dtype == torch.float32


# --- several processes -------------------------------------------------------------------------

def test_shares_of_a_step_add_up_to_it():
    """Two processes' mean gradient is that of one process with all prompts: the same images, and
    b / B within a share.  See shard and sync in argrpo.train."""
    seen = {}
    for shard in ((0, 1), (0, 2), (1, 2)):
        gradients = []
        loop = Loop(prompts_per_step=4, rollout_prompts=1, update_epochs=1, seams=dict(
            shard=shard, sync=lambda model, into=gradients: into.append(gradient(model))))
        seen[shard] = loop.step(), gradients[0]
    (whole, right), (first, a), (second, b) = seen.values()
    assert torch.equal(whole.index, torch.cat([first.index, second.index])), (
        "process k takes the k-th part of the step's prompts")
    assert torch.equal(whole.tokens, torch.cat([first.tokens, second.tokens])), (
        "pass k of all processes has stream k")
    same((a + b) / 2, right, "the mean of the processes' gradients is the whole step's")


# --- random streams ----------------------------------------------------------------------------

def seeds_of(drawn):
    """The random streams that a Spy on `generate` has seen."""
    generators = [how.get("generator") for _, how in drawn.calls]
    assert None not in generators, "a rollout without a stream of its own cannot be repeated"
    return [generator.initial_seed() for generator in generators]


def test_no_two_passes_share_a_random_stream(spy):
    """Over steps, passes of a step, processes and seeds.  See rng_for and the rollout."""
    drawn = spy(argrpo, "generate")
    for seed in (0, 1):
        for rank in (0, 1):
            loop = Loop(steps=3, prompts_per_step=4, rollout_prompts=1, seed=seed, update_epochs=1,
                        seams=dict(shard=(rank, 2)))
            assert len(list(loop.steps)) == 3
    seeds = seeds_of(drawn)
    assert len(seeds) == 2 * 2 * 3 * 2
    assert len(set(seeds)) == len(seeds), "two passes with the same random numbers"


def test_a_steps_stream_depends_on_nothing_before_it(spy):
    """So a resumed run needs no generator's state."""
    drawn = spy(argrpo, "generate")
    list(Loop(steps=3).steps)
    whole = seeds_of(drawn)
    drawn.calls.clear()
    torch.rand(100)                              # torch's own stream is somewhere else by now
    list(Loop(steps=3, first_step=2).steps)
    assert seeds_of(drawn) == whole[-2:]


def test_rng_for_depends_on_every_part_of_its_key():
    keys = [(0, "rollout", 0, 0), (1, "rollout", 0, 0), (0, "prompts", 0, 0), (0, "rollout", 1, 0),
            (0, "rollout", 0, 1), (0, "rollout", 0), (0, "rollout", 1, 1), (0, "rollout", 11)]
    draws = [torch.rand(4, generator=argrpo.rng_for("cpu", *key)) for key in keys]
    for i, draw in enumerate(draws):
        again = torch.rand(4, generator=argrpo.rng_for("cpu", *keys[i]))
        assert torch.equal(draw, again), "the same key, the same numbers"
        assert not any(torch.equal(draw, other) for other in draws[:i]), f"{keys[i]} is no new key"


def test_images_of_a_prompt_and_prompts_twice_in_a_step_differ():
    """Four images of each of seven prompts, of which two come twice: no two are the same draw."""
    step = Loop(prompts_per_step=7, group_size=4, rollout_prompts=0).step()
    assert len(step.index.unique()) < 7
    distinct = {tuple(row) for row in step.tokens.tolist()}
    assert len(distinct) > 20, f"28 images, but only {len(distinct)} different ones"


# --- prompts and images ------------------------------------------------------------------------

def test_prompts_come_in_rounds_shuffled_anew():
    """Every prompt once before any comes again; another order in each round and for each seed."""
    picked = torch.cat([argrpo.pick_prompts(5, step, 3, seed=7) for step in range(10)]).view(6, 5)
    for number, one_round in enumerate(picked):
        assert sorted(one_round.tolist()) == [0, 1, 2, 3, 4], f"round {number} is not all prompts"
    assert len({tuple(one_round.tolist()) for one_round in picked}) > 3, "shuffled anew each round"
    other = torch.cat([argrpo.pick_prompts(5, step, 3, seed=8) for step in range(10)]).view(6, 5)
    assert not torch.equal(picked, other), "another seed, another order"
    many = argrpo.pick_prompts(2, 1, 7, seed=0)
    assert len(many) == 7 and sorted(many.tolist())[3] in (0, 1), "more a step than there are"


def test_a_prompts_text_condition_and_mask_stay_together():
    """See Prompts.pick, which may be asked for a prompt twice and in any order."""
    prompts = Prompts(list("abc"), torch.arange(3.0).view(3, 1, 1), torch.eye(3, dtype=torch.bool))
    texts, cond, mask = prompts.pick(torch.tensor([2, 0, 2]), "cpu")
    assert texts == ["c", "a", "c"] and cond.flatten().tolist() == [2, 0, 2]
    assert mask.int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert Prompts(list("abc"), torch.arange(3)).pick(torch.tensor([1]), "cpu")[2] is None


def test_images_go_from_minus_1_1_to_0_1_and_are_cut_there():
    """The decoder's range is [-1, 1] only nominally.  See to_images."""
    class Decoder:
        def decode(self, tokens):
            return torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])[tokens].view(-1, 1, 1, 1)
    for micro_batch in (None, 2):
        ours = argrpo.to_images(Decoder(), torch.arange(5).view(5, 1), micro_batch)
        same(ours.flatten(), [0.0, 0.0, 0.5, 1.0, 1.0], "(x + 1) / 2, clamped to [0, 1], in order")


# --- the settings ------------------------------------------------------------------------------

def observe(monkeypatch, **changes):
    """What a run looks like from outside: of its first step, unless it says otherwise."""
    with monkeypatch.context() as patch:
        generate, token_logp = Spy(argrpo.generate), Spy(argrpo.token_logp)
        patch.setattr(argrpo, "generate", generate)
        patch.setattr(argrpo, "token_logp", token_logp)
        gradients, clipped, rates = [], [], []
        loop = Loop(seams=dict(sync=lambda model: gradients.append(gradient(model))), **changes)

        def before_update(optimizer, *_):
            clipped.append(gradient(loop.model).norm())
            rates.append(optimizer.param_groups[0]["lr"])
        loop.optimizer.register_step_pre_hook(before_update)
        first = loop.step()
        seen = {
            "prompts": first.index, "images": torch.tensor(first.tokens.shape),
            "passes": torch.tensor([len(args[1]) for args, _ in generate.calls]),
            "streams": torch.tensor(seeds_of(generate)), "rollout": first.tokens,
            "rows at once": torch.tensor([len(args[1]) for args, _ in token_logp.calls]),
            "advantages": first.advantages, "log-probs": first.logp, "reference": first.ref_logp,
            "gradient": gradients[0], "clipped norm": clipped[0],
            "updates": torch.tensor(len(clipped)), "weights": weights(loop.model)}
        later = list(loop.steps)
        each = len(clipped) // (1 + len(later))  # updates a step
        seen["steps"] = torch.tensor(1 + len(later))
        seen["learning rates"] = torch.tensor(rates[::each])
    return seen


GRADIENT = "gradient, weights"
ROLLOUT = f"rollout, advantages, log-probs, reference, {GRADIENT}"
# field: (another value, what must change, what may change besides).  Nothing else may.
FIELDS = {
    "steps": (3, "steps, learning rates", ""),
    "prompts_per_step": (4, f"prompts, images, passes, rows at once, {ROLLOUT}", "streams"),
    "group_size": (4, f"images, rows at once, {ROLLOUT}", ""),
    "micro_batch": (7, "rows at once", ""),
    "rollout_prompts": (3, "passes", f"streams, {ROLLOUT}"),
    "update_epochs": (1, "updates, rows at once, weights", ""),
    "lr": (2e-2, "learning rates, weights", ""),
    "warmup_steps": (1, "learning rates, weights", ""),
    "lr_end": (1.0, "learning rates", ""),
    "weight_decay": (0.5, "weights", ""),
    "max_grad_norm": (0.1, "clipped norm", "weights"),
    "clip_eps": (0.2, "weights", ""),
    "clip_eps_high": (0.2, "weights", ""),
    "kl_beta": (0.0, "gradient, weights", ""),
    "scale_advantages": (False, "advantages, gradient, weights", ""),
    "cfg_scale": (1.0, ROLLOUT, ""),
    "temperature": (0.8, ROLLOUT, ""),
    "logprob_cfg": ("none", "log-probs, reference, gradient, weights", ""),
    "seed": (1, f"prompts, streams, {ROLLOUT}", "")}


@pytest.fixture(scope="module")
def base():
    with pytest.MonkeyPatch.context() as patch:
        return observe(patch)


def test_the_table_names_every_setting():
    assert set(FIELDS) == {field.name for field in fields(GRPOConfig)}, (
        "say in FIELDS what a new setting changes")
    for name, value in BASE.items():
        assert FIELDS[name][0] != value


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_changes_what_it_should_and_nothing_else(name, base, monkeypatch):
    """See the comments of GRPOConfig: each setting at another value, all else the same."""
    value, must, may = FIELDS[name]
    seen = observe(monkeypatch, **{name: value})
    must, may = ([part for part in text.split(", ") if part] for text in (must, may))
    assert set(must + may) <= set(base)
    for part, before in base.items():
        after = seen[part]
        moved = before.shape != after.shape or not torch.allclose(
            before.double(), after.double(), rtol=1e-3, atol=2e-5)
        if part in must:
            assert moved, f"{name} = {value!r} must change the {part}: is the setting ignored?"
        elif part not in may:
            assert not moved, f"{name} = {value!r} must not change the {part}"
