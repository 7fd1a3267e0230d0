"""The published models: every format, strict loading, finding them, and ImageNet's names."""

import argparse
import datetime
import json
import pathlib

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_vq
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

import pretrained
from argrpo import Transformer
from harness.choices import choose_classes
from pretrained import load_weights
from vqgan import VQConfig, VQModel

MODELS = {"transformer": tiny_model, "tokenizer": tiny_vq}
BOTH = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module, weights):
    """Bit for bit."""
    state = module.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name])


# ---------------------------------------------------------------------------------------------
# Formats.  Each writes `weights` into a folder and returns the path to load.
# ---------------------------------------------------------------------------------------------


def pt(wrap, name="model.pt", **options):
    """The format of one file that holds wrap(weights)."""

    def write(weights, folder):
        torch.save(wrap(weights), folder / name, **options)
        return folder / name

    return write


def safetensors_file(weights, folder):
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def one_file_folder(weights, folder):
    return safetensors_file(weights, folder).parent


def shards(save, stem, ending):
    """A Hugging Face folder that splits the weights in three, with the index of them."""

    def write(weights, folder):
        names, index = list(weights), {}
        for k in range(3):
            file = f"{stem}-0000{k + 1}-of-00003.{ending}"
            save({name: weights[name] for name in names[k::3]}, folder / file)
            index |= dict.fromkeys(names[k::3], file)
        (folder / f"{stem}.{ending}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        (folder / "config.json").write_text("{}")
        return folder

    return write


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def in_capitals(write):
    """The same file, its name in capitals."""

    def renamed(weights, folder):
        path = write(weights, folder)
        return path.rename(path.with_name(path.name.upper()))

    return renamed


def beside(name, write):
    """A folder with a file of this name beside the weights, whose content is no checkpoint."""

    def written(weights, folder):
        (folder / name).write_bytes(b"\0\5\26\7Mac OS X")
        path = write(weights, folder)
        return path if path.is_dir() else path.parent

    return written


ARGUMENTS = {
    "out": pathlib.Path("runs/a"),
    "pure": pathlib.PureWindowsPath("C:/runs/a"),
    "begun": datetime.datetime(2025, 1, 2),
    "fid": np.float64(3.5),
}

FORMATS = {
    "model_state_dict": pt(lambda weights: {"epoch": 3, "model_state_dict": weights}),
    "ema": pt(lambda weights: {"ema": weights, "optimizer": {"state": {}, "param_groups": []}}),
    "any name": pt(lambda weights: {"step": torch.tensor(3), "net": {"params": weights}}),
    "settings as model": pt(lambda weights: {"model": {"name": "GPT-B"}, "state_dict": weights}),
    "averaged": pt(
        lambda weights: {"n_averaged": torch.tensor(3)} | prefixed("module.", weights)
    ),
    "capitals": in_capitals(safetensors_file),
    "folder in capitals": lambda *given: in_capitals(safetensors_file)(*given).parent,
    "safetensors under another name": lambda *given: safetensors_file(*given).rename(
        given[1] / "model.pt"
    ),
    "a run's folder": beside("config.json", pt(lambda weights: {"model": weights})),
    "macOS": beside("._model.safetensors", shards(save_file, "model", "safetensors")),
    "macOS, a run": beside("._model.pt", pt(lambda weights: {"model": weights})),
    "paths": pt(lambda weights: {"model": weights, "args": argparse.Namespace(**ARGUMENTS)}),
} | {
    prefix: pt(lambda weights, prefix=prefix: {"model": prefixed(prefix, weights)})
    for prefix in ("_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.",
                   "model.module._orig_mod.", "a.b.c.", "gpt_model.")
} | {
    "bare": pt(lambda weights: weights),
    "model": pt(lambda weights: {"model": weights}),
    "module": pt(lambda weights: {"module": weights}),
    "state_dict": pt(lambda weights: {"state_dict": weights}),
    "training": pt(
        lambda weights: {
            "model": weights,
            "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": []},
            "steps": 300000,
            "args": argparse.Namespace(gpt_model="GPT-B", lr=1e-4, resume=None),
        }
    ),
    "freqs_cis": pt(lambda weights: {"model": weights | {"freqs_cis": torch.zeros(17, 4, 2)}}),
    "before torch 1.6": pt(
        lambda weights: weights, "model.pth", _use_new_zipfile_serialization=False
    ),
    "safetensors": safetensors_file,
    "folder": one_file_folder,
    "safetensors shards": shards(save_file, "model", "safetensors"),
    "bin shards": shards(torch.save, "pytorch_model", "bin"),
}


