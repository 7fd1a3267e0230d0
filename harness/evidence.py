"""What a run leaves for its page, so that the page needs no model: report.npz.

The pictures before and after with their scores; and, token by token for some of them, where the
policy changed its mind: how sure it was of a code, how likely it found the one that was drawn, and
which five it found likeliest, with what they look like.

Shapes: M prompts, n pictures of each, Q pictures looked at closely, N tokens, K painted patches.
"""

import io
import time
from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F

import argrpo
from harness.checkpoints import write_atomically

TOP = 5                                          # likeliest codes of a token that are kept
SECONDS = 20                                     # for painting codes


def as_bytes(images):
    """Images (..., 3, H, W) in [0, 1] -> uint8 (..., H, W, 3)."""
    return images.mul(255).round().byte().movedim(-3, -1).cpu().numpy()


def gallery_arrays(gallery, when):
    """A gallery, a list of Shown, as arrays: pictures (M, n, H, W, 3) and scores (names, M, n)."""
    names = [*gallery[0].scores]
    scores = [[shown.scores[name] for shown in gallery] for name in names]
    return {
        "texts": np.array([shown.text for shown in gallery]),
        "names": np.array(names),
        when: as_bytes(torch.stack([shown.images for shown in gallery])),
        f"scores_{when}": np.array(scores, np.float32),
    }


def write_evidence(path, arrays):
    """The arrays by name, compressed."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(path, lambda out: out.write(file.getvalue()))


# ---------------------------------------------------------------------------------------------
# Where the policy changed its mind
# ---------------------------------------------------------------------------------------------

def most_changed(before, after, count):
    """Which pictures gained most reward: [(row, sample), ...], one a prompt, in two galleries.

    Of equal gains that comes first whose pixels changed most."""
    gains = []
    for row, (old, new) in enumerate(zip(before, after)):
        moved = (new.images - old.images).abs().mean(dim=(1, 2, 3)).tolist()
        gain = np.nan_to_num(np.array(new.rewards) - np.array(old.rewards)).tolist()
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


def mind_arrays(reference, model, vq, prompts, before, after, settings):
    """The arrays of the closer look, from the models and their galleries before and after.

    Of some prompts both pictures, as drawn before and after.  For both models: entropy and logp
    (2, Q, N), top codes and their log-probabilities (2, Q, N, 5), and the number of each code's
    patch (2, Q, N, 5), or -1 where the time did not suffice; kl (Q, N) of after to before."""
    count = 4 if model.config.block_size <= 64 else 2
    chosen = most_changed(before, after, count)
    pairs = [gallery[row] for row, _ in chosen for gallery in (before, after)]
    samples = [sample for _, sample in chosen for _ in range(2)]
    index = torch.tensor([shown.prompt for shown in pairs])
    tokens = torch.stack([shown.tokens[i] for shown, i in zip(pairs, samples)])      # (Q, N)
    tokens = tokens.to(next(model.parameters()).device)
    entropy, logp, top, top_logp, everything = [], [], [], [], []
    for policy in (reference, model):
        all_logp = code_logp(policy, prompts, index, tokens, settings)               # (Q, N, V)
        everything.append(all_logp)
        entropy.append(-(all_logp.exp() * all_logp).sum(-1))
        logp.append(all_logp.gather(-1, tokens[..., None])[..., 0])
        likeliest = all_logp.topk(TOP)
        top.append(likeliest.indices)
        top_logp.append(likeliest.values)
    kl = argrpo.kl_exact(everything[1], everything[0])                               # (Q, N)
    top = torch.stack(top)                                                           # (2, Q, N, 5)
    patches, patch_of = painted_patches(vq, tokens, top, kl, settings.micro_batch)
    numbers = dict(entropy=entropy, logp=logp, top_logp=top_logp)
    return {
        "mind_pictures": as_bytes(torch.stack([p.images[i] for p, i in zip(pairs, samples)])),
        "mind_texts": np.array([shown.text for shown in pairs]),
        "mind_tokens": tokens.cpu().numpy(), "mind_kl": kl.float().cpu().numpy(),
        "mind_top": top.cpu().numpy(), "mind_patch_of": patch_of.numpy(),
        "mind_patches": as_bytes(patches),
        **{f"mind_{name}": torch.stack(two).float().cpu().numpy() for name, two in numbers.items()},
    }


def painted_patches(vq, tokens, top, kl, micro_batch=None):
    """Patches (K, 3, h, w) of the codes in top (2, Q, N, 5), and which patch is whose.

    The tokens of which the policies disagree most come first, until SECONDS are over."""
    patches, patch_of = [], torch.full(top.shape, -1)
    deadline = time.perf_counter() + SECONDS
    for place in kl.mean(dim=0).argsort(descending=True).tolist():
        images, codes = [], []                   # all different codes of all pictures, one by one
        for q, picture in enumerate(tokens):
            some, which = top[:, q, place].unique(return_inverse=True)               # (k,), (2, 5)
            patch_of[:, q, place] = which.cpu() + sum(map(len, patches)) + len(codes)
            images += [picture] * len(some)
            codes += some.tolist()
        patches.append(paint(vq, torch.stack(images), place,
                             torch.tensor(codes, device=tokens.device), micro_batch))
        if time.perf_counter() > deadline:
            break
    return torch.cat(patches), patch_of
