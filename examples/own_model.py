"""A reward with a model: a class, made once with the device, and called with every batch.

    python train_c2i.py --reward examples/own_model.py:Familiar --out runs/familiar
"""

import torch

import toy


class Familiar:
    """Minus the root of the mean squared error with which the toy's tokenizer redraws a picture, in
    [-1, 0].

    Put your own model in its place.  What it returns may lie on any device."""

    def __init__(self, device):
        _, vq = toy.load("c2i")
        self.model = vq.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts):
        redrawn = self.model.decode(self.model.encode(2 * images - 1))   # (B, 3, H, W) in [-1, 1]
        return -((redrawn + 1) / 2 - images).square().mean(dim=(1, 2, 3)).sqrt()
