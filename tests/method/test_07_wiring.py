"""The loop's wiring: every stage gets what it is meant to get.  argrpo.py, sections 4 and 5.

First the stages of one step in their order, each against a plain computation; then the order of
operations in the update.  test_06_streams.py has prompts, images and random streams,
test_08_settings.py the settings.

Shapes: P prompts, G samples of each, B = P G images, N tokens, V codes.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import (
    BASE,
    NUMBERS,
    Loop,
    brightness,
    came_true,
    gradient,
    obedient_model,
    obedient_prompts,
    same,
    weights,
)

import argrpo

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])

def of_tokens(logp, tokens):
    """(B, N, V) -> (B, N)"""
    return logp.gather(-1, tokens[..., None])[..., 0]


# --- one step, stage by stage --------------------------------------------------------------------

def test_every_step_takes_the_next_prompts():
    """Five prompts, three a step: after five steps each has come three times."""
    loop = Loop(steps=5, update_epochs=1, micro_batch=None)
    steps = [step.index for step in loop.steps]
    for number, index in enumerate(steps):
        right = argrpo.pick_prompts(5, number, 3, loop.config.seed)
        assert torch.equal(index, right), f"step {number} must take the prompts of its own number"
    assert torch.cat(steps).bincount().tolist() == [3] * 5, "prompts come equally often"


def test_the_loss_gets_a_graph_of_the_policy_alone():
    """Old and reference log-probabilities and advantages are numbers: what they were computed from
    is not trained.  In the first epoch, too, where pi_old is pi."""
    def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
        assert not old_logp.requires_grad, "pi_old keeps its graph: detach it, it is a constant"
        assert not ref_logp.requires_grad, "the reference has a graph: score it under no_grad"
        assert not advantages.requires_grad, "advantages are numbers"
        given.append((logp.requires_grad, entropy.requires_grad))
        return argrpo.grpo_loss(logp, old_logp, ref_logp, advantages, kl_beta=0.3)
    given = []
    Loop(seams=dict(loss_fn=loss_fn)).step()
    *updates, log = given                        # two micro-batches in each of two epochs
    assert updates == [(True, True)] * 4, "the policy's log-probs and entropy have their gradient"
    assert log == (False, False), "what is logged needs none"


def test_the_old_policy_is_the_learner_before_its_first_update():
    """To the bit, so that the ratio starts at exactly 1: not the sampler, whose log-probs differ by
    rounding, and not the reference.  In the second epoch it is what it was in the first."""
    seen = []

    def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
        seen.append((logp.detach().clone(), old_logp.clone()))
        return argrpo.grpo_loss(logp, old_logp, ref_logp, advantages, kl_beta=0.3)
    Loop(seams=dict(loss_fn=loss_fn)).step()
    (first, old), (more, more_old), (_, again), (_, more_again), _ = seen
    assert torch.equal(old, first) and torch.equal(more_old, more), (
        "in the first epoch the old policy is the policy itself: the ratio is 1")
    assert torch.equal(again, old) and torch.equal(more_again, more_old), (
        "in the second epoch the old policy is still that of the first")


def test_every_update_starts_from_a_gradient_of_zero():
    """With a learning rate of 0 the second epoch's gradient is the first one's, and so is that of a
    second run of the same step."""
    seen = []
    loop = Loop(lr=0.0, seams=dict(sync=lambda model: seen.append(gradient(model))))
    loop.step()
    times = (seen[1] @ seen[0] / seen[0].square().sum()).item()
    same(seen[1], seen[0], f"the second epoch's gradient is {times:.2f} times the first one's: "
         "what an update leaves in .grad is added to the next one's", rtol=1e-3, atol=1e-6)


@BOTH
def test_the_reward_reads_each_images_own_prompt(model_type):
    """The model writes code k for the prompt "code k", and the reward finds all of it true."""
    loop = Loop(model_type, obedient_model(model_type), obedient_prompts(model_type), came_true,
                reference=obedient_model(model_type), cfg_scale=1.5, update_epochs=1, lr=0.0)
    for step in loop.steps:
        texts = [f"code {NUMBERS[k]}" for k in step.index.tolist() for _ in range(3)]
        assert step.texts == texts, (
            "texts must be those of the step's prompts, each G times, neighbours as the images are")
        assert step.rewards.tolist() == [1.0] * 9, (
            f"image i must be drawn from, and judged by, the prompt of text i: {step.rewards}")


@BOTH
def test_the_rollout_draws_with_the_settings_of_the_policy(model_type, spy):
    """Guidance and temperature of the config, no top-k and top-p, G images of each prompt."""
    drawn, loop = spy(argrpo, "generate"), Loop(model_type, update_epochs=1)
    loop.step()
    for (model, _, mask), how in drawn.calls:
        assert model is loop.model, "without the sampler seam the model itself draws the rollout"
        assert (how.get("cfg_scale"), how.get("temperature")) == (2.0, 1.3), (
            "the rollout is drawn with the config's cfg_scale and temperature")
        assert (mask is None) == (model_type == "c2i"), "the captions' masks go to the sampler"
        assert how["samples_per_prompt"] == 3, "group_size images of each prompt"
        assert not {"top_k", "top_p", "greedy", "prefix"} & set(how), "all codes can be drawn"


@BOTH
def test_the_old_log_probs_are_the_policys_own(model_type):
    """With guidance, temperature and mask as at rollout, before the update."""
    loop = Loop(model_type, update_epochs=1)
    step = loop.step()
    with torch.no_grad():
        right = loop.policy(loop.start, step)
    same(step.logp, of_tokens(right, step.tokens), "pi_old is the policy that drew the images, "
         "under its guidance, temperature and mask")
    same(step.entropy, -(right.exp() * right).sum(-1), "the entropy is that of pi_old")
    assert step.metrics["mismatch"] < 1e-4, "the sampler's log-probs are the learner's"
    again = Loop(model_type, update_epochs=3).step()
    assert again.metrics["ratio_max"] > 1.001, "three updates have moved the policy"
    assert again.metrics["mismatch"] < 1e-4, "the sampler is compared with pi_old, before updates"


@BOTH
def test_the_reference_scores_the_same_images_under_the_same_settings(model_type):
    """Its guidance, temperature and mask are the policy's, or the KL would compare other things."""
    loop = Loop(model_type, update_epochs=1)
    step = loop.step()
    with torch.no_grad():
        right = of_tokens(loop.policy(loop.reference, step), step.tokens)
    assert not step.ref_logp.requires_grad, "the reference is scored without a graph: no_grad"
    same(step.ref_logp, right, "ref_logp is the reference's, with the policy's cfg and temperature")


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_compare_an_image_with_its_own_group(scale):
    step = Loop(scale_advantages=scale).step()
    right = []
    for rewards in step.images.mean(dim=(1, 2, 3)).split(3):         # the images of a prompt
        centred = rewards - rewards.mean()
        right.append(centred / (rewards.std() + 1e-4) if scale else centred)
    same(step.advantages, torch.cat(right), "(r - mean) / (std + 1e-4) over the G of one prompt")


