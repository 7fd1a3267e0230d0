"""What keeps pictures varied: what is right, the bonus, and rehearsal's gradient and its end."""

import math

import pytest
import torch
from conftest import tiny_condition, tiny_model
from test_train import Blocks, weights

import argrpo
from argrpo import GRPOConfig, Prompts
from diversity import (
    DiversityBonus,
    Rehearsal,
    diversity_bonus,
    group_diversity,
    right_images,
)
from harness.speed import frozen_copy
from vqgan import VQConfig, VQModel


def test_diversity_by_hand():
    """Two groups of two: black and white differ by 1 everywhere, two equal pictures by 0."""
    black, white = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    assert group_diversity(torch.stack([black, white, white, white]), 2).tolist() == [1.0, 0.0]


def test_what_is_right():
    """Verdicts at 1; graded rewards above the median, or at a maximum that most share; never where
    all are equal."""
    def right(*rewards):
        return right_images(torch.tensor(rewards), 4)[0].tolist()

    assert right(0.0, 1.0, 1.0, math.nan) == [False, True, True, False]
    assert right(0.1, 0.4, 0.2, 0.3) == [False, True, False, True]
    assert right(2.0, 2.0, 2.0, 0.5) == [True, True, True, False]
    assert right(2.0, math.nan, 2.0, 0.5) == [True, False, True, False]
    assert right(0.7, 0.7, 0.7, 0.7) == [False] * 4


# --- the diversity bonus ---------------------------------------------------------------------

