"""Part 3, the loop: policy_logp, and sections of `train` on a tiny model.

The sections' images, with the sampler's log-probabilities, come from here, not from `generate`: so
that the loop is examined alone."""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import torch

from checks import CAPTIONS, check, conditions, raises, transformer


def world(m, d, steps=1, seams=None, broken=False, **settings):
    """Runs `train` of module m: (model, Steps).  The optimizer is SGD, whose steps are smooth."""
    model, reference = transformer(m, d), transformer(m, d)
    V = reference.config.vocab_size
    model = m.Transformer(reference.config)
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        ours.data = theirs.data + 0.1 * d.normal(*theirs.shape)
    values = dict(steps=steps, prompts_per_step=d.size(2, 3), group_size=d.size(2, 4),
                  micro_batch=None, lr=1e-3, warmup_steps=1, lr_end=1.0, kl_beta=0.3, cfg_scale=1.5,
                  max_grad_norm=100.0)
    config = m.GRPOConfig(**values | settings)
    prompts = m.Prompts(["a", "b", "c"], torch.arange(3))

    def draw_images(drawer, vq, prompts, index, generator, samples_per_prompt, **how):
        tokens = torch.randint(V, (len(index) * samples_per_prompt, 4), generator=generator)
        return tokens, -tokens.float() - 0.25, tokens[:, None, :, None] / V

    def reward_fn(images, texts):
        rewards = images.square().sum((1, 2, 3)) + images[:, 0, 0, 0]
        if broken:
            rewards = rewards.masked_fill(rewards == rewards.max(), torch.inf)
        return rewards, {"tiny": rewards}

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with ExitStack() as stack:
        stack.enter_context(patch.object(m, "draw_images", draw_images))
        made = list(m.train(model, reference, SimpleNamespace(), prompts, reward_fn, config,
                            optimizer, **seams or {}))
    return model, made


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- 3.1: log-probabilities as the settings want them -----------------------------------------


def scored(m, d, captions=False, **settings):
    """policy_logp of drawn images of drawn prompts: (logp, entropy), and the model."""
    model = transformer(m, d, **(CAPTIONS if captions else {}))
    prompts, b = m.Prompts(["a", "b", "c"], *conditions(d, model, 3)), d.size(3, 6)
    config = m.GRPOConfig(**dict(cfg_scale=1.5) | settings)
    return list(m.policy_logp(model, prompts, d.codes(3, b), d.codes(5, b, 4), config)), model


@check("3.1", "log-probability and entropy of all images, each with its own prompt: (b, N)")
def _(m, d):
    return scored(m, d)[0]


@check("3.1", "captions come with their masks")
def _(m, d):
    return scored(m, d, captions=True)[0]


@check("3.1", "guidance is as at rollout, or none if logprob_cfg says so")
def _(m, d):
    return [scored(m, d, cfg_scale=3.0, logprob_cfg=how)[0] for how in ("guided", "none")]


@check("3.1", "the temperature is config.temperature")
def _(m, d):
    return scored(m, d, temperature=d.number(0.4, 0.8))[0]


@check("3.1", "the gradient reaches the weights, unless the caller forbids it")
def _(m, d):
    (logp, entropy), model = scored(m, d)
    (logp + 0.5 * entropy).square().mean().backward()
    with torch.no_grad():
        frozen, _ = scored(m, d)
    return model.output.weight.grad, [x.requires_grad for x in frozen]


# --- 3.2: advantages --------------------------------------------------------------------------


@check("3.2", "every image is compared with its own group of config.group_size")
def _(m, d):
    return world(m, d)[1][0].advantages


@check("3.2", "config.scale_advantages decides whether they are divided by the spread")
def _(m, d):
    return world(m, d, scale_advantages=False)[1][0].advantages


@check("3.2", "advantage_fn replaces them: it gets rewards, images, tokens, index and step")
def _(m, d):
    def advantage_fn(rewards, images, tokens, index, step):
        first = tokens[:, 0] / 10 + images.sum((1, 2, 3))
        return rewards + first + index.sum() / 10 + step
    made = world(m, d, steps=2, seams=dict(advantage_fn=advantage_fn))[1]
    return [step.advantages for step in made]


# --- 3.3: the update --------------------------------------------------------------------------


@check("3.3", "one update: the gradient of the mean over all images of the step")
def _(m, d):
    return weights(world(m, d)[0])


@check("3.3", "micro-batches, of unequal sizes too, change nothing")
def _(m, d):
    return [weights(world(m, d, micro_batch=b)[0]) for b in (1, 3)]


@check("3.3", "the old policy is the learner before the first update of the step, in all epochs")
def _(m, d):
    model, (step,) = world(m, d, update_epochs=3, micro_batch=3)
    return step.metrics["ratio_max"], step.logp, weights(model)


@check("3.3", "every update starts from a gradient of zero: no step's is added to the next one's")
def _(m, d):
    model, made = world(m, d, steps=2, update_epochs=2)
    return [step.metrics["grad_norm"] for step in made], weights(model)


@check("3.3", "a gradient longer than max_grad_norm is scaled down; the norm before is reported")
def _(m, d):
    model, (step,) = world(m, d, max_grad_norm=0.01)
    return step.metrics["grad_norm"], weights(model)


@check("3.3", "the learning rate of the step is set before the update")
def _(m, d):
    return weights(world(m, d, steps=2, warmup_steps=4, lr_end=0.0)[0])


@check("3.3", "the entropy is that of the old policy, and log-probabilities follow logprob_cfg")
def _(m, d):
    model, (step,) = world(m, d, update_epochs=2, logprob_cfg="none")
    return step.entropy, step.logp, weights(model)


@check("3.3", "extra_loss adds its gradient, then sync is called, then the gradient is clipped")
def _(m, d):
    called = []

    def extra_loss(model, index, step):
        called.append(f"extra {step}")
        (0.1 * next(model.parameters()).square().sum()).backward()
        return {"extra": 7.0}

    def sync(model):
        called.append("sync")
        for parameter in model.parameters():
            parameter.grad *= 0.5

    model, (step,) = world(m, d, seams=dict(extra_loss=extra_loss, sync=sync), max_grad_norm=0.3)
    return called, step.metrics["extra"], weights(model)


@check("3.3", "a gradient that is not finite raises FloatingPointError before the update")
def _(m, d):
    models = []
    error = raises(world, m, d, broken=True, seams=dict(sync=models.append))
    return error, [weights(model).isfinite() for model in models]
