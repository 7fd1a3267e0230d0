"""Comparing checkpoints: pictures with streams of their own, in shards, and the table of them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import Blocks, tiny_model
from PIL import Image
from safetensors.torch import save_file

import argrpo
import evaluate
import reward
import sample
import toy
from harness import compare, fidelity
from harness.choices import checkpoint
from harness.compare import draw_shards, read_shards, shards
from harness.fidelity import Shards, fid_of_toy, scenes_of

PROMPTS = argrpo.Prompts([f"prompt {k}" for k in range(5)], torch.arange(5))
INDEX = torch.arange(5).repeat_interleave(4)     # 20 pictures


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model(block_size=4, n_layer=1)


def drawn(model, folder, monkeypatch, size=6, parts=((0, 1),), **policy):
    """The pictures of all processes' shards, of `size` pictures each."""
    monkeypatch.setattr(compare, "SHARD", size)
    for shard in parts:
        draw_shards(model, Blocks(), PROMPTS, INDEX, folder, 3, shard=shard, **policy)
    return read_shards(folder)


@pytest.mark.parametrize("command", [evaluate, sample])
def test_weights_of_your_own_are_loaded(command, tmp_path, monkeypatch):
    """The transformer's and the tokenizer's."""
    loaded, gpt = [], str(tmp_path / "gpt.pt")
    Path(gpt).touch()

    def load_models(*given):
        loaded.append(given)
        raise KeyboardInterrupt
    monkeypatch.setattr(command, "load_models", load_models)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--gpt-ckpt", gpt, "--vq-ckpt", "vq.pt"])
    assert loaded == [("toy", "c2i", gpt, "vq.pt")]


# --- drawing -----------------------------------------------------------------------------------

def test_a_picture_depends_on_its_number_alone(model, tmp_path, monkeypatch):
    """Not on how many are drawn at a time, nor on how many processes draw."""
    whole = drawn(model, tmp_path / "a", monkeypatch, size=20)
    assert whole.shape == (20, 2, 2, 3) and whole.std() > 0
    assert (drawn(model, tmp_path / "b", monkeypatch, size=3) == whole).all()
    halves = drawn(model, tmp_path / "c", monkeypatch, size=3, parts=((1, 2), (0, 2)))
    assert (halves == whole).all(), "two processes draw what one draws"
    assert len(np.unique(whole[:4].reshape(4, -1), axis=0)) > 1, "a prompt's pictures differ"


def test_guidance_and_temperature_reach_the_pictures(model, tmp_path, monkeypatch):
    plain = drawn(model, tmp_path / "a", monkeypatch, cfg_scale=1.0, temperature=1.0)
    for name, policy in dict(b=dict(cfg_scale=4.0, temperature=1.0),
                             c=dict(cfg_scale=1.0, temperature=0.2)).items():
        assert (drawn(model, tmp_path / name, monkeypatch, **policy) != plain).any()


def test_the_likeliest_of_several_is_kept(model):
    """The first candidate is the picture that one draw gives."""
    def logp_of(best_of):
        _, logp = compare.draw(model, Blocks(), PROMPTS, INDEX[:4], range(4), 3, best_of)
        return logp.sum(1)
    one, two, eight = map(logp_of, (1, 2, 8))
    assert (two >= one - 1e-5).all() and (eight >= two - 1e-5).all(), "the likeliest is kept"
    assert (eight > one + 0.1).any(), "the candidates of a picture have numbers of their own"


def test_an_interrupted_draw_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    whole = drawn(model, tmp_path / "a", monkeypatch)
    kept = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "a")}
    assert list(kept) == ["00000.npz", "00001.npz", "00002.npz", "00003.npz"]
    (tmp_path / "a" / "00002.npz").unlink()
    assert (drawn(model, tmp_path / "a", monkeypatch) == whole).all()
    again = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "a")}
    assert [name for name in kept if kept[name] != again[name]] == ["00002.npz"]


def test_pictures_of_another_model_are_not_mixed_in(model, tmp_path, monkeypatch):
    drawn(model, tmp_path / "a", monkeypatch)
    with torch.no_grad():
        model.output.weight[3] += 1
    with pytest.raises(ValueError, match=r"holds pictures of another .* \(transformer\)"):
        drawn(model, tmp_path / "a", monkeypatch)


