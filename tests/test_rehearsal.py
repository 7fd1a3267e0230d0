"""Rehearsal: what is remembered, the gradient that it adds, and where it leads."""

import pytest
import torch
from conftest import tiny_condition, tiny_model
from test_train import Blocks, weights

import argrpo
from argrpo import GRPOConfig, Prompts
from rehearsal import Rehearsal


def dark(images, texts):
    """Right is a picture that is darker than half grey."""
    right = (images.mean(dim=(1, 2, 3)) < 0.5).float()
    return right, {"dark": right}


def tiny_rehearsal(model_type="c2i", model=None, groups=2, reward_fn=dark, weight=0.5, **changes):
    torch.manual_seed(0)
    model = tiny_model(model_type) if model is None else model
    cond, mask = tiny_condition(model_type, rows=5)
    config = GRPOConfig(**dict(steps=4, prompts_per_step=2, group_size=4, micro_batch=3, kl_beta=0.0) | changes)
    prompts = Prompts([f"prompt {k}" for k in range(5)], cond, mask)
    rehearsal = Rehearsal(argrpo.frozen_copy(model), Blocks(), prompts, reward_fn, config, weight, groups)
    return model, rehearsal, config, prompts


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_only_right_images_are_remembered(model_type):
    _, rehearsal, _, _ = tiny_rehearsal(model_type)
    rehearsal.draw(torch.tensor([3, 1, 3]), step=0)
    assert list(rehearsal.remembered) == [3, 1]
    for tokens in rehearsal.remembered.values():
        assert 0 < len(tokens) <= 8                              # of two groups of four
        assert dark(argrpo.paint(Blocks(), tokens), None)[0].all()
    before = rehearsal.remembered[1]
    rehearsal.draw(torch.tensor([1, 2]), step=1)
    assert rehearsal.remembered[1] is before and 2 in rehearsal.remembered


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_the_gradient_is_that_of_the_likelihood(model_type):
    """All that is remembered, two images a prompt, in micro-batches of three, against one plain pass."""
    model, rehearsal, _, prompts = tiny_rehearsal(model_type, weight=0.5, cfg_scale=2.0)
    index = torch.tensor([0, 4])
    rehearsal.remembered = {k: torch.randint(11, (2, 16)) for k in (0, 4)}
    logged = rehearsal(model, index, step=0)
    added = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens, (_, cond, mask) = torch.cat([rehearsal.remembered[0], rehearsal.remembered[4]]), prompts.pick(index, "cpu")
    mask = None if mask is None else mask.repeat_interleave(2, dim=0)
    loss = -argrpo.token_logp(model, tokens, cond.repeat_interleave(2, dim=0), mask, cfg_scale=2.0)[0].mean()
    (0.5 * loss).backward()
    assert logged["rehearsal"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, p in zip(added, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_a_prompt_that_is_never_right_adds_nothing():
    model, rehearsal, _, _ = tiny_rehearsal(reward_fn=lambda images, texts: (torch.zeros(len(images)), {}))
    assert rehearsal(model, torch.tensor([0, 1]), step=0) == {"rehearsal": 0.0}
    assert all(p.grad is None for p in model.parameters())


def test_it_leads_to_what_the_reference_does_when_it_is_right():
    """One token, so that the right codes' probabilities are known: of 11 codes, those of brightness below a half are right.

    3000 images of the reference say what they are, with a standard error below 0.01."""
    model = tiny_model(block_size=1, num_classes=1)
    nothing, label = torch.zeros(1, 1, dtype=torch.long), torch.tensor([0])
    with torch.no_grad():
        p = argrpo.policy_logits(model, nothing, label).softmax(-1)[0, 0]
    wanted = torch.where(torch.arange(11) < 5, p, 0) / p[:5].sum()
    assert 0.2 < p[:5].sum() < 0.8 and wanted.max() < 0.8        # there is something to do, and more than one way

    class Pixel:
        def decode(self, tokens):
            return (tokens.float() / 5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    config = GRPOConfig(steps=100, prompts_per_step=1, group_size=3000, micro_batch=None)
    rehearsal = Rehearsal(argrpo.frozen_copy(model), Pixel(), Prompts(["dark"], label), dark, config, 1.0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(100):
        optimizer.zero_grad()
        rehearsal(model, torch.tensor([0]), step)
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(argrpo.policy_logits(model, nothing, label).softmax(-1)[0, 0], wanted, rtol=0, atol=0.05)


def test_continuing_with_what_was_remembered_equals_never_stopping():
    """In the loop: four steps in one go, and two and two."""
    def run(model, first_step, steps, optimizer=None, remembered=()):
        start, rehearsal, config, prompts = tiny_rehearsal(lr=1e-2, steps=steps, lr_end=1.0)
        rehearsal.remembered |= dict(remembered)
        model = model or start
        optimizer = optimizer or argrpo.make_optimizer(model, config)
        metrics = list(argrpo.train(model, rehearsal.reference, Blocks(), prompts, dark, config, optimizer, first_step,
                                    extra_loss=rehearsal))
        return model, metrics, optimizer, rehearsal.remembered

    straight, metrics, _, _ = run(None, 0, 4)
    model, first, optimizer, remembered = run(None, 0, 2)
    model, second, _, _ = run(model, 2, 4, optimizer, remembered)
    assert torch.equal(weights(model), weights(straight))
    assert [m["rehearsal"] for m in first + second] == [m["rehearsal"] for m in metrics] and metrics[0]["rehearsal"] > 0