# A tokenizer comes in the same formats: one of each kind of file.
CASES = [("transformer", name) for name in FORMATS] + [
    ("tokenizer", name) for name in ("bare", "training", "module.", "safetensors shards")
]


@pytest.mark.parametrize("kind, name", CASES)
def test_every_format_gives_the_same_weights(kind, name, tmp_path):
    make, write = MODELS[kind], FORMATS[name]
    weights = weights_of(make())
    module = make()
    assert load_weights(module, write(weights, tmp_path)) is module
    assert_same(module, weights)


@pytest.mark.parametrize(
    "write",
    [one_file_folder, FORMATS["safetensors shards"], FORMATS["bin shards"]],
    ids=["folder", "safetensors shards", "bin shards"],
)
def test_a_folder_of_both_models_loads_into_each(write, tmp_path):
    gpt, vq = weights_of(tiny_model()), weights_of(tiny_vq())
    folder = write(
        {f"gpt_model.{name}": w for name, w in gpt.items()}
        | {f"vq_model.{name}": w for name, w in vq.items()},
        tmp_path,
    )
    assert_same(load_weights(tiny_model(), folder), gpt)
    assert_same(load_weights(tiny_vq(), folder), vq)


@pytest.mark.parametrize("outer", ["", "module."])
@pytest.mark.parametrize("inner", ["", "_orig_mod."])
def test_a_wrapped_folder_of_both_models_loads_into_each(outer, inner, tmp_path):
    gpt, vq = weights_of(tiny_model()), weights_of(tiny_vq())
    folder = one_file_folder(
        prefixed(f"{outer}gpt_model.{inner}", gpt) | prefixed(f"{outer}vq_model.", vq), tmp_path
    )
    assert_same(load_weights(tiny_model(), folder), gpt)
    assert_same(load_weights(tiny_vq(), folder), vq)


@pytest.mark.parametrize("name", ["model", "module", "state_dict", "model_state_dict"])
def test_the_trained_weights_are_loaded_not_their_average(name, tmp_path):
    """LlamaGen's sampler looks for "model" first.  The order in the file does not matter."""
    trained, average = weights_of(tiny_model()), weights_of(tiny_model())
    torch.save({"ema": average, name: trained}, tmp_path / "model.pt")
    assert_same(load_weights(tiny_model(), tmp_path / "model.pt"), trained)


class Made:
    """Pickled as make(*given), whether or not that can be made here."""

    def __init__(self, make, *given):
        self.made = make, given

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("make", [pathlib.PosixPath, pathlib.WindowsPath])
def test_a_path_of_another_system(make, tmp_path):
    weights = weights_of(tiny_model())
    torch.save({"model": weights, "out": Made(make, "C:/", "runs")}, tmp_path / "model.pt")
    assert_same(load_weights(tiny_model(), tmp_path / "model.pt"), weights)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [FORMATS["model"], safetensors_file], ids=["pt", "safetensors"])
def test_half_precision_is_widened(make, dtype, write, tmp_path):
    halves = {name: w.to(dtype) for name, w in weights_of(make()).items()}
    assert_same(
        load_weights(make(), write(halves, tmp_path)),
        {name: w.float() for name, w in halves.items()},
    )


# ---------------------------------------------------------------------------------------------
# Strictness.  norm.weight is a vector of 16.
# ---------------------------------------------------------------------------------------------