def test_bonus_by_hand():
    """Right images at 0, 0 and 3 on a line: mean distances 1.5, 1.5 and 3, of mean 2.

    The wrong one, far away, changes nothing, and the distance's scale does not matter."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])
    places = torch.tensor([[0.0], [0.0], [100.0], [3.0]])
    bonus = diversity_bonus(rewards, places, 4, weight=0.2)
    torch.testing.assert_close(bonus, 0.2 * torch.tensor([-0.25, -0.25, 0.0, 0.5]))
    torch.testing.assert_close(diversity_bonus(rewards, 7 * places, 4, weight=0.2), bonus)


@pytest.mark.parametrize("rewards", [
    torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]),
    torch.rand(8),
    torch.tensor([1.0, math.nan, 1, 1] * 2),
])
def test_bonus_sums_to_zero_and_ignores_wrong_images(rewards):
    features = torch.randn(8, 3, 4)
    bonus = diversity_bonus(rewards, features, 4, weight=0.5)
    torch.testing.assert_close(bonus.view(2, 4).sum(dim=1), torch.zeros(2))
    graded = not ((rewards == 0) | (rewards == 1) | rewards.isnan()).all()
    for r, b in zip(rewards.split(4), bonus.split(4)):
        wrong = r <= r.nanmedian() if graded else r != 1
        assert (b[wrong] == 0).all()
        assert (b != 0).any() == (int((~wrong).sum()) >= 3)


def test_bonus_of_graded_rewards_follows_their_spread():
    """Above the median of 8 are 4 images; ten times the rewards, ten times the bonus."""
    rewards, features = torch.rand(8) / 2, torch.randn(8, 5)
    small, large = (diversity_bonus(scale * rewards, features, 8, weight=0.5) for scale in (1, 10))
    assert (small != 0).sum() == 4
    torch.testing.assert_close(large, 10 * small)


def test_two_right_images_or_equal_ones_share_nothing():
    two, all_right = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.ones(4)
    assert (diversity_bonus(two, torch.randn(4, 2), 4, weight=1.0) == 0).all()
    assert (diversity_bonus(all_right, torch.zeros(4, 2), 4, weight=1.0) == 0).all()


@pytest.mark.parametrize("distance", ["pixels", "codes"])
def test_the_bonus_as_advantages(distance):
    """Of the rewards and the bonus together, which compares pictures or the codes they are of."""
    vq = VQModel(VQConfig(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5,
                          codebook_embed_dim=4))
    rewards, images = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.rand(4, 3, 8, 8)
    tokens = torch.randint(5, (4, 16))
    features = images if distance == "pixels" else vq.quantize.codes()[tokens]
    total = rewards + diversity_bonus(rewards, features, 4, 0.3)
    for scale in (True, False):
        bonus = DiversityBonus(vq, GRPOConfig(group_size=4, scale_advantages=scale), 0.3, distance)
        expected = argrpo.group_advantages(total, 4, scale=scale)
        assert torch.equal(bonus(rewards, images, tokens, torch.tensor([0]), 0), expected)


def test_the_bonus_in_the_loop():
    """It changes what is learnt, and the micro-batch's size still does not matter."""
    def train(weight, micro_batch):
        model, rehearsal, config, prompts = tiny_rehearsal(micro_batch=micro_batch, lr=1e-2)
        bonus = DiversityBonus(None, config, weight)
        optimizer = argrpo.make_optimizer(model, config)
        for _ in argrpo.train(model, rehearsal.reference, Blocks(), prompts, dark, config,
                              optimizer, advantage_fn=bonus):
            pass
        return weights(model)

    whole = train(0.5, micro_batch=8)
    torch.testing.assert_close(train(0.5, micro_batch=3), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(train(0.0, micro_batch=8), whole, rtol=1e-4, atol=1e-5)


# --- rehearsal -------------------------------------------------------------------------------

def dark(images, texts):
    """Right is a picture that is darker than half grey."""
    right = (images.mean(dim=(1, 2, 3)) < 0.5).float()
    return right, {"dark": right}


def tiny_rehearsal(model_type="c2i", model=None, groups=2, reward_fn=dark, weight=0.5, **changes):
    torch.manual_seed(0)
    model = tiny_model(model_type) if model is None else model
    cond, mask = tiny_condition(model_type, rows=5)
    settings = dict(steps=4, prompts_per_step=2, group_size=4, micro_batch=3, kl_beta=0.0) | changes
    config = GRPOConfig(**settings)
    prompts = Prompts([f"prompt {k}" for k in range(5)], cond, mask)
    rehearsal = Rehearsal(frozen_copy(model), Blocks(), prompts, reward_fn, config, weight, groups)
    return model, rehearsal, config, prompts


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_only_right_images_are_remembered(model_type):
    _, rehearsal, _, _ = tiny_rehearsal(model_type)
    rehearsal.remember(torch.tensor([3, 1, 3]), step=0)
    assert list(rehearsal.remembered) == [3, 1]
    for tokens in rehearsal.remembered.values():
        assert 0 < len(tokens) <= 8                              # of two groups of four
        assert dark(argrpo.to_images(Blocks(), tokens), None)[0].all()
    before = rehearsal.remembered[1]
    rehearsal.remember(torch.tensor([1, 2]), step=1)
    assert rehearsal.remembered[1] is before and 2 in rehearsal.remembered


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_the_gradient_is_that_of_the_likelihood(model_type):
    """All that is remembered, two images a prompt, in micro-batches of three, against one plain
    pass."""
    model, rehearsal, _, prompts = tiny_rehearsal(model_type, weight=0.5, cfg_scale=2.0)
    index = torch.tensor([0, 4])
    rehearsal.remembered = {k: torch.randint(11, (2, 16)) for k in (0, 4)}
    logged = rehearsal(model, index, step=0)
    added = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens = torch.cat([rehearsal.remembered[0], rehearsal.remembered[4]])
    _, cond, mask = prompts.pick(index.repeat_interleave(2), torch.device("cpu"))
    loss = -argrpo.token_logp(model, tokens, cond, mask, cfg_scale=2.0)[0].mean()
    (0.5 * loss).backward()
    assert logged["rehearsal"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, p in zip(added, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_a_prompt_that_is_never_right_adds_nothing():
    def never(images, texts):
        return torch.zeros(len(images)), {}
    model, rehearsal, _, _ = tiny_rehearsal(reward_fn=never)
    assert rehearsal(model, torch.tensor([0, 1]), step=0) == {"rehearsal": 0.0}
    assert all(p.grad is None for p in model.parameters())


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
    class Pixel:
        def decode(self, tokens):
            return (tokens.float() / 5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    config = GRPOConfig(steps=100, prompts_per_step=1, group_size=3000, micro_batch=None)
    prompts = Prompts(["dark"], label)
    rehearsal = Rehearsal(frozen_copy(model), Pixel(), prompts, dark, config, 1.0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(100):
        optimizer.zero_grad()
        rehearsal(model, torch.tensor([0]), step)
        optimizer.step()
    torch.testing.assert_close(first_code(model, label), wanted, rtol=0, atol=0.05)


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
    assert torch.equal(weights(model), weights(straight))
    assert first + second == logged and logged[0] > 0
