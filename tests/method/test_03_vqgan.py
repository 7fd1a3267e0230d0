"""The tokenizer's ideas, one a test: vqgan.py.  The published code's answers: test_10_golden."""

import pytest
import torch
import torch.nn.functional as F
from conftest import same, tiny_vq

from vqgan import (
    AttnBlock,
    Downsample,
    ResnetBlock,
    Upsample,
    VectorQuantizer,
    VQConfig,
    VQModel,
    group_norm,
)


def test_the_nearest_code_is_the_one_in_the_same_direction():
    """A code's length does not matter: codes are normalised.  See VectorQuantizer."""
    vq = tiny_vq()
    with torch.no_grad():
        vq.quantize.embedding.weight.copy_(torch.tensor(
            [[9.0, 9.0], [0.1, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.0, -2.0]]))
    z = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 1.1], [-1.0, 0.2]]), dim=-1)
    assert vq.quantize.nearest(z).tolist() == [1, 2, 0, 3], "nearest is the largest cosine"
    same(vq.quantize.codes().norm(dim=-1), [1.0] * 5, "codes are scaled to length one")
    features = vq.features(torch.rand(2, 3, 4, 4))
    assert features.shape == (2, 4, 2)
    same(features.norm(dim=-1), torch.ones(2, 4), "and so are the encoder's vectors")


def test_a_codes_length_does_not_change_its_picture():
    """Decoding and training use the normalised codebook, as the look-up does."""
    vq, tokens = tiny_vq(), torch.arange(4).view(1, 4)
    with torch.no_grad():
        before, z = vq.decode(tokens), F.normalize(torch.randn(1, 4, 2), dim=-1)
        code, _ = vq.straight_through(z)
        vq.quantize.embedding.weight *= 3
        same(vq.decode(tokens), before, "decoding takes codes of length one: `codes()`, not the "
             "table as it is")
        same(vq.straight_through(z)[0], code, "so does training")


def test_straight_through_has_the_codes_value_and_the_features_gradient():
    """See straight_through."""
    vq, z = tiny_vq(), F.normalize(torch.randn(2, 4, 2), dim=-1).requires_grad_()
    codes, _ = vq.straight_through(z)
    same(codes, vq.quantize.codes()[vq.quantize.nearest(z)], "its value is the nearest code")
    gradient = torch.randn(2, 4, 2)
    assert codes.requires_grad, "the features must get a gradient through the rounding"
    (codes * gradient).sum().backward()
    assert z.grad is not None, "the gradient must go to the features"
    same(z.grad, gradient, "its gradient passes as if nothing had been rounded")
    assert vq.quantize.embedding.weight.grad is None, "and none of it moves the codes"


def test_codes_follow_features_and_features_a_quarter_as_much_codes():
    """vq_loss = |code - sg(z)|^2 + beta |z - sg(code)|^2: the gradient of z is beta's part."""
    vq, z = tiny_vq(), F.normalize(torch.randn(1, 4, 2), dim=-1).requires_grad_()
    for beta in (0.25, 0.0):
        z.grad = None
        _, vq_loss = vq.straight_through(z, beta=beta)
        code = vq.quantize.codes()[vq.quantize.nearest(z)].detach()
        squares = (code - z).square().mean()
        same(vq_loss, (1 + beta) * squares, "codebook loss plus beta times commitment loss")
        vq_loss.backward()
        same(z.grad, beta * 2 * (z - code) / z.numel(), "commitment moves features, with beta")
    assert vq.quantize.embedding.weight.grad.abs().max() > 0, "the codebook loss moves codes"
    chosen = torch.tensor([[4, 4, 4, 4]])
    same(vq.straight_through(z, chosen)[0], vq.quantize.codes()[chosen], "tokens overrule z")


def test_the_newest_codes_are_remembered():
    """At the end of `codebook_used`; the oldest drop out at its beginning.  See remember."""
    quantize = tiny_vq().quantize
    quantize.codebook_used = torch.arange(10.0)
    quantize.remember(torch.tensor([[21, 22], [23, 24]]))
    assert quantize.codebook_used.tolist() == [4, 5, 6, 7, 8, 9, 21, 22, 23, 24], (
        "the newest stand at the end, and as many of the oldest are gone")
    quantize.remember(torch.arange(100, 115))
    assert quantize.codebook_used.tolist() == list(range(105, 115)), "more than there is room for"


def test_only_training_remembers_codes():
    """In eval mode nothing is written into a buffer."""
    vq = VQModel(VQConfig(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5,
                          codebook_embed_dim=4))
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    seen = vq.quantize.codebook_used
    seen.fill_(9)
    vq.eval().straight_through(vq.features(images))
    assert (seen == 9).all(), "evaluation must not change a model"
    vq.train().straight_through(vq.features(images))
    assert torch.equal(seen[-8:], vq.encode(images).flatten().float()), "training remembers"


