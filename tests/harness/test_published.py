"""LlamaGen at full size with random weights: on the meta device, and (slow) on the CPU."""

import dataclasses
import json

import numpy as np
import open_clip
import pytest
import torch
from conftest import Blocks, tiny_model, weights

import argrpo
import evaluate
import pretrained
import sample
import toy
import train_c2i
import train_t2i
from harness import device
from harness.compare import reduced
from harness.device import choose_sizes, out_of_memory_advice
from harness.options import resumed
from harness.run import configuration
from rewards import clip
from vqgan import VQConfig, VQModel


@pytest.mark.parametrize("preset", pretrained.MODELS)
def test_every_published_model_runs_forward(preset):
    """Two layers of it: the others are alike."""
    config = dataclasses.replace(pretrained.gpt_config(preset), n_layer=2)
    with torch.device("meta"):
        model = argrpo.Transformer(config)
    tokens = torch.zeros(2, config.block_size, dtype=torch.long, device="meta")
    cond, mask = torch.zeros(2, dtype=torch.long, device="meta"), None
    if config.model_type == "t2i":
        cond = torch.zeros(2, 120, 2048, device="meta")
        mask = torch.ones(2, 120, dtype=torch.bool, device="meta")
    logp, entropy = argrpo.token_logp(model, tokens, cond, mask, cfg_scale=2.0)
    assert logp.shape == entropy.shape == (2, config.block_size)


@pytest.mark.parametrize("preset, millions, heads", [
    ("B-256", 111, 12), ("L-384", 343, 16), ("XL-384", 775, 20), ("XXL-384", 1400, 24),
    ("3B-384", 3100, 32)])
def test_sizes_are_the_published_ones(preset, millions, heads):
    with torch.device("meta"):
        model = argrpo.Transformer(pretrained.gpt_config(preset))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert model.config.n_head == heads, "no weight's shape tells how many heads there are"


def published_presets(script, settings, task):
    """The settings of a script's presets but the toy's, which must be all published models."""
    names = set(script.PRESETS) - {"toy"}
    assert names == {name for name, model in pretrained.MODELS.items() if model.task == task}
    return [settings(**script.PRESETS[name]) for name in names]


def test_every_t2i_model_has_a_preset_with_the_papers_settings():
    for s in published_presets(train_t2i, train_t2i.T2iSettings, "t2i"):
        assert (s.group_size, s.cfg_scale, s.kl_beta, s.lr, s.steps) == (8, 4.0, 1.0, 1e-5, 600)
        assert s.prompts_per_step * s.group_size == 64 and s.other_cfg_scales() == [1.0, 7.5]


def test_every_c2i_model_has_a_preset_with_the_papers_settings():
    for s in published_presets(train_c2i, train_c2i.C2iSettings, "c2i"):
        assert (s.group_size, s.cfg_scale, s.kl_beta, s.lr, s.steps) == (8, 2.0, 0.1, 1e-5, 400)


def refusing(most_drawn, most_learned):
    """A model for a GPU whose memory holds so many rows of a rollout, and of an update."""
    torch.manual_seed(0)
    model, vq = tiny_model(block_size=4, n_layer=1), Blocks()

    class Refusing(type(model)):
        def prefill(self, cond, cond_mask=None, copies=1):
            refuse(len(cond) * copies, most_drawn)
            return super().prefill(cond, cond_mask, copies)

        def forward(self, tokens, cond, cond_mask=None):
            refuse(len(tokens) if torch.is_grad_enabled() else 0, most_learned)
            return super().forward(tokens, cond, cond_mask)

    model.__class__ = Refusing
    return model, vq


def refuse(rows, most):
    if rows > most:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows} rows")