def failure(weights, folder):
    """What load_weights says of these weights."""
    with pytest.raises(ValueError) as caught:
        load_weights(tiny_model(), FORMATS["model"](weights, folder))
    return str(caught.value)


def test_a_missing_parameter_is_named(tmp_path):
    weights = weights_of(tiny_model())
    del weights["norm.weight"]
    assert (
        failure(weights, tmp_path)
        == f"{tmp_path}/model.pt does not fit this Transformer: norm.weight is missing"
    )


def test_an_unexpected_parameter_is_named(tmp_path):
    weights = weights_of(tiny_model()) | {"lm_head.weight": torch.zeros(3)}
    assert failure(weights, tmp_path).endswith(": lm_head.weight is unexpected")


def test_both_shapes_of_a_wrong_parameter_are_named(tmp_path):
    weights = weights_of(tiny_model()) | {"norm.weight": torch.zeros(2, 8)}
    assert failure(weights, tmp_path).endswith(": norm.weight has shape (2, 8), not (16,)")


def test_the_first_few_of_many_problems_are_named_and_the_rest_counted(tmp_path):
    weights = weights_of(tiny_model()) | {f"extra.{k}": torch.zeros(1) for k in range(10)}
    assert failure(weights, tmp_path).endswith(
        ": extra.0 is unexpected; extra.1 is unexpected; extra.2 is unexpected; "
        "extra.3 is unexpected and 6 more"
    )


def test_missing_and_unexpected_names_are_shown_side_by_side(tmp_path):
    """A prefix that only some names have is not removed."""
    weights = weights_of(tiny_model())
    names = list(weights)
    mixed = prefixed("module.", {name: weights[name] for name in names[:6]})
    said = failure(mixed | {name: weights[name] for name in names[6:]}, tmp_path)
    some = [f"{name} is missing" for name in names[:4]]
    others = [f"module.{name} is unexpected" for name in names[:4]]
    assert said.endswith(f": {'; '.join(some)} and 2 more; {'; '.join(others)} and 2 more")


def test_a_prefix_does_not_hide_what_is_missing(tmp_path):
    weights = weights_of(tiny_model())
    del weights["norm.weight"]
    assert failure(prefixed("module.", weights), tmp_path).endswith(
        "this Transformer: norm.weight is missing"
    )


def test_one_name_alone_has_no_prefix(tmp_path):
    said = failure({"norm.weight": torch.zeros(16)}, tmp_path)
    assert "missing" in said and "unexpected" not in said


@pytest.mark.parametrize(
    "change",
    [{"norm.weight": torch.zeros(2, 8)}, {"extra": torch.zeros(1)}, {"norm.weight": None}],
    ids=["shape", "unexpected", "missing"],
)
def test_a_failed_load_changes_nothing(change, tmp_path):
    module, before = tiny_model(), None
    before = weights_of(module)
    with pytest.raises(ValueError):
        load_weights(module, FORMATS["model"](weights_of(tiny_model()) | change, tmp_path))
    assert_same(module, before)


def test_the_other_kind_of_model_does_not_fit(tmp_path):
    with pytest.raises(
        ValueError, match="does not fit this VQModel: encoder.conv_in.weight is missing; .* more"
    ):
        load_weights(tiny_vq(), FORMATS["model"](weights_of(tiny_model()), tmp_path))


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_that_is_not_finite_is_refused(make, value, tmp_path):
    weights, module = weights_of(make()), make()
    before, name = weights_of(module), list(weights)[-1]
    weights[name].flatten()[-1] = value
    for dtype in (torch.float32, torch.bfloat16):
        halves = {name: tensor.to(dtype) for name, tensor in weights.items()}
        with pytest.raises(ValueError, match=f"model.pt holds NaN or infinite numbers in {name}: "):
            load_weights(module, FORMATS["model"](halves, tmp_path))
    assert_same(module, before)


