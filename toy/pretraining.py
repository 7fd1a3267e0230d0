"""Pretrains the toy's tokenizer and transformers from nothing: minutes on two cores.

    python -m toy                       # renders scenes, trains the tokenizer and the transformers
    python -m toy --out my_weights      # the same, somewhere else

Shapes: M pictures in all, b of them in a batch, N tokens a picture, V codes, C numbers a code.
"""

import argparse
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from argrpo import Transformer, to_images
from toy.models import CONFIGS, FOLDER, VQ_CONFIG, as_prompts
from toy.scenes import CLASSES, GROUND, SEEN_CLASSES, SEEN_PAIRS, make_scene, render
from toy.verifier import verify
from vqgan import VQModel

# The transformers stop early enough to leave reinforcement learning something to do.
STEPS = {"vq": 2400, "c2i": 800, "t2i": 1200}


def learning_rate_factor(step, steps, warmup=20):
    """A short linear warm-up, then half a cosine down to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def pretrain(model, loss_of, rng, *, name, steps, data_size, batch_size, lr, weight_decay,
             after_step=None):
    """AdamW on loss_of(indices of a random batch).  The loop of all three pretrainings."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, steps)
        index = torch.tensor(rng.sample(range(data_size), batch_size))
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(step)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


# ---------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------

GROUND_CODE = 0                                  # the one code for a patch of nothing but ground


def ground_patches(images):
    """Which patches show only ground: images (B, 3, SIZE, SIZE) in [0, 1] -> (B, N) bool."""
    patch = 2 ** (len(VQ_CONFIG.ch_mult) - 1)
    deviation = (images - GROUND.view(1, 3, 1, 1)).abs().amax(dim=1, keepdim=True)
    return F.max_pool2d(deviation, patch).flatten(1) < 0.01


@torch.no_grad()
def restart_dead_codes(vq, images, ground):
    """Moves the codes that training has not used lately onto features of the given pictures.

    Patches of the ground are left out."""
    latest = vq.quantize.codebook_used[-8192:].long()
    uses = torch.bincount(latest, minlength=vq.config.codebook_size)                 # (V,)
    dead = (uses == 0).nonzero()[:, 0]
    features = vq.features(images)[~ground]                                          # (.., C)
    chosen = torch.randint(len(features), (len(dead),))
    vq.quantize.embedding.weight[dead] = features[chosen]


def pretrain_vq(images, rng, steps):
    """A tokenizer for the pictures (M, 3, SIZE, SIZE) in [0, 1]."""
    vq = VQModel(VQ_CONFIG)
    ground = ground_patches(images)                                                  # (M, N)
    pixels = images * 2 - 1

    def loss_of(index):
        x, is_ground = pixels[index], ground[index]
        features = vq.features(x)                                                    # (b, N, C)
        tokens = torch.where(is_ground, GROUND_CODE, vq.quantize.nearest(features))
        codes, vq_loss = vq.straight_through(features, tokens)
        side = math.isqrt(tokens.shape[1])
        reconstruction = vq.from_codes(codes, side, side)
        # Left alone, the encoder describes the neighbours in the ground's patches, with 80 codes
        # that look the same.  The transformer would have to learn that noise, and GRPO after it.
        cosines = features[is_ground] @ vq.quantize.codes().detach().T               # (.., V)
        targets = torch.full((len(cosines),), GROUND_CODE)
        ground_loss = F.cross_entropy(10 * cosines, targets)
        pixel_loss = F.mse_loss(reconstruction, x) + 0.3 * F.l1_loss(reconstruction, x)
        # A large weight on vq_loss freezes the codes before they are good: the verifier sees that.
        return pixel_loss + 0.1 * vq_loss + 0.02 * ground_loss

    def after_step(step):
        if step % 25 == 24 and step < 0.7 * steps:
            chosen = rng.sample(range(len(pixels)), 32)
            restart_dead_codes(vq, pixels[chosen], ground[chosen])

    return pretrain(vq, loss_of, rng, name="tokenizer", steps=steps, data_size=len(pixels),
                    batch_size=8, lr=5e-3, weight_decay=0.0, after_step=after_step)


