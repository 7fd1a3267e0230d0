"""The toy's world: what is rendered is read back, and nothing else passes."""

import json
import random
import shutil

import pytest
import torch
from conftest import same, weights
from measure_spread import measure_spread

import toy
import toy.pretraining
from argrpo import Prompts, draw_images, rng_for, to_images

PROMPTS = toy.CLASSES + toy.PAIRS


def scenes(seed, times=2):
    rng = random.Random(seed)
    prompts = PROMPTS * times
    return prompts, [toy.make_scene(prompt, rng) for prompt in prompts]


def test_the_verifier_passes_every_rendered_scene():
    prompts, made = scenes(seed=1, times=1)
    images = toy.render(made)
    assert images.shape == (len(prompts), 3, 24, 24) and images.min() >= 0 and images.max() <= 1
    assert toy.verify(images, prompts).mean() == 1, "every scene shows its own prompt"


def test_the_verifier_reads_what_was_drawn():
    _, made = scenes(seed=2, times=1)
    for drawn, read in zip(made, toy.read_scenes(toy.render(made))):
        for a, b in zip(sorted(drawn), sorted(read)):
            assert (a.colour, a.shape) == (b.colour, b.shape)
            assert abs(a.x - b.x) < 1 and abs(a.y - b.y) < 1.1 and abs(a.width - b.width) < 1.2


def test_the_wrong_prompt_fails():
    """Every class against the picture of every other class."""
    rng = random.Random(3)
    images = toy.render([toy.make_scene(prompt, rng) for prompt in toy.CLASSES])
    for shift in range(1, 27):
        assert toy.verify(images, toy.CLASSES[shift:] + toy.CLASSES[:shift]).sum() == 0


def test_relations():
    """A circle at the top left of a square: above it and left of it, and nothing else."""
    things = [toy.Thing("red", "circle", 5, 5, 8, 8), toy.Thing("blue", "square", 18, 18, 8, 8)]
    image = toy.render([things])
    verdict = {place: toy.verify(image, [f"a red circle {place} a blue square"]).item()
               for place in toy.PLACES}
    assert verdict == {"above": 1, "below": 0, "left of": 1, "right of": 0}
    a_pixel_lower = [things[0], toy.Thing("blue", "square", 18, 6, 8, 8)]
    assert toy.verify(toy.render([a_pixel_lower]), ["a blue square below a red circle"]).item() == 0


def alone(shape, side):
    return toy.render([[toy.Thing(colour, shape, 12, 12, side, side)] for colour in toy.PALETTE])


def solid():
    colours = torch.tensor([*toy.PALETTE.values(), (1, 1, 1), (0, 0, 0)])
    return colours.view(-1, 3, 1, 1).expand(-1, -1, 24, 24)


def random_tokens():
    tokens = torch.randint(toy.VQ_CONFIG.codebook_size, (27, 36))
    return to_images(toy.load("c2i")[1], tokens)


JUNK = {
    "noise": lambda: torch.rand(27, 3, 24, 24),
    "blank": lambda: toy.GROUND.view(1, 3, 1, 1).expand(1, -1, 24, 24),
    "solid": solid,
    "too big": lambda: alone("square", 20),
    "too small": lambda: alone("circle", 4),
    "random tokens": random_tokens,
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_fails(kind):
    for scene in toy.read_scenes(JUNK[kind]()):
        assert not any(toy.fulfils(scene, prompt) for prompt in toy.CLASSES)


def test_a_good_scene_with_a_stray_stroke_fails():
    image = toy.render([[toy.Thing("red", "circle", 6, 6, 8, 8)]])
    assert toy.verify(image, ["one red circle"]) == 1
    for colour in ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.9, 0.2, 0.15)):
        spoilt = image.clone()
        spoilt[0, :, 20, 4:12] = torch.tensor(colour)[:, None]
        assert toy.verify(spoilt, ["one red circle"]) == 0


def test_a_bar_is_no_square():
    for width, height, right in ((8, 8, 1), (8, 13, 0), (13, 8, 0)):
        image = toy.render([[toy.Thing("red", "square", 12, 12, width, height)]])
        assert toy.verify(image, ["one red square"]) == right, f"{width} wide, {height} high"