def test_what_is_too_large_for_float32_is_not_finite(tmp_path):
    large = torch.full((16,), 1e300, dtype=torch.double)
    weights = weights_of(tiny_model()) | {"norm.weight": large}
    assert "infinite numbers in norm.weight: " in failure(weights, tmp_path)


# ---------------------------------------------------------------------------------------------
# Files that are no checkpoint
# ---------------------------------------------------------------------------------------------


class Hostile:
    """Creates a file when it is unpickled by a trusting reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "hide",
    [
        lambda hostile: hostile,
        lambda hostile: {"model": weights_of(tiny_model()), "args": hostile},
        lambda hostile: {"model": {"norm.weight": hostile}},
        lambda hostile: {"model": {}, "args": argparse.Namespace(lr=hostile)},
    ],
    ids=["the file", "beside the weights", "as a weight", "in the options"],
)
@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_checkpoint_cannot_run_code(hide, name, tmp_path):
    created = tmp_path / "created"
    torch.save(hide(Hostile(created)), tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} .* \(it asks for (_?io|builtins)\.open\)"):
        load_weights(tiny_model(), tmp_path / name if name == "model.pt" else tmp_path)
    assert not created.exists()
    torch.load(tmp_path / name, weights_only=False)  # it was dangerous indeed
    assert created.exists()


@pytest.mark.parametrize(
    "write",
    [FORMATS["model"], FORMATS["before torch 1.6"], safetensors_file],
    ids=["pt", "old pt", "safetensors"],
)
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_named(write, keep, tmp_path):
    path = write(weights_of(tiny_model()), tmp_path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=str(path)):
        load_weights(tiny_model(), path)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_text_file_is_named(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}"):
        load_weights(tiny_model(), tmp_path / name)


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"{tmp_path}/model.pt holds no weights by name"):
        load_weights(tiny_model(), tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{name}"):
        load_weights(tiny_model(), tmp_path / name)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_weights(tiny_model(), tmp_path)


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, model", pretrained.MODELS.items(), ids=pretrained.MODELS)
def test_a_token_is_16_by_16_pixels(preset, model):
    config = pretrained.gpt_config(preset)
    assert config.block_size == (model.pixels / 16) ** 2
    assert str(model.pixels) in preset and config.model_type == model.task


@pytest.fixture
def small_sizes(monkeypatch):
    """The published models, but so narrow that they fit into a test."""
    widths = {"GPT-B": 8, "GPT-L": 16, "GPT-XL": 24, "GPT-XXL": 32, "GPT-3B": 40}
    monkeypatch.setattr(
        pretrained,
        "GPT_SIZES",
        {size: dict(n_layer=1, n_head=2, dim=dim) for size, dim in widths.items()},
    )


def small_gpt(preset):
    """A preset's model at the small size, with weights that see conditions and places."""
    model = Transformer(pretrained.gpt_config(preset))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("preset", ["B-256", "L-384", "t2i-XL-256"])
def test_load_gpt_gives_the_model_that_was_saved(preset, small_sizes, tmp_path):
    """Forward, too: the rotary table is in no file, and must be right all the same."""
    saved = small_gpt(preset)
    loaded = pretrained.load_gpt(preset, FORMATS["model"](saved.state_dict(), tmp_path))
    tokens = torch.randint(16384, (1, saved.config.block_size))
    cond = torch.tensor([207]) if saved.config.model_type == "c2i" else torch.randn(1, 120, 2048)
    assert_same(loaded, weights_of(saved))
    with torch.no_grad():
        logits = saved(tokens, cond)
        assert logits.std() > 0.1 and torch.equal(loaded(tokens, cond), logits)


def test_load_gpt_gives_a_model_to_train(small_sizes, tmp_path):
    model = pretrained.load_gpt(
        "B-256", FORMATS["model"](small_gpt("B-256").state_dict(), tmp_path)
    )
    assert all(
        p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu"
        for p in model.parameters()
    )