@pytest.mark.parametrize("what", ["tokenizer", "conditions", "device's drawing", "orphans"])
def test_the_key_of_pictures_holds_all_that_they_depend_on(what, model, tmp_path, monkeypatch):
    drawn(model, tmp_path, monkeypatch)
    vq, prompts = Blocks(), PROMPTS
    if what == "tokenizer":
        vq.register_buffer("codebook", torch.ones(3))
    elif what == "conditions":                   # two classes may have one text
        prompts = argrpo.Prompts(PROMPTS.texts, PROMPTS.cond.flip(0))
    elif what == "orphans":                      # nothing says whose pictures these are
        np.savez(tmp_path / "00002.npz", images=np.zeros((6, 2, 2, 3), np.uint8))
    else:
        monkeypatch.setattr(compare, "DRAWING", "another way")
    with pytest.raises(ValueError, match="name another folder, or remove it"):
        draw_shards(model, vq, prompts, INDEX, tmp_path, 3)


def test_a_users_reward_is_asked_each_time_and_a_built_in_one_once(tmp_path):
    """A file of the user's may read anything, such as weights that are trained meanwhile."""
    np.savez(tmp_path / "00000.npz", images=np.full((2, 4, 4, 3), 255, np.uint8),
             entropy=np.zeros(2, np.float32))
    mine, weight = tmp_path / "mine_scored.py", tmp_path / "weight.txt"
    mine.write_text("from pathlib import Path\n\ndef bright(images, prompts):\n    return "
                    "float(Path(__file__).with_name('weight.txt').read_text()) "
                    "* images.amax((1, 2, 3))")
    spec = f"{mine}:bright,contrast"
    judges = compare.judges_of(reward.build_rewards(spec, "cpu"), spec, None)
    for value in (1.0, 2.0):
        weight.write_text(str(value))
        found = compare.score_shards(tmp_path, ["a", "b"], judges, "cpu")
        assert found["bright"].tolist() == [value] * 2, "the score of another weight was kept"
    (kept,) = json.loads((tmp_path / "00000.json").read_text())
    assert kept.startswith("contrast "), "what is built in is kept, and nothing else"


def test_a_source_is_another_if_a_file_of_the_house_that_it_imports_is(tmp_path, monkeypatch):
    """Wherever in the house the two lie."""
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "harness" / "compare.py"))
    (tmp_path / "rewards").mkdir()
    mine, helper = tmp_path / "rewards" / "mine.py", tmp_path / "a_helper_of_the_house.py"
    mine.write_text("from a_helper_of_the_house import f\n")
    sources = []
    for text in ("f = 1\n", "f = 1      # a comment\n", "f = 2\n"):
        helper.write_text(text)
        sources.append(compare.source(mine))
    assert sources[0] == sources[1] != sources[2]


@pytest.mark.parametrize("name", ["00000.npz", "00000.json"])
def test_a_damaged_file_of_an_evaluation_is_named(name, tmp_path):
    np.savez(tmp_path / "00000.npz", images=np.zeros((2, 4, 4, 3), np.uint8), entropy=np.zeros(2))
    (tmp_path / name).write_bytes(b"")           # as after a power cut
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        compare.score_shards(tmp_path, ["a", "b"], [], "cpu")


def test_labels_are_safe_names(tmp_path, monkeypatch):
    folder = tmp_path / "a@b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("model.pt", "x.pt", "y@2"):
        Path(name).write_text("")
    assert checkpoint("model.pt", 0) == ("a@b", "model.pt", 0)
    assert checkpoint("../a@b/x.pt", 0) == ("x", "../a@b/x.pt", 0)
    assert checkpoint("nowhere@1/x.pt", 0) == ("x", "nowhere@1/x.pt", 0)
    assert checkpoint("..", 0)[0] == tmp_path.name
    assert checkpoint("y@2", 0) == ("y@2", "y@2", 0), "a file, and no seed"
    assert checkpoint("base@01", 0) == ("base@1", "", 1)
    assert checkpoint("some/repo|a\nb", 0)[0] == "repo-a-b"
    with pytest.raises(ValueError, match="names no checkpoint"):
        checkpoint("@1", 0)


def test_a_cell_of_the_table_stays_one():
    settings = evaluate.EvaluateSettings(samples=2)
    rows = {"a|b\nc": [dict(value=1.0, low=1.0, high=1.0)]}
    text = compare.as_markdown(rows, [{}], ["base|x"], settings, 3)
    assert text.splitlines()[2:] == ["| | base\\|x |", "|---|---|", "| a\\|b c | 1 [1, 1] |", ""]


