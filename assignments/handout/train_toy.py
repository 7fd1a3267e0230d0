"""Trains the toy with your argrpo.py, and draws what it has learned.

    python train_toy.py                      # 40 steps for the toy's own reward
    python train_toy.py --reward             # for my_reward, on the prompts of part 4.1
    python train_toy.py --log mine.jsonl     # the metrics, one line a step, as in debug/
"""

import argparse
import json

import torch
from PIL import Image

import argrpo
import toy
from diversity import group_diversity
from reward import to_uint8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", action="store_true", help="train for my_reward")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--log", help="file for the metrics")
    args = parser.parse_args()
    reward, texts, how = toy.verify, toy.CLASSES, dict(prompts_per_step=8, group_size=8)
    if args.reward:
        from my_reward import my_reward
        reward, how = my_reward, dict(prompts_per_step=4, group_size=12)
        texts = [text for text in toy.CLASSES if not text.startswith("three")]

    model, vq = toy.load("c2i")
    reference, _ = toy.load("c2i")
    prompts = argrpo.Prompts(texts, torch.tensor([toy.CLASSES.index(text) for text in texts]))
    config = argrpo.GRPOConfig(steps=args.steps, lr=1.5e-3, micro_batch=None, **how)
    before, lines = share_of_right(model, vq, prompts), []
    for step in argrpo.train(model, reference, vq, prompts, lambda *batch: (reward(*batch), {}),
                             config, argrpo.make_optimizer(model, config)):
        m = step.metrics
        m["diversity"] = group_diversity(step.images, config.group_size).mean().item()
        m["verified"] = toy.verify(step.images, step.texts).mean().item()
        lines.append(json.dumps(m))
        print(f"step {m['step']:3d}  reward {m['reward']:.3f}  verified {m['verified']:.3f}  "
              f"kl {m['kl']:.4f}  entropy {m['entropy']:.3f}", flush=True)
    if args.log:
        with open(args.log, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    after = share_of_right(model, vq, prompts)
    print(f"right pictures, of fixed random numbers: {before:.0%} before, {after:.0%} after")
    draw("pictures.png", model, vq, prompts)


def share_of_right(model, vq, prompts):
    """What share of 16 pictures of each prompt shows what the prompt asks for."""
    index = torch.arange(len(prompts.texts))
    _, _, images = argrpo.draw_images(model, vq, prompts, index, argrpo.rng_for("cpu", "share"),
                                      samples_per_prompt=16)
    texts = [text for text in prompts.texts for _ in range(16)]
    return toy.verify(images, texts).mean().item()


def draw(path, model, vq, prompts):
    """Eight pictures of each of nine prompts, a row a prompt, as a PNG file."""
    index = torch.linspace(0, len(prompts.texts) - 1, 9).long()
    _, _, images = argrpo.draw_images(model, vq, prompts, index, argrpo.rng_for("cpu", "drawn"),
                                      samples_per_prompt=8)
    grid = torch.cat([torch.cat(list(row), dim=2) for row in images.split(8)], dim=1)
    pixels = to_uint8(grid.repeat_interleave(4, 1).repeat_interleave(4, 2))
    Image.fromarray(pixels.numpy()).save(path)
    print(f"wrote {path}, from top to bottom: {', '.join(prompts.texts[i] for i in index)}")


if __name__ == "__main__":
    main()
