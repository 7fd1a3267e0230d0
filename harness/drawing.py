"""Many pictures of one checkpoint, each with a random stream of its own, in shards on the disk.

What picture number i becomes depends on the seed, on i and on its prompt: not on what is drawn
beside it, on how many processes draw, nor on what interrupted them (but for rounding, which may
differ with the number of rows).  So pictures of two checkpoints can be compared one by one.
"""

import hashlib
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import argrpo
from harness.checkpoints import write_atomically, write_json
from harness.fid import as_uint8

SHARD = 64                                       # pictures of a file


def draw(model, vq, prompts, index, numbers, seed, best_of=1, **policy):
    """The pictures with those numbers, of the prompts at index (B,): images (B, 3, H, W) in [0, 1]
    and logp (B, N).  policy is what `generate` takes: cfg_scale, temperature, top_k, top_p.

    Of best_of draws, each is the one that the model itself finds likeliest."""
    device = next(model.parameters()).device
    keys = [(number,) if k == 0 else (number, k) for number in numbers for k in range(best_of)]
    streams = [argrpo.rng_for(device, seed, "image", *key) for key in keys]
    uniform = torch.stack([torch.rand(model.config.block_size, generator=rng, dtype=torch.float64,
                                      device=device) for rng in streams])
    _, logp, images = argrpo.draw_images(model, vq, prompts, index.repeat_interleave(best_of),
                                         None, uniform=uniform, micro_batch=16, **policy)
    likeliest = logp.sum(1).view(-1, best_of).argmax(1)                              # (B,)
    kept = torch.arange(len(index), device=likeliest.device) * best_of + likeliest
    return images[kept], logp[kept]


def fingerprint(model):
    """A few letters that tell one model's weights from another's."""
    digest = hashlib.blake2b(digest_size=8)
    for name, p in model.state_dict().items():
        some = p.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {p.float().sum().item():.6e} {some.tolist()}".encode())
    return digest.hexdigest()


def draw_shards(model, vq, prompts, index, folder, seed, size=None, shard=(0, 1), **policy):
    """Draws picture i of prompt index[i], for all i, into files of SHARD pictures in the folder.

    A file, such as 00003.npz, holds `images` (n, H, W, 3) uint8, at most `size` pixels wide, and
    `entropy` (n,), -log pi a token.  Files that are there are kept: a draw goes on where it
    stopped.  shard = (rank, count) takes this process's share of the files.
    Raises ValueError if the folder holds pictures of another model or other settings."""
    rank, count = shard
    folder.mkdir(parents=True, exist_ok=True)
    texts = hashlib.blake2b(repr(prompts.texts).encode(), digest_size=8).hexdigest()
    made = dict(model=fingerprint(model), seed=seed, size=size, images=len(index), prompts=texts,
                **policy)
    path = folder / "drawn.json"
    if path.exists() and json.loads(path.read_text()) != made:
        raise ValueError(f"{folder} holds pictures of another model, other prompts or settings: "
                         "name another folder, or remove it")
    if rank == 0 and not path.exists():
        write_json(path, made)
    mine = list(enumerate(torch.arange(len(index)).split(SHARD)))[rank::count]
    left = [(k, numbers) for k, numbers in mine if not shard_path(folder, k).exists()]
    for k, numbers in tqdm(left, desc=f"drawing {folder.name}", unit="shard", disable=rank > 0
                           or bool(os.environ.get("TQDM_DISABLE"))):
        images, logp = draw(model, vq, prompts, index[numbers], numbers.tolist(), seed, **policy)
        arrays = dict(images=as_uint8(images.cpu(), size), entropy=-logp.mean(1).float().cpu())
        write_atomically(shard_path(folder, k), lambda file, a=arrays: np.savez(file, **a))


def shard_path(folder, k):
    return folder / f"{k:05}.npz"


def shards(folder):
    """The complete shards of a folder, in order: their paths."""
    return sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9].npz"))


def read_shard(path, name="images"):
    with np.load(path) as file:
        return file[name]


def read_shards(folder, name="images"):
    """One array of all shards, joined."""
    return np.concatenate([read_shard(path, name) for path in shards(folder)])


def read_pictures(folder, numbers):
    """The pictures with those numbers: (n, H, W, 3) uint8."""
    return np.stack([read_shard(shard_path(folder, i // SHARD))[i % SHARD] for i in numbers])


def as_images(pictures):
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
