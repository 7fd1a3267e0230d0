import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from argrpo import GPTConfig, Transformer  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_model(model_type="c2i", **changes):
    """A random transformer of 4 x 4 tokens from 11 codes, its predictions far from uniform."""
    config = dict(
        dim=16, n_layer=2, n_head=2, vocab_size=11, block_size=16, num_classes=5, multiple_of=8
    )
    if model_type == "t2i":
        config |= dict(model_type="t2i", cls_token_num=4, caption_dim=6)
    model = Transformer(GPTConfig(**(config | changes)))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def tiny_condition(model_type, rows=3):
    """A condition and its mask for `tiny_model`.  The captions have 4, 2 and 1 words."""
    if model_type == "c2i":
        return torch.arange(rows), None
    words = torch.tensor([4, 2, 1])[torch.arange(rows) % 3]
    return torch.randn(rows, 4, 6), torch.arange(4) >= 4 - words[:, None]
