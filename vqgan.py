"""LlamaGen's VQ tokenizer: pictures <-> tokens.

A convolutional encoder turns a picture into a grid of short vectors, each vector is replaced by
the nearest of V learned codes, and a convolutional decoder paints the picture back from the codes:

    images (B, 3, height, width) in [-1, 1]  --encode-->  tokens (B, h*w) in 0..V-1
    tokens  --decode-->  images

A token is the index of a code; h = height / f and w = width / f, where f = 2 ** (len(ch_mult) - 1)
is 16 for the published VQ-16 and 8 for VQ-8.  The transformer in `argrpo.py` never sees a pixel: it
writes tokens, in rows from the top left, and this file makes them visible.  Other letters: C
channels of a layer, E numbers of a code.

Vectors and codes are both scaled to length one before they are compared (Yu et al. 2022,
"Vector-quantized image modeling with improved VQGAN"), so the nearest code is the one with the
largest cosine.  Parameter names are those of the published checkpoints: there is no renaming.
"""

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VQConfig:
    ch: int = 128                         # channels at full resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)      # times ch, per resolution; all but the last halve it
    z_channels: int = 256                 # channels of the encoder's output
    codebook_size: int = 16384            # V
    codebook_embed_dim: int = 8           # E, numbers of a code


# ---------------------------------------------------------------------------------------------
# Building blocks, of feature maps (B, C, rows, columns)
# ---------------------------------------------------------------------------------------------

def group_norm(channels):
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention among all positions of the (small) grid."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        rows = [conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)]
        h = F.scaled_dot_product_attention(*rows)[:, 0]              # (B, rows * columns, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # One more row below and one more column at the right give exactly half the size.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def resolution_level(c_in, c_out, n_res, attention):
    """The residual blocks (and, at the smallest grid, attention blocks) of one resolution."""
    level = nn.Module()
    level.res = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n_res))
    level.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(n_res if attention else 0))
    return level


def run_level(level, h):
    for i, block in enumerate(level.res):
        h = block(h)
        if len(level.attn):
            h = level.attn[i](h)
    return h


def middle(channels):
    first, last = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    return nn.ModuleList([first, AttnBlock(channels), last])


class Encoder(nn.Module):
    """(B, 3, height, width) -> (B, z_channels, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True)):
            last = i == len(widths) - 1
            level = resolution_level(c_in, c_out, n_res=2, attention=last)
            if not last:
                level.downsample = Downsample(c_out)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = run_level(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, h * f, w * f)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            level = resolution_level(c_in, c_out, n_res=3, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = Upsample(c_out)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = run_level(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# ---------------------------------------------------------------------------------------------
# The codebook
# ---------------------------------------------------------------------------------------------

class VectorQuantizer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        nn.init.normal_(self.embedding.weight)       # any direction is as likely as any other
        # The last 65536 tokens of training, as LlamaGen's checkpoints hold them; zeros where there
        # were fewer.  Once it is full, a code that is not in it is probably dead: whoever trains a
        # tokenizer can restart it (toy/pretraining.py looks at the newest 8192).
        self.register_buffer("codebook_used", torch.zeros(65536))

    def codes(self):
        """The codebook as it is used: (V, E), each row of length one."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z):
        """z (..., E) of length one -> the nearest code's index (...).

        On the unit sphere |z - e|^2 = 2 - 2 <z, e>, so the nearest code has the largest product."""
        return (z @ self.codes().T).argmax(dim=-1)

    def remember(self, tokens):
        """Puts the newest tokens at the end of `codebook_used`, and drops as many of the oldest."""
        newest = tokens.flatten()[-len(self.codebook_used):].to(self.codebook_used)
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(newest):], newest]))


# ---------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------

class VQModel(nn.Module):
    """LlamaGen's tokenizer.  VQ-16 by default; VQ-8 is `VQConfig(ch_mult=(1, 2, 2, 4))`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.downsample_factor = 2 ** (len(config.ch_mult) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def features(self, images):
        """The unit vectors that get quantised: (B, 3, height, width) in [-1, 1] -> (B, h*w, E).

        Raises ValueError for another shape, or a height or width that is no multiple of f."""
        f = self.downsample_factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images must be (B, 3, height, width), both multiples of {f}, "
                             f"not {tuple(images.shape)}")
        z = self.quant_conv(self.encoder(images))                    # (B, E, h, w)
        return F.normalize(z.flatten(2).transpose(1, 2), dim=-1)     # (B, h*w, E)

    def from_codes(self, z, h, w):
        """Codes (B, h*w, E) -> images (B, 3, height, width), nominally in [-1, 1]."""
        # Contiguous, for group norms are slow where channels come last in memory.
        z = z.transpose(1, 2).unflatten(2, (h, w)).contiguous()      # (B, E, h, w)
        return self.decoder(self.post_quant_conv(z))

    def encode(self, images):
        """images (B, 3, height, width) in [-1, 1] -> tokens (B, h*w) int64, row by row."""
        return self.quantize.nearest(self.features(images))

    def decode(self, tokens):
        """tokens (B, h*w) int64 of a square grid -> images (B, 3, height, width), nominally in
        [-1, 1].

        Raises ValueError if h*w is not a square number, IndexError (on a CPU) for no token."""
        side = isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError("tokens must fill a square grid, but there are "
                             f"{tokens.shape[1]} of them per image")
        return self.from_codes(F.embedding(tokens, self.quantize.codes()), side, side)

    def straight_through(self, z, tokens=None, beta=0.25):
        """Straight-through estimator, for training: z (B, h*w, E) -> (codes (B, h*w, E), vq_loss).

        The value is the code of the token, the nearest unless tokens (B, h*w) are given, the
        gradient that of z, as if there were no argmax (Bengio et al. 2013).
        vq_loss is the scalar codebook loss plus beta times the commitment loss (van den Oord et al.
        2017, eq. 3): codes move towards the features that chose them, features stay close to the
        codes they chose.  A model in training mode remembers the tokens."""
        tokens = self.quantize.nearest(z) if tokens is None else tokens
        if self.training:
            self.quantize.remember(tokens)
        code = self.quantize.codes()[tokens]                         # (B, h*w, E)
        vq_loss = F.mse_loss(code, z.detach()) + beta * F.mse_loss(z, code.detach())
        return z + (code - z).detach(), vq_loss