def sizes_of(monkeypatch, most_drawn, most_learned, **changes):
    """The prompts of a pass and the micro-batch that a GPU chooses, or the CPU taken for one."""
    model, vq = refusing(most_drawn, most_learned)
    before = weights(model).clone()
    settings = train_c2i.C2iSettings(**dict(
        prompts_per_step=6, group_size=2, rollout_prompts=None, micro_batch=None) | changes)
    prompts = argrpo.Prompts(["a", "b", "c"], torch.arange(3))
    monkeypatch.setattr(device, "on_gpu", lambda model: True)
    monkeypatch.setattr(device.gc, "collect", lambda: 0)         # slow among so many objects
    choose_sizes(model, vq, prompts, settings)
    assert torch.equal(weights(model), before) and all(p.grad is None for p in model.parameters())
    return settings.rollout_prompts, settings.micro_batch


@pytest.mark.parametrize("drawn, learned, chosen", [
    (99, 99, (6, 16)), (12, 12, (6, 16)), (11, 99, (3, 16)), (4, 7, (2, 4)), (2, 1, (1, 1))])
def test_what_runs_out_of_memory_is_halved(drawn, learned, chosen, monkeypatch):
    """6 prompts x 2 images are 12 rows of a rollout, and at most 12 of a micro-batch of 16."""
    assert sizes_of(monkeypatch, drawn, learned) == chosen


def test_what_is_given_is_not_chosen(monkeypatch):
    assert sizes_of(monkeypatch, 99, 3, rollout_prompts=0) == (0, 2)
    assert sizes_of(monkeypatch, 3, 99, micro_batch=5) == (1, 5)
    assert sizes_of(monkeypatch, 0, 0, micro_batch=5, rollout_prompts=4) == (4, 5)   # no trial
    with pytest.raises(torch.OutOfMemoryError, match="allocate 5 rows"):
        sizes_of(monkeypatch, 99, 4, micro_batch=5)
    with pytest.raises(torch.OutOfMemoryError, match="allocate 2 rows"):
        sizes_of(monkeypatch, 1, 99)


def test_guidance_doubles_the_rows(monkeypatch):
    assert sizes_of(monkeypatch, 23, 8, cfg_scale=2.0) == (3, 4)
    assert sizes_of(monkeypatch, 23, 8, cfg_scale=2.0, logprob_cfg="none") == (3, 8)


def test_all_processes_take_the_smallest_sizes(monkeypatch):
    """Of two processes, 6 prompts are 3 each; the other one finds 2 prompts, or 4 images."""
    monkeypatch.setattr(device, "rank_and_size", lambda: (0, 2))
    others = iter([2, 4])
    monkeypatch.setattr(device, "gather", lambda mine: [mine, next(others)])
    assert sizes_of(monkeypatch, 6, 99) == (2, 4)


def test_other_errors_of_a_trial_are_no_lack_of_memory(monkeypatch):
    monkeypatch.setitem(globals(), "refuse", lambda rows, most: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="size"):
        sizes_of(monkeypatch, 99, 99)


def test_a_cpu_draws_all_prompts_at_once_and_learns_from_a_thousand_tokens():
    """Without a trial: these models are on the meta device, which is taken for a CPU here."""
    for preset, micro_batch in (("B-256", 4), ("XL-384", 1)):
        with torch.device("meta"):
            model = argrpo.Transformer(pretrained.gpt_config(preset))
        settings = train_c2i.C2iSettings(**train_c2i.PRESETS[preset])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "on_gpu", lambda model: False)
            choose_sizes(model, None, None, settings)
        assert (settings.rollout_prompts, settings.micro_batch) == (4, micro_batch)


def test_a_resumed_run_keeps_the_chosen_prompts_of_a_pass(tmp_path, monkeypatch):
    """What is drawn depends on them, whatever memory is free now."""
    settings = train_c2i.C2iSettings(rollout_prompts=None, out=str(tmp_path))
    for chosen in (2, 5):                                # the second time another would fit
        monkeypatch.setattr(device, "gather", lambda mine, n=chosen: [n])
        choose_sizes(*toy.load("c2i"), None, settings)
        config = configuration(settings)
        (tmp_path / "config.json").write_text(json.dumps(config))
        settings = resumed(train_c2i.C2iSettings, {"resume": str(tmp_path)})
        assert settings.rollout_prompts == 2
    with pytest.raises(ValueError, match="rollout_prompts was 2 and cannot become 1"):
        resumed(train_c2i.C2iSettings, {"resume": str(tmp_path), "rollout_prompts": 1})