def test_tokens_are_written_row_by_row():
    """Token 1 is right of token 0, not below it: in decoding and in encoding alike."""
    vq = tiny_vq()
    with torch.no_grad():
        base, changed = torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)
        changed[0, 3] = 1                        # the upper right corner of 4 x 4
        z = vq.quantize.codes()
        seen = {}
        vq.decoder.register_forward_pre_hook(lambda module, given: seen.update(z=given[0]))
        vq.decode(base), vq.decode(changed)
        grid = vq.post_quant_conv(z[changed].transpose(1, 2).reshape(1, 2, 4, 4))
        same(seen["z"], grid, "token i is in row i // 4, column i % 4")
        features = vq.features(torch.rand(1, 3, 4, 8))
        assert features.shape == (1, 8, 2), "2 rows of 4"
        image = torch.rand(1, 3, 4, 8)
        flat = F.normalize(vq.quant_conv(vq.encoder(image))[0], dim=0)       # (C, 2, 4)
        same(vq.features(image)[0, 5], flat[:, 1, 1], "feature 5 is in row 1, column 1")


def test_new_codes_lie_in_all_directions_alike():
    """On the unit sphere their mean is near its centre, and in three dimensions the products of two
    of them are uniform from -1 to 1 (Archimedes)."""
    torch.manual_seed(0)
    codes = VectorQuantizer(VQConfig(codebook_size=2000, codebook_embed_dim=3)).codes()
    assert codes.mean(dim=0).norm() < 0.05, "there is a side on which more codes lie"
    products = codes[:1000] @ codes[1000:].T
    assert (products.abs() > 0.5).float().mean() == pytest.approx(0.5, abs=0.03)


def test_sizes_that_make_no_grid_are_refused():
    for height, width in ((5, 4), (4, 5)):
        with pytest.raises(ValueError, match="both multiples of 2, not"):
            tiny_vq().encode(torch.rand(1, 3, height, width))
    with pytest.raises(ValueError, match="square grid, but there are 15"):
        tiny_vq().decode(torch.zeros(1, 15, dtype=torch.long))


def test_downsampling_pads_below_and_right():
    """See Downsample: output (i, j) is centred at input (2 i + 1, 2 j + 1)."""
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()
        down.conv.weight[0, 0, 0, 0] = 1.0       # read the window's upper left corner alone
        down.conv.bias.zero_()
        image = torch.arange(16.0).view(1, 1, 4, 4)
        same(down(image)[0, 0], [[0.0, 2.0], [8.0, 10.0]], "the padding is below and at the right")


def test_upsampling_doubles_pixels():
    up = Upsample(1)
    with torch.no_grad():
        up.conv.weight.zero_()
        up.conv.weight[0, 0, 1, 1] = 1.0
        up.conv.bias.zero_()
        ours = up(torch.tensor([[1.0, 2.0]]).view(1, 1, 1, 2))
    same(ours[0, 0], [[1.0, 1, 2, 2], [1, 1, 2, 2]], "each pixel becomes four equal ones")


def test_group_norms_are_those_of_the_published_tokenizer():
    norm = group_norm(128)
    assert (norm.num_groups, norm.eps) == (32, 1e-6), "32 groups, eps 1e-6"


@torch.no_grad()
def test_blocks_add_to_what_they_are_given():
    """With a last layer of zeros nothing is added: only the residual path is left."""
    x = torch.randn(2, 32, 3, 3)
    attention, residual, wider = AttnBlock(32), ResnetBlock(32, 32), ResnetBlock(32, 64)
    for layer in (attention.proj_out, residual.conv2, wider.conv2):
        layer.weight.zero_(), layer.bias.zero_()
    same(attention(x), x, "the attention block adds to its input: x + proj(attention)")
    same(residual(x), x, "the residual block adds to its input")
    same(wider(x), wider.nin_shortcut(x), "with more channels, to a 1 x 1 convolution of it")
    for norm in (residual.norm2, wider.norm2):
        norm.weight.zero_(), norm.bias.zero_()
    torch.nn.init.normal_(residual.conv2.weight), residual.conv2.bias.fill_(2.0)
    same(residual(x), x + 2, "the second convolution reads the second norm, of zeros here")
    attention.proj_out.bias.fill_(1.0)
    same(attention(x), x + 1, "what the attention's last layer gives is added")


def test_a_token_that_is_none_is_refused():
    """-1 would be the last code in plain indexing."""
    vq = VQModel(VQConfig(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5,
                          codebook_embed_dim=4))
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            vq.decode(torch.full((1, 4), bad))