def test_a_layout_does_not_depend_on_which_thing_is_found_first():
    a, b = toy.Thing("red", "circle", 4, 4, 8, 8), toy.Thing("blue", "square", 20, 20, 8, 8)
    assert toy.verifier.coarse_layout([a, b]) == toy.verifier.coarse_layout([b, a])
    assert toy.verifier.coarse_layout([a]) != toy.verifier.coarse_layout([b])


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_the_ground_may_deviate_so_much_in_each_channel(channel):
    image = toy.render([[toy.Thing("red", "circle", 6, 6, 8, 8)]])
    for deviation, right in ((0.23, 1), (0.27, 0)):
        spoilt = image.clone()
        spoilt[0, channel, 20, 4:12] += deviation
        assert toy.verify(spoilt, ["one red circle"]) == right, f"a stroke that is {deviation} off"


def test_the_tokenizer_keeps_scenes_right():
    """On fresh scenes: nearly all of the classes, and most of the pairs, some of them unseen."""
    prompts, made = scenes(seed=4, times=1)
    _, vq = toy.load("c2i")
    images = to_images(vq, vq.encode(toy.render(made) * 2 - 1))
    right = toy.verify(images, prompts)
    is_class = torch.tensor([prompt in toy.CLASSES for prompt in prompts])
    assert right[is_class].mean() >= 0.98 and right[~is_class].mean() >= 0.9


def test_every_scene_is_complete_and_has_gaps():
    for prompt, scene in zip(*scenes(seed=5)):
        assert sorted((t.colour, t.shape) for t in scene) == sorted(toy.parse(prompt).things)
        for i, a in enumerate(scene):
            assert 0 <= a.x - a.width / 2 and a.x + a.width / 2 <= 24
            assert 0 <= a.y - a.height / 2 and a.y + a.height / 2 <= 24
            for b in scene[:i]:
                assert any(toy.holds(place, a, b, gap=2) for place in toy.PLACES)


def test_unseen_compositions_are_kept_apart():
    seen, unseen = toy.SEEN_CLASSES + toy.SEEN_PAIRS, toy.UNSEEN_CLASSES + toy.UNSEEN_PAIRS
    assert len(toy.UNSEEN_CLASSES) == 3 and len(toy.UNSEEN_PAIRS) == 40
    assert sorted(seen + unseen) == sorted(PROMPTS)

    def things(prompts):                         # of pairs in either order, in any relation
        return {frozenset(toy.parse(prompt).things) for prompt in prompts}

    def words(prompts):
        return {word for prompt in prompts for word in prompt.split()}

    assert not things(toy.UNSEEN_PAIRS) & things(toy.SEEN_PAIRS)
    assert words(unseen) <= words(seen)


@pytest.mark.parametrize("prompt", [
    "", "four red circles", "a red circle", "one pink circle", "a red circle on a blue square",
    "twenty two red circles", "a green square and two red circles", "two red circle",
    "a red circle above a blue square above a green square", "a red circle below a red circle"])
def test_prompts_outside_the_world(prompt):
    """A prompt that only ends as one of the toy's asks for something else."""
    with pytest.raises(ValueError, match="the toy cannot draw or verify"):
        toy.parse(prompt)


def test_captions_are_padded_on_the_left():
    features, mask = toy.encode_captions(
        ["two red circles", "a blue triangle left of a green square"])
    assert features.shape == (2, 8, toy.CAPTION_DIM)
    assert mask[0].tolist() == [False] * 5 + [True] * 3 and mask[1].all(), (
        "a caption is padded on the left")
    assert (features[0, :5] == 0).all() and (features[mask].sum(-1) == 1).all(), (
        "padding is zero, a word is a one")


def test_a_word_in_another_context_is_another_feature():
    features, _ = toy.encode_captions(
        ["a red circle above a blue square", "a red circle below a blue square"])
    assert features[:, 2].sum().item() == 2                              # "red", at the same place
    assert not torch.equal(features[0, 2], features[1, 2])


def test_class_indices_are_the_prompts():
    assert len(toy.CLASSES) == 27
    assert toy.CLASSES[0] == "one red circle" and toy.CLASSES[-1] == "three blue triangles"


def test_weights_are_small():
    sizes = [path.stat().st_size for path in toy.FOLDER.glob("toy_*.pt")]
    assert len(sizes) == 3 and sum(sizes) <= 4_000_000


