"""A step, an evaluation and the self-test on a GPU that is not there, and in the GPU's bfloat16.

The fake GPU's tensors have shapes, types and devices, but no numbers: what mixes devices fails on
it as on a GPU.  There is no backward pass, for autograd wants a driver."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import Blocks, brightness, tiny_condition, tiny_model, tiny_vq
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import argrpo
import train_c2i
from harness import device, run, selftest
from harness.before_after import Watched, evaluate_all

pytestmark = [
    pytest.mark.skipif(not hasattr(torch, "accelerator"),
                       reason="torch before 2.6 asks a fake GPU for its driver"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]
BOTH = pytest.mark.parametrize("model_type", [
    "c2i", pytest.param("t2i", marks=pytest.mark.slow)])
GPU = torch.device("cuda", 0)
QUICK = ["--preset", "toy", "--steps", "2", "--prompts-per-step", "2", "--group-size", "4",
         "--eval-images", "8", "--cfg-scale", "2", "--micro-batch", "3", "--checkpointing",
         "--progress-every", "0"]


class Answers(TorchDispatchMode):
    """What is asked of a fake tensor's numbers is answered: 0, or not equal."""

    def __torch_dispatch__(self, operation, types, args=(), how=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if operation is torch.ops.aten.equal.default:
            return False
        return operation(*args, **(how or {}))


@pytest.fixture
def fake_gpu(monkeypatch):
    """In here tensors are fake, and those of device "cuda" are on the GPU."""
    def stream(device, *key):
        return None if torch.device(device).type == "cuda" else honest(device, *key)

    honest = argrpo.rng_for
    monkeypatch.setattr(argrpo, "rng_for", stream)       # a generator would want a driver
    for name, answer in (("amp.common.amp_definitely_not_available", False),
                         ("is_bf16_supported", True), ("get_device_capability", (9, 0)),
                         ("synchronize", None), ("reset_peak_memory_stats", None),
                         ("max_memory_allocated", 2 ** 30)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *given, answer=answer: answer)
    monkeypatch.setattr(FakeTensor, "numpy", zeros)
    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        yield


def zeros(tensor):
    """What numpy() answers for a fake tensor, which must have left the GPU."""
    assert tensor.device.type == "cpu", "numpy reads no GPU's memory"
    return np.zeros(tensor.shape)


@pytest.fixture
def no_backward(monkeypatch):
    """A backward pass that gives every parameter of the model a gradient: a function sets which."""
    models = []

    def backward(loss):
        assert loss.requires_grad and loss.device == GPU
        for p in models[0].parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return models.append


def small(model_type, **changes):
    """A model on the GPU, a tokenizer, prompts on the CPU, a reward, and settings."""
    with torch.device(GPU):
        model = tiny_model(model_type, block_size=4, vocab_size=5, n_layer=1)
    cond, mask = tiny_condition(model_type, rows=5)
    prompts = argrpo.Prompts([f"prompt {k}" for k in range(5)], cond, mask)
    settings = train_c2i.C2iSettings(**dict(
        prompts_per_step=2, group_size=4, micro_batch=3, rollout_prompts=1, cfg_scale=2.0,
        kl_beta=0.1, eval_images=8, eval_cfg_scales="1") | changes)
    return model, Blocks(), prompts, brightness, settings


@BOTH
def test_a_step_on_a_gpu(model_type, fake_gpu, no_backward):
    model, vq, prompts, reward_fn, settings = small(model_type)
    no_backward(model)
    watch = device.Stopwatch(model)
    device.checkpoint_layers(model)
    steps = argrpo.train(model, device.frozen_copy(model), vq, prompts, watch.timed(reward_fn),
                         settings, device.optimizer_of_device(model, settings),
                         sampler=device.Sampler())
    watch.start()
    step = next(steps)
    metrics = run.measured(step, watch.seconds(), settings, Watched())
    for tensor in (step.tokens, step.images, step.rewards, step.advantages, step.logp):
        assert isinstance(tensor, FakeTensor) and tensor.device == GPU
    assert {"seconds_update", "diversity"} <= set(metrics)


def test_what_draws_on_a_gpu_is_a_copy_in_bfloat16(fake_gpu):
    model, *_ = small("c2i")
    drawer = device.Sampler()(model)
    assert drawer is not model and drawer.output.weight.dtype == torch.bfloat16
    assert drawer.tok_embeddings.weight.dtype == torch.float32
    assert device.describe_dtype(GPU) == "matrix products in bfloat16"


def test_an_evaluation_on_a_gpu(fake_gpu):
    model, _, prompts, reward_fn, settings = small("t2i")
    with torch.device(GPU):
        vq = tiny_vq().requires_grad_(False)
    scores, gallery, _ = evaluate_all(device.Sampler()(model), vq, prompts, reward_fn, settings,
                                      Watched())
    assert set(scores) == {"reward", "reward/brightness", "entropy", "diversity", "guidance"}
    assert gallery["pictures"].shape[:2] == (2, 4), "two prompts, and the group's pictures of each"


@pytest.mark.slow
def test_the_selftest_on_a_gpu(fake_gpu, no_backward, tmp_path):
    """But for what needs numbers: the reward's checks, and a checkpoint that is read again."""
    model, vq, prompts, reward_fn, settings = small("c2i", out=str(tmp_path))
    no_backward(model)
    index = torch.arange(2).repeat_interleave(4)
    tokens = torch.zeros(8, 4, dtype=torch.long, device=GPU)
    one = dataclasses.replace(settings, steps=1)
    optimizer = device.optimizer_of_device(model, one)
    checks = [
        *selftest.check_sampler(model, prompts, index, tokens, tokens.float(), settings),
        *selftest.check_accumulation(model, prompts, index, tokens, settings),
        *selftest.check_step(model, vq, prompts, reward_fn, one, optimizer, 5)]
    assert [what for what, _, _ in checks] == ["sampler", "accumulation", "step", "signal"]
    assert "1.00 GiB at most" in checks[2][2]


@pytest.mark.slow
def test_the_trial_of_sizes_on_a_gpu(fake_gpu, no_backward):
    model, vq, prompts, _, settings = small("t2i", micro_batch=None, rollout_prompts=None)
    no_backward(model)
    device.choose_sizes(model, vq, prompts, settings)
    assert (settings.rollout_prompts, settings.micro_batch) == (2, 16)


def test_a_fake_gpu_notices_what_is_left_on_the_cpu(fake_gpu):
    """As a reward that makes a tensor of its own does."""
    model, vq, prompts, _, settings = small("c2i")

    def forgetful(images, texts):
        return brightness(images, texts)[0] + torch.zeros(len(texts)), {}

    with pytest.raises(Exception, match="cuda"):
        evaluate_all(model, vq, prompts, forgetful, settings, Watched())


# --- bfloat16, on the CPU ----------------------------------------------------------------------

@pytest.fixture
def bfloat16(monkeypatch):
    """Everything is as on a GPU but the device: autocast, copies in bfloat16, thresholds."""
    monkeypatch.setattr(argrpo, "autocast",
                        lambda device: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))


@pytest.mark.slow
def test_the_selftest_in_bfloat16(tmp_path, capsys, bfloat16):
    with pytest.raises(SystemExit) as stop:
        train_c2i.main([*QUICK, "--out", str(tmp_path / "run"), "--selftest"])
    assert stop.value.code == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_run_in_bfloat16(tmp_path, capsys, bfloat16, no_pictures):
    summary = train_c2i.main([*QUICK, "--out", str(tmp_path / "run")])
    assert "matrix products in bfloat16" in capsys.readouterr().out
    assert 0 < summary["after"]["reward"] <= 1
