"""LlamaGen at full size with random weights: on the meta device, and (slow) on the CPU."""

import dataclasses
import json

import numpy as np
import open_clip
import pytest
import torch

import argrpo
import evaluate
import pretrained
import sample
import toy
import train_c2i
import train_t2i
from harness import device
from harness.compare import reduced
from harness.device import (
    choose_sizes,
    first_that_fits,
    memory_estimate,
    out_of_memory_advice,
)
from harness.options import resumed
from harness.run import configuration
from rewards import clip
from vqgan import VQConfig, VQModel


@pytest.mark.parametrize("preset", pretrained.MODELS)
def test_every_published_model_runs_forward(preset):
    config = pretrained.gpt_config(preset)
    model = pretrained.without_memory(lambda: argrpo.Transformer(config))
    tokens = torch.zeros(2, config.block_size, dtype=torch.long, device="meta")
    cond, mask = torch.zeros(2, dtype=torch.long, device="meta"), None
    if config.model_type == "t2i":
        cond = torch.zeros(2, 120, 2048, device="meta")
        mask = torch.ones(2, 120, dtype=torch.bool, device="meta")
    logp, entropy = argrpo.token_logp(model, tokens, cond, mask, cfg_scale=2.0)
    assert logp.shape == entropy.shape == (2, config.block_size)


@pytest.mark.parametrize("preset, millions", [
    ("B-256", 111), ("L-384", 343), ("XL-384", 775), ("XXL-384", 1400), ("3B-384", 3100)])
def test_sizes_are_the_published_ones(preset, millions):
    model = pretrained.without_memory(lambda: argrpo.Transformer(pretrained.gpt_config(preset)))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


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


def test_the_memory_estimate_by_hand():
    """GPT-B: 111M parameters, each 4 bytes of weight, 4 of gradient, 8 of AdamW, 4 of reference."""
    model, vq, settings = without_memory("B-256", micro_batch=1)
    parts = memory_estimate(model, vq, settings)
    parameters = sum(p.numel() for p in model.parameters())
    fixed = ("weights", "gradients", "optimizer", "reference")
    assert sum(parts[name] for name in fixed) == 20 * parameters
    # 4 prompts x 8 samples x 2 branches, 256 positions, keys and values, 12 layers, 768 channels,
    # float32 on this device.
    assert parts["KV cache, 64 rows"] == 64 * 256 * 2 * 12 * 768 * 4
    # 4 images x 2 branches, 256 positions, 768 channels, 100 bytes in each of 12 layers, and 24
    # bytes for each of 16384 logits.
    more = memory_estimate(model, vq, dataclasses.replace(settings, micro_batch=4))
    assert more["activations, 8 rows"] == 8 * 256 * (768 * 100 * 12 + 24 * 16384)
    assert "KV cache, 64 rows" not in more
    there = ("weights", "tokenizer", "activations, 8 rows")
    rest = sum(size for name, size in more.items() if name not in there)
    sizes = [dict(micro_batch=size) for size in (16, 8, 4, 2, 1)]
    for size in (4, 8, 16):                                      # that much fits, and no more
        free = (rest + 2 * size * 256 * (768 * 1200 + 24 * 16384)) / 0.8
        assert first_that_fits(model, vq, settings, sizes, 1.01 * free)["micro_batch"] == size
    assert first_that_fits(model, vq, settings, sizes, free=0) == {"micro_batch": 1}
    large = dataclasses.replace(settings, micro_batch=64, checkpointing=True)
    saving = memory_estimate(model, vq, large)
    assert saving["activations, 128 rows"] < 16 * 0.4 * more["activations, 8 rows"]


def without_memory(preset, **changes):
    """Model, tokenizer and settings of a published c2i preset, on the meta device."""
    with torch.device("meta"):
        model, vq = argrpo.Transformer(pretrained.gpt_config(preset)), VQModel(VQConfig())
    return model, vq, train_c2i.C2iSettings(**train_c2i.PRESETS[preset] | changes)


