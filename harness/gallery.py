"""What a run's models draw for `harness.page` to show.

    progress/           the same prompts and seeds every few steps, as the policy changes
    report.npz          pictures and scores before and after; and, token by token for some of them,
                        where the policy changed its mind: how sure it was of a code, how likely it
                        found the one that was drawn, and which five it found likeliest, with what
                        they look like

A gallery is what `evaluate` returns beside the scores.
Shapes: M prompts, n pictures of each, Q pictures looked at closely, N tokens, K painted patches.
"""

import time
from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F

import argrpo
from harness.before_after import draw_like_rollout
from harness.logs import write_atomically
from harness.page import SMALL, highest, rewards_of, sheet
from reward import to_uint8

LARGE = 144                                      # pixels of a side, but for SMALL pictures
SHARE = 0.05                                     # of a run's time that pictures of progress take
SAMPLES = 4                                      # pictures of each prompt of theirs
TOP = 5                                          # likeliest codes of a token that are kept
SECONDS = 20                                     # for painting codes


# ---------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------

class Progress:
    """Draws a picture whenever `draw` is called, unless pictures have taken too long already.

    It has a quarter as many images as a step, 32 at most: SAMPLES of each of some prompts, evenly
    chosen.  What draws has random streams of its own and no gradient: the training is the same
    without it.  measure(images, texts) may give "verified"; else reward_fn's total is averaged.
    started is when the run began, by time.perf_counter."""

    def __init__(self, vq, prompts, reward_fn, settings, measure, folder, started):
        self.vq, self.prompts, self.reward_fn, self.settings = vq, prompts, reward_fn, settings
        self.measure, self.folder, self.started = measure, folder, started
        self.spent = self.last = 0.0             # seconds: of all pictures, and of the last one
        images = min(32, settings.prompts_per_step * settings.group_size // 4)
        count = min(len(prompts.texts), max(1, images // SAMPLES))
        self.index = torch.linspace(0, len(prompts.texts) - 1, count).long()

    def is_due(self, done):
        """Whether a picture belongs to the moment after `done` steps, and there is time for it."""
        s = self.settings
        if not s.progress_every or (done % s.progress_every and done != s.steps):
            return False
        return self.spent + self.last <= SHARE * (time.perf_counter() - self.started)

    def draw(self, model, done):
        """Draws what the model draws after `done` steps, and returns the picture's path."""
        start, s = time.perf_counter(), self.settings
        texts, _, _, images = draw_like_rollout(model, self.vq, self.prompts, self.index, s,
                                                SAMPLES, "progress")
        title = f"step {done} of {s.steps}:   {self.score(images, texts)}"
        kind, cell = ("png", SMALL) if images.shape[-1] <= SMALL else ("jpeg", LARGE)
        pixels = to_uint8(images).numpy()
        blocks = [(texts[i], pixels[i:i + SAMPLES], ()) for i in range(0, len(texts), SAMPLES)]
        picture = sheet(blocks, 2, cell, [title])
        self.folder.mkdir(exist_ok=True)
        path = write_atomically(self.folder / f"{done:06}.{kind}",
                                lambda file: picture.save(file, kind, quality=90))
        self.last = time.perf_counter() - start
        self.spent += self.last
        return path

    def score(self, images, texts):
        """What a picture's corner says of its images."""
        measured = self.measure(images, texts)
        if "verified" in measured:
            return f"{measured['verified'].nanmean():.0%} right"
        total, _ = self.reward_fn(images, texts)
        return f"reward {total.nanmean():.3f}"


# ---------------------------------------------------------------------------------------------
# report.npz: what the page needs in the place of models
# ---------------------------------------------------------------------------------------------

def write_arrays(path, arrays):
    """Arrays by name, compressed."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def gallery_arrays(gallery, when):
    """What report.npz holds of a gallery, from "before" or "after" training."""
    return {"texts": gallery["texts"], "names": gallery["names"], when: gallery["pictures"],
            f"scores_{when}": gallery["scores"]}


@torch.no_grad()
def code_logp(model, prompts, index, tokens, settings):
    """Log-probabilities of all codes, (Q, N, V), for images (Q, N) of the prompts at index (Q,).

    After guidance and temperature: the distribution that rollouts are drawn from."""
    cond, cond_mask = prompts.pick(index, tokens.device)
    both, masks = argrpo.both_branches(model, cond, cond_mask, settings.cfg_scale)
    with argrpo.autocast(tokens.device):
        logits = model(tokens.repeat(len(both) // len(cond), 1), both, masks)
    return (argrpo.guide(logits, settings.cfg_scale) / settings.temperature).log_softmax(-1)


def cut_out(vq, tokens, place, micro_batch=None):
    """What the images (k, N) show at a place: (k, 3, h, w).

    There is a margin of one patch around it, or half a one where they are many."""
    side, images = isqrt(tokens.shape[1]), argrpo.to_images(vq, tokens, micro_batch)
    patch = images.shape[-1] // side
    margin = patch if side <= 8 else patch // 2
    images = F.pad(images, (margin,) * 4, value=1.0)                 # white
    y, x = place // side * patch, place % side * patch
    return images[..., y:y + patch + 2 * margin, x:x + patch + 2 * margin].cpu()


def painted_patches(vq, tokens, top, kl, micro_batch=None):
    """Patches (K, 3, h, w) of the codes in top (2, Q, N, 5), and which patch is whose.

    Each is cut out of a picture in which that code alone is exchanged.  The tokens of which the
    policies disagree most come first, until SECONDS are over."""
    patches, patch_of, count = [], torch.full(top.shape, -1), 0
    V, deadline = top.max() + 1, time.perf_counter() + SECONDS
    first = V * torch.arange(len(tokens), device=top.device)[:, None]                # (Q, 1)
    for place in kl.mean(dim=0).argsort(descending=True).tolist():
        # All different codes of all pictures: code c of picture q has the number q V + c.
        numbers, which = (first + top[:, :, place]).unique(return_inverse=True)  # (k,), (2, Q, 5)
        exchanged = tokens[numbers // V]                                             # (k, N)
        exchanged[:, place] = numbers % V
        patches.append(cut_out(vq, exchanged, place, micro_batch))
        patch_of[:, :, place] = which.cpu() + count
        count += len(numbers)
        if time.perf_counter() > deadline:
            break
    return torch.cat(patches), patch_of


def mind_arrays(reference, model, vq, prompts, before, after, settings):
    """The arrays of the closer look, from the models and their galleries before and after.

    Of the prompts whose pictures gained most reward, both pictures, as drawn before and after.  For
    both models: entropy and logp (2, Q, N), top codes and their log-probabilities (2, Q, N, 5), and
    the number of each code's patch (2, Q, N, 5), or -1 where the time did not suffice; kl (Q, N) of
    after to before."""
    both = gallery_arrays(before, "before") | gallery_arrays(after, "after")
    old, new = rewards_of(both)
    gained = highest(new - old, both, 4 if model.config.block_size <= 64 else 2)
    chosen = [(gallery, place) for place in gained for gallery in (before, after)]
    rows = [row for _, (row, _) in chosen]
    tokens = torch.from_numpy(np.stack([gallery["tokens"][place] for gallery, place in chosen]))
    tokens = tokens.to(next(model.parameters()).device)                              # (Q, N)
    index = torch.from_numpy(before["prompts"][rows])
    logp = torch.stack([code_logp(policy, prompts, index, tokens, settings)
                        for policy in (reference, model)])                           # (2, Q, N, V)
    top_logp, top = logp.topk(TOP)                                                   # (2, Q, N, 5)
    kl = argrpo.kl_exact(logp[1], logp[0])                                           # (Q, N)
    patches, patch_of = painted_patches(vq, tokens, top, kl, settings.micro_batch)
    arrays = dict(
        tokens=tokens, kl=kl, top=top, top_logp=top_logp, patch_of=patch_of,
        entropy=-(logp.exp() * logp).sum(-1),                                        # (2, Q, N)
        logp=logp.gather(-1, tokens.expand(2, -1, -1)[..., None])[..., 0],           # (2, Q, N)
        patches=to_uint8(patches))
    return {f"mind_{name}": array.cpu().numpy() for name, array in arrays.items()} | {
        "mind_texts": before["texts"][rows],
        "mind_pictures": np.stack([gallery["pictures"][place] for gallery, place in chosen])}
