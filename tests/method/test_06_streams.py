"""What the loop needs: prompts, images, optimizer, random streams.  argrpo.py, section 4."""

import pytest
import torch
from conftest import Loop, same, seeds_of, tiny_model

import argrpo
from argrpo import GRPOConfig, Prompts

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


def test_a_prompts_condition_and_mask_stay_together():
    """See Prompts.pick, which may be asked for a prompt twice and in any order."""
    prompts = Prompts(list("abc"), torch.arange(3.0).view(3, 1, 1), torch.eye(3, dtype=torch.bool))
    cond, mask = prompts.pick(torch.tensor([2, 0, 2]), "cpu")
    assert cond.flatten().tolist() == [2, 0, 2], "the conditions of prompts 2, 0 and 2"
    assert mask.int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]], "their masks"
    assert Prompts(list("abc"), torch.arange(3)).pick(torch.tensor([1]), "cpu")[1] is None


def test_images_go_from_minus_1_1_to_0_1_and_are_cut_there():
    """The decoder's range is [-1, 1] only nominally.  See to_images."""
    class Decoder:
        def decode(self, tokens):
            return torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])[tokens].view(-1, 1, 1, 1)
    for micro_batch in (None, 2):
        ours = argrpo.to_images(Decoder(), torch.arange(5).view(5, 1), micro_batch)
        same(ours.flatten(), [0.0, 0.0, 0.5, 1.0, 1.0], "(x + 1) / 2, clamped to [0, 1], in order")


# --- the optimizer ---------------------------------------------------------------------------

def test_learning_rate_warms_up_and_decays():
    def rates(**settings):
        config = GRPOConfig(steps=4, lr=0.1, **settings)
        return [argrpo.learning_rate(config, step) for step in range(4)]

    assert rates(warmup_steps=3, lr_end=1.0) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1]), (
        "up to lr in warmup_steps, the first of them at lr / warmup_steps")
    assert rates(warmup_steps=1, lr_end=0.0) == pytest.approx([0.1, 0.075, 0.05, 0.025]), (
        "down in a straight line, to 0 after all steps")
    assert rates(warmup_steps=1, lr_end=0.6) == pytest.approx([0.1, 0.09, 0.08, 0.07]), (
        "down to lr_end of lr")


def test_the_optimizer_is_adamw_with_llamagens_betas():
    model = tiny_model()
    optimizer = argrpo.make_optimizer(model, GRPOConfig(lr=0.3, weight_decay=0.7))
    assert type(optimizer) is torch.optim.AdamW, (
        "AdamW, whose weight decay is apart from the gradient")
    group, = optimizer.param_groups
    assert group["betas"] == (0.9, 0.95), "LlamaGen's betas"
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.7), "lr and weight_decay are config's"
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()], (
        "all parameters are trained, the null branch's too")


# --- random streams ----------------------------------------------------------------------------

def test_no_two_passes_share_a_random_stream(spy):
    """Over steps, passes of a step, processes and seeds.  See rng_for and the rollout."""
    drawn = spy(argrpo, "generate")
    for seed in (0, 1):
        for rank in (0, 1):
            loop = Loop(steps=3, prompts_per_step=4, rollout_prompts=1, seed=seed, update_epochs=1,
                        seams=dict(shard=(rank, 2)))
            assert len(list(loop.steps)) == 3, "three steps"
    seeds = seeds_of(drawn)
    assert len(seeds) == 2 * 2 * 3 * 2, "rollout_prompts 1: a pass for each prompt"
    assert len(set(seeds)) == len(seeds), "two passes with the same random numbers"


def test_a_steps_stream_depends_on_nothing_before_it(spy):
    """So a resumed run needs no generator's state."""
    drawn = spy(argrpo, "generate")
    list(Loop(steps=3, update_epochs=1).steps)
    whole = seeds_of(drawn)
    drawn.calls.clear()
    torch.rand(100)                              # torch's own stream is somewhere else by now
    list(Loop(steps=3, first_step=2, update_epochs=1).steps)
    assert seeds_of(drawn) == whole[-2:], "step 2 draws with step 2's stream, also after a resume"


def test_rng_for_depends_on_every_part_of_its_key():
    keys = [(0, "rollout", 0, 0), (1, "rollout", 0, 0), (0, "prompts", 0, 0), (0, "rollout", 1, 0),
            (0, "rollout", 0, 1), (0, "rollout", 0), (0, "rollout", 1, 1), (0, "rollout", 11)]
    draws = [torch.rand(4, generator=argrpo.rng_for("cpu", *key)) for key in keys]
    for i, draw in enumerate(draws):
        again = torch.rand(4, generator=argrpo.rng_for("cpu", *keys[i]))
        assert torch.equal(draw, again), "the same key, the same numbers"
        assert not any(torch.equal(draw, other) for other in draws[:i]), f"{keys[i]} is no new key"


def test_a_stream_is_the_same_in_every_process_and_on_every_machine():
    """Python's own hash of a text is another in each process."""
    seed = argrpo.rng_for("cpu", 0, "rollout", 3).initial_seed()
    assert seed == 62716437845107961, "else a run cannot be repeated, nor resumed"


def test_images_of_a_prompt_and_prompts_twice_in_a_step_differ():
    """Four images of each of seven prompts, of which two come twice: no two are the same draw."""
    step = Loop(prompts_per_step=7, group_size=4, rollout_prompts=0, update_epochs=1).step()
    assert len(step.index.unique()) < 7
    distinct = {tuple(row) for row in step.tokens.tolist()}
    assert len(distinct) > 20, f"28 images, but only {len(distinct)} different ones"
