"""What a run's models draw for `harness.page` to show.

    progress/           the same prompts and seeds every few steps, as the policy changes
    report.npz          pictures and scores before and after; and, token by token for some of them,
                        where the policy changed its mind: how sure it was of a code, how likely it
                        found the one that was drawn, and which five it found likeliest, with what
                        they look like

A gallery is what `evaluate` returns: a list of Shown, the pictures of a prompt each.
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
from harness.page import SMALL, sheet
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
        self.vq, self.prompts, self.settings = vq, prompts, settings
        self.reward_fn, self.measure, self.folder = reward_fn, measure, folder
        images = min(32, settings.prompts_per_step * settings.group_size // 4)
        count = min(len(prompts.texts), max(1, images // SAMPLES))
        self.index = torch.linspace(0, len(prompts.texts) - 1, count).long()
        self.started, self.spent, self.last = started, 0.0, 0.0

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
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{done:06}.{kind}"
        picture = sheet(blocks, 2, cell, [title])
        write_atomically(path, lambda file: picture.save(file, kind, quality=90))
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
    """A gallery as arrays: pictures (M, n, H, W, 3) and scores (names, M, n)."""
    names = [*gallery[0].scores]
    scores = [[shown.scores[name] for shown in gallery] for name in names]
    return {
        "texts": np.array([shown.text for shown in gallery]),
        "names": np.array(names),
        when: to_uint8(torch.stack([shown.images for shown in gallery])).numpy(),
        f"scores_{when}": np.array(scores, np.float32),
    }


def most_changed(before, after, count):
    """Which pictures gained most reward: [(row, sample), ...], one a prompt, in two galleries.

    Of equal gains that comes first whose pixels changed most."""
    gains = []
    for row, (old, new) in enumerate(zip(before, after)):
        moved = (new.images - old.images).abs().mean(dim=(1, 2, 3)).tolist()
        gain = np.array(new.rewards, float) - np.array(old.rewards, float)
        gain = np.nan_to_num(gain).tolist()      # nothing, where a reward is missing
        best = max(range(len(gain)), key=lambda i: (gain[i], moved[i]))
        gains.append((gain[best], moved[best], row, best))
    return [(row, sample) for *_, row, sample in sorted(gains, reverse=True)[:count]]


@torch.no_grad()
def code_logp(model, prompts, index, tokens, settings):
    """Log-probabilities of all codes, (Q, N, V), for images (Q, N) of the prompts at index (Q,).

    After guidance and temperature: the distribution that rollouts are drawn from."""
    device = next(model.parameters()).device
    rows = []
    for some, drawn in zip(index.split(2), tokens.to(device).split(2)):
        cond, cond_mask = prompts.pick(some, device)
        both, masks = argrpo.both_branches(model, cond, cond_mask, settings.cfg_scale)
        with argrpo.autocast(device):
            logits = model(drawn.repeat(len(both) // len(cond), 1), both, masks)
        logits = argrpo.guide(logits, settings.cfg_scale) / settings.temperature
        rows.append(logits.log_softmax(-1))
    return torch.cat(rows)


@torch.no_grad()
def paint(vq, tokens, place, codes, micro_batch=None):
    """What codes (k,) look like at a place of the images (k, N), all other tokens as they are.

    Each is painted with the whole image, and cut out with a margin of one patch, or half a one
    where they are many: (k, 3, h, w)."""
    side = isqrt(tokens.shape[1])
    exchanged = tokens.clone()
    exchanged[:, place] = codes
    images = argrpo.to_images(vq, exchanged, micro_batch)            # (k, 3, H, W)
    patch = images.shape[-1] // side
    margin = patch if side <= 8 else patch // 2
    images = F.pad(images, (margin,) * 4, value=1.0)                 # white
    y, x = place // side * patch, place % side * patch
    return images[..., y:y + patch + 2 * margin, x:x + patch + 2 * margin].cpu()


def painted_patches(vq, tokens, top, kl, micro_batch=None):
    """Patches (K, 3, h, w) of the codes in top (2, Q, N, 5), and which patch is whose.

    The tokens of which the policies disagree most come first, until SECONDS are over."""
    patches, patch_of, count = [], torch.full(top.shape, -1), 0
    deadline = time.perf_counter() + SECONDS
    for place in kl.mean(dim=0).argsort(descending=True).tolist():
        images, codes = [], []                   # all different codes of all pictures, one by one
        for q, picture in enumerate(tokens):
            some, which = top[:, q, place].unique(return_inverse=True)               # (k,), (2, 5)
            patch_of[:, q, place] = which.cpu() + count
            count += len(some)
            images.append(picture.expand(len(some), -1))
            codes.append(some)
        patches.append(paint(vq, torch.cat(images), place, torch.cat(codes), micro_batch))
        if time.perf_counter() > deadline:
            break
    return torch.cat(patches), patch_of


def mind_arrays(reference, model, vq, prompts, before, after, settings):
    """The arrays of the closer look, from the models and their galleries before and after.

    Of some prompts both pictures, as drawn before and after.  For both models: entropy and logp
    (2, Q, N), top codes and their log-probabilities (2, Q, N, 5), and the number of each code's
    patch (2, Q, N, 5), or -1 where the time did not suffice; kl (Q, N) of after to before."""
    count = 4 if model.config.block_size <= 64 else 2
    chosen = [(gallery[row], sample) for row, sample in most_changed(before, after, count)
              for gallery in (before, after)]
    index = torch.tensor([shown.prompt for shown, _ in chosen])
    tokens = torch.stack([shown.tokens[i] for shown, i in chosen])                   # (Q, N)
    tokens = tokens.to(next(model.parameters()).device)
    logp = torch.stack([code_logp(policy, prompts, index, tokens, settings)
                        for policy in (reference, model)])                           # (2, Q, N, V)
    top_logp, top = logp.topk(TOP)                                                   # (2, Q, N, 5)
    kl = argrpo.kl_exact(logp[1], logp[0])                                           # (Q, N)
    patches, patch_of = painted_patches(vq, tokens, top, kl, settings.micro_batch)
    arrays = dict(
        tokens=tokens, kl=kl, top=top, top_logp=top_logp, patch_of=patch_of,
        entropy=-(logp.exp() * logp).sum(-1),                                        # (2, Q, N)
        logp=logp.gather(-1, tokens.expand(2, -1, -1)[..., None])[..., 0],           # (2, Q, N)
        pictures=to_uint8(torch.stack([shown.images[i] for shown, i in chosen])),
        patches=to_uint8(patches))
    texts = {"mind_texts": np.array([shown.text for shown, _ in chosen])}
    return texts | {f"mind_{name}": array.cpu().numpy() for name, array in arrays.items()}