def test_running_out_of_gpu_memory_says_what_to_lower():
    with pytest.raises(SystemExit, match=r"lower --micro-batch \(now 3"):
        with out_of_memory_advice(train_c2i.C2iSettings(micro_batch=3)):
            raise RuntimeError("MPS backend out of memory (MPS allocated: 20 GiB)")
    with pytest.raises(RuntimeError, match="another"), out_of_memory_advice(None):
        raise RuntimeError("another error")


def test_sample_draws_a_grid_and_an_npz(tmp_path, capsys):
    grid = tmp_path / "grid.png"
    sample.main(["--classes", "one red circle,26", "--samples", "3", "--out", str(grid)])
    assert "one red circle, three blue triangles" in capsys.readouterr().out
    assert grid.stat().st_size > 0
    for name in "ab":
        sample.main(["--npz", str(tmp_path / f"{name}.npz"), "--images", "12", "--cfg-scale", "2",
                     "--top-k", "50"])
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert a.shape == (12, 24, 24, 3) and a.dtype == np.uint8 and (a == b).all() and a.std() > 0


def test_sample_draws_captions(tmp_path, capsys):
    sample.main(["--caption", "a  Blue triangle above a green square", "--samples", "2",
                 "--best-of", "3", "--out", str(tmp_path / "one.png")])
    assert "a row each of a blue triangle above a green square" in capsys.readouterr().out
    (tmp_path / "captions.txt").write_text("two red circles\none blue square\n")
    sample.main(["--prompts", str(tmp_path / "captions.txt"), "--npz", str(tmp_path / "a.npz"),
                 "--images", "6"])
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (6, 24, 24, 3)


def test_large_pictures_are_resized_to_256():
    assert reduced(torch.rand(2, 3, 384, 384), 256).shape == (2, 3, 256, 256)
    edge = torch.arange(384).gt(190).float().expand(1, 3, 384, 384)
    assert 0 <= reduced(edge, 256).min() and reduced(edge, 256).max() <= 1, "bicubic overshoots"
    white = torch.ones(1, 3, 256, 256)
    assert reduced(white, 256) is white