def test_how_much_a_prompts_pictures_differ(tmp_path):
    """Two prompts of two pictures: black and white, and twice the same."""
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[1:] = 255
    np.savez(tmp_path / "00000.npz", images=pictures)

    def mine(images):
        return torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])

    found = compare.distances(tmp_path, 2, {"mine": mine}, "cpu")
    assert found["distance/pixels"].tolist() == [1.0, 0.0], "mean L1 of two pictures"
    assert found["distance/mine"].tolist() == pytest.approx([1.0, 0.0]), "1 minus the cosine"
    alone = compare.distances(tmp_path, 4, {}, "cpu")["distance/pixels"]
    assert alone.isnan().all(), "one picture differs from none"


class OnMeta:
    """A reward whose model is on the device "meta", as others are on a GPU: it takes only what is
    there, too."""

    def __call__(self, images, prompts):
        assert images.device.type == "meta"
        return torch.ones(len(images))

    def right_class(self, images, prompts):
        return {"imagenet/accuracy": self(images, prompts)}

    def features(self, images):
        return self(images, None)[:, None]


def test_pictures_of_files_follow_to_the_models_device(tmp_path, monkeypatch):
    """To a reward, to what measures and to its features, and to torch-fidelity's models."""
    np.savez(tmp_path / "00000.npz", images=np.zeros((4, 8, 8, 3), np.uint8), entropy=np.zeros(4))
    rewards = reward.RewardSet({"imagenet": (OnMeta(), 1.0)})
    monkeypatch.setattr(reward.RewardSet, "__call__",        # it reads the scores, on their device
                        lambda self, *given: (None, {"imagenet": OnMeta()(*given)}))
    monkeypatch.setattr(compare, "small_pixels", OnMeta().features)          # it reads them, too
    monkeypatch.setattr(compare, "source", str)              # all of the house, from this file
    settings = evaluate.EvaluateSettings(preset="B-256", rewards="imagenet", samples=2)
    columns = compare.columns_of(tmp_path, ["a", "b"], [], rewards, settings, torch.device("meta"))
    assert set(columns) == {"imagenet", "imagenet/accuracy", "entropy", "distance/pixels",
                            "distance/imagenet"}
    torch_fidelity = pytest.importorskip("torch_fidelity")
    names = ("frechet_inception_distance", "inception_score_mean", "precision", "recall")
    monkeypatch.setattr(torch_fidelity, "calculate_metrics",
                        lambda **how: dict.fromkeys(names, how["cuda"]))
    for device in ("cuda", "cpu"):
        figures = fidelity.fid_of_real(None, tmp_path, torch.device(device))
        assert set(figures.values()) == {device == "cuda"}, "as --device asks for"