def test_weights_of_your_own_take_the_place_of_the_shipped_ones(tmp_path):
    """The transformer's or the tokenizer's: the other stays."""
    shipped, paths = toy.load("c2i"), (tmp_path / "gpt.pt", tmp_path / "vq.pt")
    for model, path in zip(toy.load("c2i"), paths):
        for p in model.parameters():
            p.data.fill_(0.5)
        torch.save({"model": model.state_dict()}, path)
    for own in (0, 1):
        loaded = toy.load("c2i", **{("gpt_path", "vq_path")[own]: paths[own]})
        assert all((p == 0.5).all() for p in loaded[own].parameters()), "one's own"
        same(weights(loaded[1 - own]), weights(shipped[1 - own]), "the shipped one")


@pytest.mark.slow
def test_pretraining_writes_what_load_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.pretraining, "STEPS", {"vq": 2, "c2i": 2, "t2i": 2})
    toy.pretraining.pretrain_toy(tmp_path, scenes=64)
    for task in ("c2i", "t2i"):
        model, vq = toy.load(task, tmp_path)
        assert model.config == toy.CONFIGS[task] and vq.config == toy.VQ_CONFIG, (
            "the shipped models are those of the configuration")


# --- how varied the right pictures are -------------------------------------------------------

def test_distinct_values_to_expect():
    """Two of (a, a, b): a, a once in three draws, and both otherwise."""
    assert toy.distinct_in(2, "aab") == pytest.approx(5 / 3)
    assert toy.distinct_in(2, "aa") == 1 and toy.distinct_in(3, "abc") == 3


def spread_of(scenes, prompts):
    return toy.spread(toy.render(scenes), prompts)


def test_spread_of_one_layout_is_none_and_of_many_is_large():
    rng, prompt = random.Random(0), "one red circle"
    same = spread_of([toy.make_scene(prompt, rng)] * 16, [prompt] * 16)
    assert same == {"distance": 0, "centres": 0, "sizes": 0, "layouts": 1}
    varied = spread_of([toy.make_scene(prompt, rng) for _ in range(64)], [prompt] * 64)
    # Places are multiples of 4 from 4 to 20 (size 8) or 6 to 18 (size 12): standard deviations 5.7
    # and 4.5.  Sizes are 8 or 12: standard deviation 2.
    assert 4 < varied["centres"] < 6.5 and 1.8 < varied["sizes"] < 2.2 and varied["layouts"] > 4


def test_wrong_pictures_do_not_count():
    rng, prompt = random.Random(0), "one red circle"
    right = [toy.make_scene(prompt, rng)] * 8
    wrong = [toy.make_scene("two blue squares", rng) for _ in range(8)]
    assert spread_of(right + wrong, [prompt] * 16) == spread_of(right, [prompt] * 8)


def test_the_shipped_spread_is_that_of_the_shipped_weights(tmp_path):
    """Fewer pictures give about the same; what was not measured is not made up."""
    known = toy.shipped_spread("c2i", toy.CLASSES[::2])
    model, vq = toy.load("c2i")
    prompts = Prompts(toy.CLASSES, torch.arange(27))
    _, _, images = draw_images(model, vq, prompts, torch.arange(0, 27, 2),
                               rng_for("cpu", "again"), samples_per_prompt=24, micro_batch=64)
    again = toy.spread(images, [text for text in toy.CLASSES[::2] for _ in range(24)])
    assert set(again) == set(known)
    for part, value in again.items():
        assert value == pytest.approx(known[part], rel=0.12), part
    assert toy.shipped_spread("c2i", ["one red circle", "four red circles"]) is None
    one = toy.shipped_spread("c2i", ["three red circles"])
    assert one["sizes"] is None, "three things have one size: there is nothing to measure"
    both = [toy.shipped_spread("c2i", [text])["centres"] for text in toy.CLASSES[:2]]
    assert both[0] != both[1] and toy.shipped_spread("c2i", toy.CLASSES[:2])["centres"] == (
        pytest.approx(sum(both) / 2)), "the mean over the texts that are asked for"


@pytest.mark.slow
def test_spread_is_measured_of_the_weights_in_the_folder(tmp_path):
    for name in ("toy_vq.pt", "toy_c2i.pt", "toy_t2i.pt"):
        shutil.copy(toy.FOLDER / name, tmp_path)
    measure_spread(tmp_path, samples=2)
    ours, theirs = (json.loads((folder / "spread.json").read_text())
                    for folder in (tmp_path, toy.FOLDER))
    for task in ("c2i", "t2i"):
        assert ours[task]["texts"] == theirs[task]["texts"] and ours[task]["samples"] == 2
        parts = ours[task]["parts"]
        assert parts["distance"] and not parts["layouts"], "two pictures are enough for a distance"