def test_load_vq_gives_the_tokenizer_that_was_saved_and_freezes_it(monkeypatch, tmp_path):
    saved = tiny_vq()
    monkeypatch.setitem(pretrained.VQ_CONFIGS, "VQ-16", saved.config)
    loaded = pretrained.load_vq("B-256", FORMATS["model"](saved.state_dict(), tmp_path))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert_same(loaded, weights_of(saved))
    assert torch.equal(loaded.encode(images), saved.encode(images))
    assert torch.equal(loaded.decode(saved.encode(images)), saved.decode(saved.encode(images)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.fixture
def small_tokenizers(monkeypatch):
    """VQ-16 and VQ-8 with few channels."""
    for name, config in pretrained.VQ_CONFIGS.items():
        monkeypatch.setitem(
            pretrained.VQ_CONFIGS, name, VQConfig(ch=8, ch_mult=config.ch_mult, z_channels=8)
        )


@pytest.mark.parametrize("name, tokens", [("VQ-16", 256), ("VQ-8", 1024)])
def test_the_tokenizer_says_how_many_tokens_an_image_has(
    name, tokens, small_sizes, small_tokenizers, tmp_path
):
    (tmp_path / "vq").mkdir()
    vq_path = FORMATS["model"](VQModel(pretrained.VQ_CONFIGS[name]).state_dict(), tmp_path / "vq")
    gpt_path = FORMATS["model"](small_gpt("B-256").state_dict(), tmp_path)
    model, vq = pretrained.load("B-256", gpt_path, vq_path)
    assert model.config.block_size == tokens
    with torch.no_grad():
        assert vq.decode(torch.zeros(1, tokens, dtype=torch.long)).shape == (1, 3, 256, 256)


def test_published_transformers_do_not_go_with_vq_8(small_tokenizers, tmp_path):
    vq_path = FORMATS["model"](VQModel(pretrained.VQ_CONFIGS["VQ-8"]).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="one token per 8 x 8 pixels.*--gpt-ckpt"):
        pretrained.load("B-256", "", vq_path)


@pytest.mark.parametrize("name", pretrained.VQ_CONFIGS)
def test_load_vq_under_a_prefix(name, small_tokenizers, tmp_path):
    vq = VQModel(pretrained.VQ_CONFIGS[name])
    path = FORMATS["module."](vq.state_dict(), tmp_path)
    assert_same(pretrained.load_vq("B-256", path), weights_of(vq))


@pytest.mark.parametrize(
    "extra", [{}, {"gpt_model.freqs_cis": torch.zeros(17, 4, 2)}], ids=["", "freqs_cis"]
)
def test_load_gpt_from_a_folder_of_both_models(extra, small_sizes, tmp_path):
    gpt, vq = small_gpt("L-256"), tiny_vq()
    folder = one_file_folder(
        {f"gpt_model.{name}": w for name, w in gpt.state_dict().items()}
        | {f"vq_model.{name}": w for name, w in vq.state_dict().items()}
        | extra,
        tmp_path,
    )
    assert_same(pretrained.load_gpt("L-256", folder), weights_of(gpt))


def test_another_models_checkpoint_is_refused(small_sizes, tmp_path):
    path = FORMATS["model"](small_gpt("L-384").state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(1001, 16\), not \(1001, 8\)"):
        pretrained.load_gpt("B-256", path)


# ---------------------------------------------------------------------------------------------
# Finding the files.  The hub is played by a function: no test uses the network.
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose every repository is a folder with model.pt in it; it lists what is asked."""
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.pt").touch()
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.fixture
def no_hub(monkeypatch):
    """hub fails with the error that it is given."""

    def fail_with(error):
        def snapshot_download(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return fail_with


@pytest.mark.parametrize("name", ["model.pt", "runs/model.pt", "runs"])
def test_what_is_there_is_not_downloaded(name, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model.pt").touch()
    (tmp_path / "model.pt").touch()
    assert str(pretrained.fetch(name, "pass --gpt-ckpt PATH")) == name and not hub


def test_a_file_of_a_repository(hub, tmp_path):
    assert (
        pretrained.fetch("me/models:model.pt", "pass --gpt-ckpt PATH")
        == tmp_path / "snapshot" / "model.pt"
    )
    assert hub == [("me/models", "model.pt")]  # and nothing else is downloaded


def test_a_whole_repository(hub, tmp_path):
    assert pretrained.fetch("me/models", "pass --gpt-ckpt PATH") == tmp_path / "snapshot"
    [(repo, patterns)] = hub
    assert repo == "me/models" and "*.safetensors" in patterns


def test_a_published_model_is_looked_for_where_it_is_published(hub):
    with pytest.raises(FileNotFoundError):
        pretrained.load_gpt("B-256")
    with pytest.raises(FileNotFoundError):
        pretrained.load_vq("t2i-XL-256")
    assert hub == [
        ("FoundationVision/LlamaGen", "c2i_B_256.pt"),
        ("peizesun/llamagen_t2i", "vq_ds16_t2i.pt"),
    ]


def test_a_file_that_is_not_in_the_repository(hub):
    with pytest.raises(
        FileNotFoundError,
        match="cannot get other.pt from https://huggingface.co/me/models .*--vq-ckpt PATH",
    ):
        pretrained.fetch("me/models:other.pt", "pass --vq-ckpt PATH")


@pytest.mark.parametrize("spec", ["modle.pt", "/no/such/model.pt", "a/b/c"])
def test_a_wrong_local_name(spec, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"^{spec}: no such file or folder in {tmp_path}.*--gpt-ckpt PATH"
    ):
        pretrained.fetch(spec, "pass --gpt-ckpt PATH")
    assert not hub


def test_without_a_network(no_hub):
    no_hub(
        LocalEntryNotFoundError("An error happened while trying to reach the Hub.\nSecond line.")
    )
    with pytest.raises(FileNotFoundError) as caught:
        pretrained.fetch("me/models:model.pt", "pass --gpt-ckpt PATH")
    for part in (
        "model.pt",
        "https://huggingface.co/me/models",
        "trying to reach the Hub",
        "--gpt-ckpt PATH",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_and_without_a_reason(no_hub):
    """A timeout often has no message."""
    no_hub(TimeoutError())
    with pytest.raises(
        FileNotFoundError, match="https://huggingface.co/me/models .*--gpt-ckpt PATH"
    ):
        pretrained.fetch("me/models:model.pt", "pass --gpt-ckpt PATH")


# ---------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------


def test_imagenets_classes():
    names = pretrained.imagenet_classes()
    assert len(names) == 1000
    assert names[207].lower() == "golden retriever" and names[360].lower() == "otter"
    assert choose_classes("Golden Retriever, OTTER", names) == [207, 360]


def test_every_imagenet_name_can_be_chosen():
    """By itself; of two classes with one name, the first."""
    names = pretrained.imagenet_classes()
    assert [choose_classes(name, names) for name in names] == [
        [names.index(name)] for name in names
    ]


ANIMALS = ["Tench", "goldfish", "great white shark", "Crane", "crane"]
CHOICES = {
    "all": [0, 1, 2, 3, 4],
    "2": [2],
    "4,0": [4, 0],
    "TENCH": [0],
    "great white shark": [2],
    " Goldfish , 0,tench": [1, 0],       # each once: two would make an evaluation's intervals small
    "crane": [3],
}


@pytest.mark.parametrize("text, chosen", CHOICES.items(), ids=CHOICES)
def test_choose_classes(text, chosen):
    assert choose_classes(text, ANIMALS) == chosen


@pytest.mark.parametrize("text, unknown", [
    ("xylophone", "xylophone"), ("0,5", "5"), ("-1", "-1"), ("", ""), ("1,", ""), ("1,,2", ""),
])
def test_a_class_that_is_none(text, unknown):
    with pytest.raises(ValueError, match=f"no class is named '{unknown}': .* from 0 to 4"):
        choose_classes(text, ANIMALS)