# --- the command -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as AR-GRPO's on Hugging Face, with the toy's transformer, a little changed."""
    folder = tmp_path_factory.mktemp("hub") / "AR-GRPO_TOY"
    folder.mkdir()
    model, vq = toy.load("c2i")
    with torch.no_grad():
        model.output.weight *= 1.5               # surer, and so less varied
    weights = {f"gpt_model.{name}": w.contiguous() for name, w in model.state_dict().items()}
    weights |= {f"vq_model.{name}": w.contiguous() for name, w in vq.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def table(published, tmp_path_factory):
    """Base, base with other random numbers, and the folder: (folder, command line, results)."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    given = ["--gpt-ckpt", "base", "--gpt-ckpt", "base@1", "--gpt-ckpt", str(published),
             "--samples", "12", "--classes", "0,4,8,9,13", "--rewards", "jpeg", "--out", str(out)]
    return out, given, evaluate.main(given)


def test_the_table_of_three_checkpoints(table):
    out, _, results = table
    assert results["checkpoints"] == ["base", "base@1", "AR-GRPO_TOY"]
    metrics = results["metrics"]
    assert {"verified", "jpeg", "entropy", "distance/pixels", "D", "D/sizes"} <= set(metrics)
    names = {row for row in metrics if row.isidentifier()}   # as a function's may be
    assert names - {"jpeg"} <= reward.TAKEN, "a reward of such a name would share that row"
    base, again, surer = metrics["entropy"]
    assert surer["change"]["high"] < 0, "larger logits, less entropy"
    assert again["change"]["low"] < 0 < again["change"]["high"], "two seeds of one model"
    for cells in metrics.values():
        for cell in cells:
            assert cell["low"] <= cell["value"] + 1e-9 and cell["value"] <= cell["high"] + 1e-9
    assert metrics["D"][0]["value"] == pytest.approx(1) and metrics["D"][1]["value"] != 1
    text = (out / "results.md").read_text()
    assert "| | base | base@1 | AR-GRPO_TOY |\n" in text
    assert "no difference beyond noise" in text
    grid = Image.open(out / "grid.png")          # five prompts, four pictures of three checkpoints
    assert grid.height > 5 * 72 and grid.width > 3 * 4 * 72


def test_the_numbers_are_those_of_the_pictures(table):
    out, _, results = table
    images = compare.as_images(read_shards(out / "base"))
    texts = [toy.CLASSES[k] for k in (0, 4, 8, 9, 13) for _ in range(12)]
    assert results["metrics"]["verified"][0]["value"] == pytest.approx(
        toy.verify(images, texts).mean().item(), abs=1e-6)


def test_once_more_draws_and_scores_nothing(table, monkeypatch):
    _, given, results = table
    monkeypatch.setattr(compare, "draw", None)
    monkeypatch.setattr(fidelity, "figures_of", lambda *given: {})       # made anew each time
    monkeypatch.setattr(toy.verifier, "verify", None)
    monkeypatch.setattr(evaluate.reward.RewardSet, "__call__", None)
    assert evaluate.main(given)["metrics"] == results["metrics"]


def test_fid_of_the_toys_features(table):
    pytest.importorskip("torch_fidelity")
    figures = table[2]["pictures"]
    assert all(0 < figure["FID (toy's features)"] < 100 for figure in figures)
    assert all(0 <= figure["recall (toy's)"] <= 1 for figure in figures)


def test_fid_is_zero_between_equal_pictures_and_grows_with_noise():
    pytest.importorskip("torch_fidelity")
    texts = toy.CLASSES * 4
    scenes = scenes_of(texts)                    # the very scenes of the reference
    exact = fid_of_toy(scenes, texts)["FID (toy's features)"]
    noisy = np.random.default_rng(0).integers(-40, 40, scenes.shape) + scenes
    spoilt = fid_of_toy(noisy.clip(0, 255).astype(np.uint8), texts)["FID (toy's features)"]
    assert abs(exact) < 1e-3 and spoilt > 0.05


def test_one_class_in_the_place_of_all_is_precise_and_recalls_little():
    """Precision is the share of drawn pictures among the real ones, recall that of real ones among
    the drawn."""
    pytest.importorskip("torch_fidelity")
    texts = toy.CLASSES * 4
    figures = fid_of_toy(scenes_of(["one red circle"] * len(texts), seed=1), texts)
    assert figures["precision (toy's)"] > 0.9 and figures["recall (toy's)"] < 0.5


def test_the_grid_shows_each_prompts_own_pictures(tmp_path):
    """Picture number i is grey of the value i: of three prompts 4 each."""
    pictures = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(72, 1).repeat(72, 2)
    np.savez(tmp_path / "00000.npz", images=pictures.repeat(3, 3))
    compare.draw_grid(tmp_path / "grid.png", [tmp_path], ["a", "b", "c"], 4, ["one"], each=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    whole = [value for value in range(12) if (grid == value).all(axis=2).sum() >= 72 * 72]
    assert whole == [0, 1, 4, 5, 8, 9], "the first two of each prompt"


def test_real_fid_reads_the_shards_one_by_one(tmp_path, monkeypatch):
    """As many pictures as there are, in their order, at most 256 pixels wide."""
    monkeypatch.setattr(fidelity, "SHARD", 3)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    for k, some in enumerate((pictures[:3], pictures[3:])):
        np.savez(tmp_path / f"{k:05}.npz", images=some)
    found = Shards(tmp_path, 5)
    assert len(found) == 5
    for i, picture in enumerate(pictures):
        assert (found[i].permute(1, 2, 0).numpy() == picture).all()
    np.savez(tmp_path / "00000.npz", images=np.zeros((3, 384, 384, 3), np.uint8))
    assert Shards(tmp_path, 5)[1].shape == (3, 256, 256)


def test_fid_is_that_of_all_pictures(tmp_path, monkeypatch):
    """Two prompts, three pictures of each."""
    monkeypatch.setattr(fidelity, "fid_of_real", lambda pictures, *given: {"FID": len(pictures)})
    settings = evaluate.EvaluateSettings(samples=3, reference="real")
    assert fidelity.figures_of(tmp_path, ["a", "b"], settings, None) == {"FID": 6}


def test_missing_models_of_fid_are_missed_before_drawing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3

    def offline(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--gpt-ckpt", "base", "--reference", "real.npz"])
    message = "--reference cannot download the model inception-v3-compat (<urlopen error no net"
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


def test_the_toys_captions_ask_for_every_relation_alike():
    """They stand in a list where four relations take turns, so that a bad stride misses some."""
    texts, _ = evaluate.choose_texts(evaluate.EvaluateSettings(task="t2i"))
    asked = [sum(f" {place} " in text for text in texts) for place in toy.scenes.PLACES]
    assert min(asked) > 10 and max(asked) - min(asked) <= 1
    assert sum(text in toy.UNSEEN_PAIRS for text in texts) >= 5


def test_genevals_metadata_gives_captions_and_categories(tmp_path):
    lines = [dict(tag="counting", prompt="a photo of two cows", include=[]),
             dict(tag="colors", prompt="a photo of a red bus", include=[])]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = evaluate.EvaluateSettings(preset="t2i-XL-256", task="t2i", prompts=str(path))
    texts, tags = evaluate.choose_texts(settings)
    assert texts == ["a photo of two cows", "a photo of a red bus"]
    assert tags == ["counting", "colors"]
    path.write_text(path.read_text() + json.dumps(dict(prompt="a photo of a cat")) + "\n")
    with pytest.raises(ValueError, match="has 2 tags for 3 different prompts"):
        evaluate.choose_texts(settings)


def test_a_prompt_of_two_categories_is_no_replacement_for_one_without(tmp_path):
    path = tmp_path / "metadata.jsonl"
    lines = [dict(tag="colors", prompt="a bus"), dict(tag="counting", prompt="a bus"),
             dict(prompt="a cat")]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="has 2 tags for 2 different prompts"):
        evaluate.choose_texts(evaluate.EvaluateSettings(preset="t2i-XL-256", prompts=str(path)))


def test_prompts_alike_but_for_case_are_one(tmp_path):
    """A TV remote is a tv remote; but one prompt cannot count in two categories."""
    path = tmp_path / "metadata.jsonl"
    lines = [dict(tag="colors", prompt=f"a photo of a red {name}")
             for name in ("TV remote", "bus", "tv remote")]
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = evaluate.EvaluateSettings(preset="t2i-XL-256", prompts=str(path))
    texts, tags = evaluate.choose_texts(settings)
    assert texts == ["a photo of a red tv remote", "a photo of a red bus"]
    assert tags == ["colors", "colors"]
    path.write_text(path.read_text().replace('"colors"', '"counting"', 1))
    with pytest.raises(ValueError, match="has 3 tags for 2 different prompts"):
        evaluate.choose_texts(settings)


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(table, tmp_path):
    out, given, results = table
    given = [*given[:-1], str(tmp_path / "two")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(Path(evaluate.__file__)), *given]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1, "one process speaks"
    for name in results["checkpoints"]:
        assert (read_shards(tmp_path / "two" / name) == read_shards(out / name)).all()


@pytest.mark.parametrize("given, message", [
    (["--gpt-ckpt", "base", "--gpt-ckpt", "base"], "two checkpoints would be called 'base'"),
    (["--gpt-ckpt", "base@x"], "base@x: no such file or folder in"),
    (["--gpt-ckpt", "nowhere.pt"], "nowhere.pt"),
    pytest.param(["--gpt-ckpt", "base", "--reference", "nowhere"],
                 "--reference: cannot read the pictures of nowhere", marks=pytest.mark.skipif(
                     find_spec("torch_fidelity") is None, reason="needs torch-fidelity")),
    (["--gpt-ckpt", "base", "--preset", "t2i-XL-256"], "choose them with --prompts FILE"),
    (["--gpt-ckpt", "base", "--preset", "B-256", "--prompts", "a.txt"], "preset B-256 is for c2i"),
    (["--gpt-ckpt", "base", "--task", "t3i"], "--task must be c2i or t2i, not 't3i'"),
    (["--gpt-ckpt", "base", "--preset", "M-256"], "unknown preset 'M-256'"),
    (["--gpt-ckpt", "base", "--rewards", "beauty"], "unknown reward 'beauty'"),
    (["--gpt-ckpt", "base", "--temperature", "nan"], "a policy needs finite cfg_scale"),
    (["--gpt-ckpt", "base", "--cfg-scale", "nan"], "a policy needs finite cfg_scale"),
    (["--gpt-ckpt", "base", "--top-p", "0"], "a policy needs finite cfg_scale"),
    (["--gpt-ckpt", "base", "--samples", "-1"], "--samples must be at least 0, not -1"),
    (["--gpt-ckpt", "base", "--out", ""], "--out is empty"),
    (["--gpt-ckpt", "base", "--out", str(Path(__file__) / "x")], "cannot write into"),
    (["--gpt-ckpt", ""], "--gpt-ckpt is empty"),
    (["--gpt-ckpt", "base", "--reference", str(Path(__file__).parent)], "--reference"),
    (["--gpt-ckpt", "base", "--reference", __file__], "--reference"),
])
def test_bad_options_are_one_line(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_models", None if "nowhere.pt" in given else
                        evaluate.load_models)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_that_is_missing_is_missed_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    """A later checkpoint, a later prompt that a reward cannot judge."""
    monkeypatch.chdir(tmp_path)
    Path("w.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
                            "def refuse(prompts):\n    if 'two red circles' in prompts:\n"
                            "        raise ValueError('no pairs')\nf.check_prompts = refuse\n")
    monkeypatch.setattr(compare, "draw_shards", None)
    two = toy.CLASSES.index("two red circles")
    for given, message in (
            (["--gpt-ckpt", "base", "--gpt-ckpt", "nowhere.pt"], "nowhere.pt: no such file"),
            (["--rewards", "w.py:f", "--classes", f"0,{two}"], "cannot judge 1 of 2 prompts")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(given)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_picture_is_right_for_geneval_only_if_it_meets_all_its_demands(tmp_path):
    """The reward is the share of a caption's demands that are met, and a half is not right."""
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "00000.npz", images=pictures, entropy=np.zeros(4, np.float32))
    met = reward.RewardSet({"geneval": (lambda *_: torch.tensor([1.0, 0.5, 0.5, 0.5]), 1.0)})
    settings = evaluate.EvaluateSettings(preset="t2i-XL-256", task="t2i", rewards="geneval",
                                         samples=2)
    texts, tags = ["a photo of two dogs", "a photo of a red bus"], ["counting", "colors"]
    columns = compare.columns_of(tmp_path, texts, tags, met, settings, "cpu")
    assert columns["geneval"].tolist() == [0.75, 0.5], "the reward itself is a mean of shares"
    assert columns["geneval pictures"].tolist() == [0.5, 0.0], "half of the demands is not right"
    assert columns["geneval prompts"].tolist() == [1.0, 0.0], "one right picture of the first"