# ---------------------------------------------------------------------------------------------
# The transformers
# ---------------------------------------------------------------------------------------------

def pretrain_gpt(gpt, tokens, prompts, rng, steps, lr=3e-3):
    """Teaches a transformer to write the tokens (M, N) of the M Prompts, by maximum likelihood."""
    def loss_of(index):
        cond, cond_mask = prompts.pick(index, tokens.device)
        # Sometimes there is no condition, so that guidance has a null branch.
        drop = torch.rand(len(index)) < 0.1
        drop = drop.view(-1, *[1] * (cond.ndim - 1))
        cond = torch.where(drop, gpt.null_cond(cond), cond)
        logits = gpt(tokens[index], cond, cond_mask)                                 # (b, N, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens[index].flatten())

    return pretrain(gpt, loss_of, rng, name=gpt.config.model_type, steps=steps,
                    data_size=len(tokens), batch_size=32, lr=lr, weight_decay=0.05)


# ---------------------------------------------------------------------------------------------
# All three
# ---------------------------------------------------------------------------------------------

def random_stream(seed, *purpose):
    """Seeds torch, and returns a random.Random, with numbers that depend on seed and purpose only.

    Every purpose has a stream of its own, so that one can change alone."""
    torch.manual_seed(seed)
    return random.Random(f"{seed} {purpose}")


def choose_texts(seed, n):
    """The prompts of each task's n pictures: {task: texts}.  t2i leaves out what is unseen."""
    rng = random_stream(seed, "t2i prompts")
    return {
        "c2i": [CLASSES[k % len(CLASSES)] for k in range(n)],
        "t2i": [rng.choice(SEEN_CLASSES if k % 2 else SEEN_PAIRS) for k in range(n)],
    }


def draw_scenes(task, texts, seed):
    """A picture of each text, (M, 3, SIZE, SIZE), the same whenever the task needs them."""
    rng = random_stream(seed, task, "scenes")
    return render([make_scene(text, rng) for text in texts])


def save(model, path):
    """LlamaGen's checkpoint format, in half precision."""
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    torch.save({"model": weights}, path)


def pretrain_toy(out, seed=0, scenes=16000):
    """Writes toy_vq.pt, toy_c2i.pt and toy_t2i.pt into a folder.  scenes: pictures per task.

    They go together: nothing is written until all are made."""
    out.mkdir(parents=True, exist_ok=True)
    texts = choose_texts(seed, scenes)
    images = {task: draw_scenes(task, texts[task], seed) for task in texts}
    vq = pretrain_vq(torch.cat([*images.values()]), random_stream(seed, "tokenizer"), STEPS["vq"])
    vq.half().float().requires_grad_(False)      # rounded, as everybody will have it
    models = {"vq": vq}
    for task in texts:
        tokens = torch.cat([vq.encode(chunk * 2 - 1) for chunk in images[task].split(256)])
        right = verify(to_images(vq, tokens[:2000], micro_batch=16), texts[task][:2000]).mean()
        print(f"{task}: the verifier finds {right:.1%} of the tokenizer's reconstructions right")
        prompts = as_prompts(task, texts[task])
        rng = random_stream(seed, task)
        gpt = Transformer(CONFIGS[task])
        models[task] = pretrain_gpt(gpt, tokens, prompts, rng, STEPS[task])
    for name, model in models.items():
        save(model, out / f"toy_{name}.pt")
    print(f"wrote toy_vq.pt, toy_c2i.pt and toy_t2i.pt into {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER,
                        help="folder for the three checkpoints (default: toy/weights)")
    pretrain_toy(parser.parse_args(argv).out)
