"""The published LlamaGen code's own answers, on random weights: `golden/*_case.pt`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from argrpo import GPT_SIZES, GPTConfig, Transformer, filter_logits, generate
from pretrained import load_weights
from vqgan import VQConfig, VQModel

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(kind):
    """The case, our model with its weights, and the condition with its mask."""
    case = torch.load(GOLDEN / f"{kind}_case.pt", weights_only=True)
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    model = Transformer(
        GPTConfig(**{name: value for name, value in case["config"].items() if name in fields})
    )
    condition = (
        (case["labels"], None) if kind == "c2i" else (case["caption_emb"], case["caption_mask"])
    )
    return case, load_weights(model, GOLDEN / f"{kind}_ckpt.pt"), *condition


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_teacher_forced_logits(kind):
    case, model, cond, mask = golden(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            model(case["tokens"], cond, mask), case["logits_cond"], rtol=1e-5, atol=1e-5
        )
        null = model(case["tokens"], model.null_cond(cond), mask)
    torch.testing.assert_close(null, case["logits_null"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0, 7.5])
def test_greedy_decoding_token_for_token(kind, cfg_scale):
    case, model, cond, mask = golden(kind)
    tokens, _ = generate(model, cond, mask, cfg_scale=cfg_scale, greedy=True)
    assert torch.equal(tokens, case["greedy"][str(cfg_scale)]), (
        "the published code decodes other tokens")


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_filtering_probabilities(kind):
    case = torch.load(GOLDEN / f"{kind}_case.pt", weights_only=True)
    for key, expected in case["filter_probs"].items():
        temperature, top_k, top_p = (float(part) for part in key.split(","))
        probabilities = filter_logits(
            case["filter_logits"] / temperature, int(top_k), top_p
        ).softmax(-1)
        torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-7)


def test_vq_encodes_and_decodes():
    case = torch.load(GOLDEN / "vq_case.pt", weights_only=True)
    vq = load_weights(VQModel(VQConfig(**case["config"])), GOLDEN / "vq_ckpt.pt")
    with torch.no_grad():
        encoded = vq.quant_conv(vq.encoder(case["image"]))
        torch.testing.assert_close(encoded, case["encoder_out"], rtol=1e-5, atol=1e-5)
        assert torch.equal(vq.encode(case["image"]), case["indices"]), (
            "the published tokenizer encodes other tokens")
        torch.testing.assert_close(vq.decode(case["codes"]), case["decoded"], rtol=1e-5, atol=2e-5)
        reconstruction = vq.decode(vq.encode(case["image"]))
    torch.testing.assert_close(reconstruction, case["reconstruction"], rtol=1e-5, atol=2e-5)


MANIFEST = json.loads((GOLDEN / "checkpoint_manifest.json").read_text())


@pytest.mark.parametrize("name", MANIFEST)
def test_names_and_shapes_are_the_published_ones(name):
    kind, size, *resolution = name.split("/")
    with torch.device("meta"):  # shapes without memory
        if kind == "vq":
            model = VQModel(VQConfig() if size == "VQ-16" else VQConfig(ch_mult=(1, 2, 2, 4)))
        else:
            t2i = dict(model_type="t2i", cls_token_num=120) if kind == "t2i" else {}
            model = Transformer(
                GPTConfig(**GPT_SIZES[size], block_size=(int(resolution[0]) // 16) ** 2, **t2i)
            )
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == MANIFEST[
        name
    ], "a published checkpoint has other names or shapes"