def test_each_of_two_processes_draws_every_second_file(model, tmp_path, monkeypatch):
    drawn(model, tmp_path, monkeypatch, parts=((1, 2),))
    names = [path.name for path in shards(tmp_path)]
    assert names == ["00001.npz", "00003.npz"], "process 1 of 2 draws its share alone"


@pytest.mark.parametrize("what, change", [("seed", dict(seed=4)), ("size", dict(size=1)),
                                          ("temperature", dict(temperature=0.5))])
def test_pictures_of_other_settings_are_not_mixed_in(what, change, model, tmp_path, monkeypatch):
    drawn(model, tmp_path, monkeypatch, temperature=1.0)
    how = dict(seed=3, temperature=1.0) | change
    with pytest.raises(ValueError, match=f"holds pictures of another .*{what}"):
        draw_shards(model, Blocks(), PROMPTS, INDEX, tmp_path, **how)


def test_each_picture_is_scored_with_its_own_text_and_again_when_it_changes(tmp_path, monkeypatch):
    """Five pictures in two files; the judge reads the text."""
    monkeypatch.setattr(compare, "SHARD", 3)
    texts, said = ["1", "2", "3", "4", "5"], []

    def judge(images, texts):
        said.append(texts)
        return {"text": torch.tensor([float(text) for text in texts]),
                "light": images.mean(dim=(1, 2, 3))}

    def scores(brightness):
        for k, count in enumerate((3, 2)):
            np.savez(tmp_path / f"{k:05}.npz", entropy=np.zeros(count, np.float32),
                     images=np.full((count, 2, 2, 3), 255 * brightness, np.uint8))
        return compare.score_shards(tmp_path, texts, [("judge", judge)], "cpu")
    found = scores(0)
    assert found["text"].tolist() == [1, 2, 3, 4, 5], "the second file's pictures have later texts"
    assert said == [texts[:3], texts[3:]], "each picture comes with the text it was drawn for"
    assert scores(0)["light"].tolist() == [0] * 5 and len(said) == 2, "the same is not scored again"
    assert scores(1)["light"].tolist() == [1] * 5, "other pictures, and the old scores"
