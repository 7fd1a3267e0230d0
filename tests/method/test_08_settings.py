"""What every setting of the loop changes, and that it changes nothing else.

A setting that the loop ignores, or one that leaks into another stage, fails here by its name.
Rehearsal's settings are in test_12_rehearsal.py, those of evaluation in harness/test_evaluation.py.
"""

from dataclasses import fields

import pytest
import torch
from conftest import BASE, Loop, Spy, check_setting, gradient, seeds_of, weights

import argrpo
from argrpo import GRPOConfig


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(warmup_steps=0), dict(micro_batch=0), dict(rollout_prompts=-1),
    dict(group_size=1), dict(lr=-1.0), dict(lr=float("nan")), dict(kl_beta=float("inf")),
    dict(temperature=0.0), dict(temperature=float("nan")), dict(max_grad_norm=0.0),
    dict(cfg_scale=float("nan")), dict(logprob_cfg="off")])
def test_settings_out_of_range_are_refused_with_their_value(bad):
    """Where they are made, in a script of one's own as on the command line."""
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be .*not '?{value}"):
        GRPOConfig(**bad)


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
    check_setting(name, value, base, seen, must, may)