def parts_by_hand(loop, step, old_logp, model):
    """The gradients of the loss in argrpo.py's head, over all B images at once: of its first term,
    and of the KL without its weight."""
    config = loop.config
    logp = of_tokens(loop.policy(model, step), step.tokens)
    ratio, A = (logp - old_logp).exp(), step.advantages[:, None]
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    d = step.ref_logp - logp
    terms = -torch.minimum(ratio * A, clipped * A).mean(), (d.exp() - d - 1).mean()
    return [torch.cat([g.flatten() for g in torch.autograd.grad(term, model.parameters(),
                                                               retain_graph=True)])
            for term in terms]


def check_gradient(ours, parts, idea):
    """Fails if ours is not the first part plus kl_beta times the second, with how much of each it
    holds."""
    right = parts[0] + BASE["kl_beta"] * parts[1]
    a, b = torch.linalg.lstsq(torch.stack(parts, dim=1), ours[:, None]).solution[:, 0].tolist()
    same(ours, right, f"{idea}; it is the loss's first term's times {a:.2f} plus the KL's times "
         f"{b:.2f}, and should be 1 and {BASE['kl_beta']}", rtol=1e-3, atol=1e-5)


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
            idea = {
                (0, 0): "the gradient is that of the loss over the whole step: micro-batches "
                        "weighted by b / B, both terms with their weights",
                (0, 1): "the second epoch's ratio is to pi_old, the policy before the first",
                (1, 0): "the second step starts with a gradient of zero",
                (1, 1): "the second step's second epoch"}[number, epoch]
            check_gradient(ours, parts_by_hand(loop, step, old_logp, model),
                           f"step {number}, epoch {epoch}: {idea}")
        seen.clear()


def test_a_gradient_from_before_the_run_is_forgotten():
    clean, dirty = Loop(), Loop()
    for p in dirty.model.parameters():
        p.grad = torch.ones_like(p)
    clean.step(), dirty.step()
    # The loop's generator has started only now, after the gradient was there.
    same(weights(dirty.model), weights(clean.model), "the loop starts with optimizer.zero_grad()")


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
    assert not torch.equal(weights(loop.model), weights(loop.start)), "four steps change the policy"
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
        assert torch.equal(images, their_copy) and torch.equal(step.images, images), (
            "a Step has the images that the reward saw, unchanged")
    assert loop.config == config and loop.prompts.texts == prompts.texts, (
        "the loop changes no setting and no text")
    assert torch.equal(loop.prompts.cond, prompts.cond), "conditions are not changed"
    assert torch.equal(loop.prompts.cond_mask, prompts.cond_mask), "masks are not changed"


def test_nothing_of_the_graph_is_left_in_a_step():
    """A consumer may keep every Step: their tensors hold no gradients and no graph."""
    loop = Loop()
    step = loop.step()
    for name, value in step._asdict().items():
        assert not getattr(value, "requires_grad", False), f"Step.{name} still has its graph"
    assert all(isinstance(value, (int, float)) for value in step.metrics.values()), (
        "metrics are plain numbers")
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
    assert events == ["zero_grad", *step], (
        "rollout, reward, advantages, reference once, then the epochs")
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
        assert numbers == list(range(first_step, 4)), "a resumed run begins at its first_step"
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
        first, kl = parts_by_hand(loop, step, old_logp, model)
        g = first + loop.config.kl_beta * kl
        g = g * min(1.0, 0.05 / g.norm())
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g ** 2
        update = (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
        new = weights(model) * (1 - lr * 0.1) - lr * update
        torch.nn.utils.vector_to_parameters(new, model.parameters())
    difference = (weights(loop.model) - weights(model)).abs()
    assert difference.median() < 1e-5 and (difference < 1e-3).float().mean() > 0.99, (
        "the weights after a step are not those of two AdamW steps on the clipped gradients")


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
        return argrpo.grpo_loss(*given[:4])
    loop = Loop(reward_fn=reward_fn, seams=dict(loss_fn=loss_fn))
    step = loop.step()
    wanted = {"generate": True, "token_logp": True, "to_images": False, "reward": False,
              "loss": False}
    for name, on in inside:
        assert on == wanted[name], f"{name} {'without' if wanted[name] else 'under'} autocast"
    assert step.logp.dtype == step.ref_logp.dtype == torch.float32, (
        "log-probabilities are float32 again")