@pytest.mark.parametrize("options, message", [
    (["--preset", "t2i-XL-256"], "preset t2i-XL-256 is for t2i: t2i presets draw captions"),
    (["--preset", "B-256", "--caption", "a dog"], "preset B-256 is for c2i"),
    (["--preset", "XL-256"], "unknown preset 'XL-256': there are toy, B-256"),
    (["--caption", "two pink circles"], "the toy cannot draw or verify 'two pink circles'"),
    (["--classes", "unicorn"], "no class is named 'unicorn'"),
    (["--gpt-ckpt", "nowhere.pt"], "nowhere.pt"),
    (["--best-of", "0"], "--best-of must be at least 1, not 0"),
    (["--caption", "&nbsp;"], "--caption '&nbsp;' is empty"),
    (["--samples", "0"], "--samples must be at least 1, not 0"),
    (["--rows", "0"], "--rows must be at least 1, not 0"),
    (["--npz", "a.npz", "--images", "0"], "--images must be at least 1, not 0"),
    (["--cfg-scale", "nan"], "a policy needs finite cfg_scale"),
    (["--temperature", "nan"], "a policy needs finite cfg_scale"),
    (["--top-k", "-1"], "a policy needs finite cfg_scale"),
    (["--npz", "samples"], "its name must end with .npz"),
    (["--out", "samples"], "its name must end as a picture's"),
    (["--out", "samples.psd"], "its name must end as a picture's"),      # Pillow can read it
    (["--out", ""], "--out is empty"),
    (["--npz", ""], "--npz is empty"),
    (["--out", __file__ + "/x.png"], "cannot write into"),
])
def test_sample_explains_bad_options(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def random_tower(name, device):
    """A full-size ViT-B/32 with random weights in the place of any tower."""
    name = "ViT-B-32-quickgelu"
    return clip.tower_of(open_clip.create_model(name, load_weights=False), name, device)


@pytest.mark.slow
def test_gpt_b_256_at_full_size(tmp_path, capsys, monkeypatch):
    """The whole way of a published model: load, sample 8 images with guidance, score them with the
    default reward, one GRPO step, export, load again."""
    for module in ("rewards.quality", "rewards.clip"):
        monkeypatch.setattr(f"{module}.open_clip_tower", random_tower)
    gpt, vq = argrpo.Transformer(pretrained.gpt_config("B-256")), VQModel(VQConfig())
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    torch.save({"model": gpt.half().state_dict(), "steps": 1}, tmp_path / "gpt.pt")
    torch.save({"model": vq.half().state_dict()}, tmp_path / "vq.pt")
    out = tmp_path / "run"
    train_c2i.main([
        "--preset", "B-256", "--device", "cpu", "--gpt-ckpt", str(tmp_path / "gpt.pt"),
        "--vq-ckpt", str(tmp_path / "vq.pt"), "--classes", "207", "--steps", "1",
        "--prompts-per-step", "1", "--micro-batch", "4", "--warmup-steps", "1",
        "--eval-images", "4", "--out", str(out)])
    sizes = "110.9M parameters, 256 tokens per image, 1 prompts x 8 samples = 8 images"
    assert sizes in capsys.readouterr().out
    metrics = json.loads((out / "metrics.jsonl").read_text())
    assert metrics["ratio_max"] == 1 and metrics["grad_norm"] > 0 and metrics["mismatch"] < 1e-3
    rewards = {"clip", "clip_bin", "hpsv2", "hpsv2_bin", "clip_iqa"}
    assert {f"reward/{name}" for name in rewards} <= set(metrics)
    trained = pretrained.load_gpt("B-256", str(out / "model.pt"))
    pairs = zip(trained.parameters(), gpt.float().parameters())
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("given, labels", [
    (["--classes", "0,5", "--samples", "2"], [0, 0, 5, 5]),
    (["--rows", "3", "--samples", "1"], [0, 13, 26]),
    (["--classes", "0,5", "--npz", "a.npz", "--images", "3"], [0, 5, 0])],
    ids=["grid", "rows", "npz"])
def test_sample_draws_the_classes_asked_for_and_best_of_candidates_of_each(
        given, labels, tmp_path, monkeypatch, spy):
    """A grid has rows of one class, evenly chosen; an .npz has all classes in turn.  Of three
    candidates one is kept: see test_the_likeliest_of_several_is_kept."""
    monkeypatch.chdir(tmp_path)
    drawn = spy(argrpo, "generate")
    sample.main(["--best-of", "3", *given])
    conditions = torch.cat([args[1] for args, _ in drawn.calls]).tolist()
    assert len(conditions) == 3 * len(labels), "--best-of 3 draws three candidates a picture"
    assert conditions == [label for label in labels for _ in range(3)], "of these classes, in order"


def test_pictures_for_fid_have_256_pixels_at_most(tmp_path, spy):
    drawn = spy(sample.compare, "draw_shards")
    sample.main(["--npz", str(tmp_path / "a.npz"), "--images", "2"])
    assert drawn.calls[0][1]["size"] == 256, "ADM's evaluator wants 256 x 256"


@pytest.mark.parametrize("settings", [sample.SampleSettings, evaluate.EvaluateSettings])
def test_what_draws_is_the_policy_that_the_options_ask_for(settings):
    asked = dict(cfg_scale=3.0, temperature=0.7, top_k=5, top_p=0.9)
    got = settings(**asked).policy()
    assert {name: got.get(name) for name in asked} == asked, "generate gets each of the options"