def test_the_prompts_of_a_rollouts_pass_by_hand():
    """GPT-XL at 384: a prompt is 8 images x 2 branches of 576 positions, with a key and a value of
    1280 channels in 36 layers.  Half of the step's 4 prompts fit where three do not: passes are
    equal."""
    model, vq, settings = without_memory("XL-384", checkpointing=True)
    prompt = 16 * 576 * 2 * 36 * 1280 * 4                        # bytes, float32 on this device
    alone = dataclasses.replace(settings, micro_batch=1, rollout_prompts=1)
    parts = memory_estimate(model, vq, alone)
    assert parts["KV cache, 16 rows"] == prompt
    there = ("weights", "tokenizer", "KV cache, 16 rows")
    rest = sum(size for name, size in parts.items() if name not in there)
    sizes = [dict(rollout_prompts=prompts, micro_batch=1) for prompts in (4, 2, 2, 1)]
    for fit, chosen in ((4, 4), (3, 2), (2, 2), (1, 1), (0, 1)):
        free = (rest + fit * prompt) / 0.8
        found = first_that_fits(model, vq, settings, sizes, 1.001 * free)
        assert found["rollout_prompts"] == chosen
    for name, chosen in (("B-256", 4), ("L-384", 2), ("XL-384", 1), ("3B-384", 1)):
        model, vq, settings = without_memory(name)
        choose_sizes(model, vq, settings)                        # on a CPU
        assert settings.rollout_prompts == chosen


def test_open_sizes_follow_from_the_free_memory_of_all_processes(monkeypatch):
    """A GPU that is faked; the other process would take 3 prompts and 2 images at a time."""
    model, vq, settings = without_memory("B-256")
    monkeypatch.setattr(device, "on_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    free = 2 ** 40
    choose_sizes(model, vq, settings)
    assert (settings.rollout_prompts, settings.micro_batch) == (4, 16)
    settings.rollout_prompts = settings.micro_batch = None
    others = iter([3, 2])
    monkeypatch.setattr(device, "gather", lambda mine: [mine, next(others)])
    choose_sizes(model, vq, settings)
    assert (settings.rollout_prompts, settings.micro_batch) == (3, 2)
    free = 0                                             # what is given is not chosen anew
    choose_sizes(model, vq, settings)
    assert (settings.rollout_prompts, settings.micro_batch) == (3, 2)


def test_a_resumed_run_keeps_the_chosen_prompts_of_a_pass(tmp_path, monkeypatch):
    """What is drawn depends on them, whatever memory is free now."""
    settings = train_c2i.C2iSettings(rollout_prompts=None, out=str(tmp_path))
    for chosen in (2, 5):                                # the second time another would fit
        monkeypatch.setattr(device, "first_that_fits",
                            lambda *given, n=chosen: {"rollout_prompts": n})
        choose_sizes(*toy.load("c2i"), settings)
        config = configuration(settings)
        (tmp_path / "config.json").write_text(json.dumps(config))
        settings = resumed(train_c2i.C2iSettings, {"resume": str(tmp_path)})
        assert settings.rollout_prompts == 2
    with pytest.raises(ValueError, match="rollout_prompts was 2 and cannot become 1"):
        resumed(train_c2i.C2iSettings, {"resume": str(tmp_path), "rollout_prompts": 1})


def test_running_out_of_gpu_memory_says_what_to_lower():
    with pytest.raises(SystemExit, match=r"lower --micro-batch \(now 3"):
        with out_of_memory_advice(train_c2i.C2iSettings(micro_batch=3)):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_sample_draws_a_grid_and_an_npz(tmp_path, capsys):
    grid = tmp_path / "grid.png"
    sample.main(["--classes", "one red circle,26", "--samples", "3", "--out", str(grid)])
    assert "one red circle, three blue triangles" in capsys.readouterr().out
    assert grid.stat().st_size > 0
    for name in "ab":
        sample.main(["--npz", str(tmp_path / f"{name}.npz"), "--images", "40", "--cfg-scale", "2",
                     "--top-k", "50"])
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert a.shape == (40, 24, 24, 3) and a.dtype == np.uint8 and (a == b).all() and a.std() > 0


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
    (["--preset", "t2i-XL-256"],
     "preset t2i-XL-256 draws captions: give it --caption TEXT or --prompts FILE"),
    (["--preset", "B-256", "--caption", "a dog"], "preset B-256 draws classes"),
    (["--preset", "XL-256"], "unknown preset 'XL-256': there are toy, B-256"),
    (["--caption", "two pink circles"], "the toy cannot draw or verify 'two pink circles'"),
    (["--classes", "unicorn"], "no class is named 'unicorn'"),
    (["--gpt-ckpt", "nowhere.pt"], "nowhere.pt"),
    (["--fid-reference", "nowhere"], "--fid-reference needs --npz"),
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
    (["--out", ""], "--out is empty"),
    (["--npz", ""], "--npz is empty"),
    (["--out", __file__ + "/x.png"], "cannot write into"),
    (["--npz", "a.npz", "--fid-reference", __file__], "--fid-reference"),
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
    monkeypatch.setattr(clip, "open_clip_tower", random_tower)
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
