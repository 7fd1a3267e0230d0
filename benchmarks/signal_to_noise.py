"""How much of a step's gradient is signal: of the reward, the diversity bonus, and rehearsal.

    python benchmarks/signal_to_noise.py runs/train_c2i-toy-diverse        # a finished toy run, c2i

Draws several steps' pictures from the run's final policy and takes the gradient of each term by
itself, in AdamW's coordinates: every entry is divided by the root of its running square, as the
update divides it.  Signal is the squared length of the expected gradient (estimated without bias),
noise the total variance of one step's.  The reward is also taken apart by how uncertain the policy
was at a token.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import argrpo  # noqa: E402
import toy  # noqa: E402
from diversity import DiversityBonus, Pixels, Rehearsal  # noqa: E402
from reward import build_rewards  # noqa: E402

P, G, WARM_UP = 16, 16, 5                        # steps that only fill the bonus's memory


def gradient(model, scale):
    """The gradient in AdamW's coordinates, (n,); the model's is cleared."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()]) / scale
    model.zero_grad()
    return flat


def of_advantages(model, tokens, cond, advantages, scale):
    """The gradient of -A log pi for advantages (B, N)."""
    for rows in torch.arange(len(tokens)).split(64):
        logp, _ = argrpo.token_logp(model, tokens[rows], cond[rows], entropy_grad=False)
        (-(advantages[rows] * logp).mean() * len(rows) / len(tokens)).backward()
    return gradient(model, scale)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    model, vq = toy.load("c2i", gpt_path=args.run / "model.pt")
    reference, _ = toy.load("c2i")
    state = torch.load(args.run / "last.pt", weights_only=False)["optimizer"]["state"]
    scale = torch.cat([state[k]["exp_avg_sq"].flatten() for k in sorted(state)]).sqrt() + 1e-8
    prompts = argrpo.Prompts(toy.CLASSES, torch.arange(27))
    config = argrpo.GRPOConfig(prompts_per_step=P, group_size=G)
    reward_fn = build_rewards("shapes", "cpu")
    rehearsal = Rehearsal(reference, vq, prompts, reward_fn, config, 0.3, 8, Pixels())
    bonus = DiversityBonus(rehearsal, 6.0)

    found = {}
    for step in range(WARM_UP + args.steps):
        index = argrpo.pick_prompts(27, step, P, seed=5)
        tokens, _, images = argrpo.draw_images(model, vq, prompts, index,
                                               argrpo.rng_for("cpu", "signal", step),
                                               samples_per_prompt=G, micro_batch=64)
        cond = index.repeat_interleave(G)
        rewards, _ = reward_fn(images, [toy.CLASSES[k] for k in cond.tolist()])
        A = argrpo.group_advantages(rewards, G)
        both = bonus(rewards, images, tokens, index, step)
        if step < WARM_UP:
            continue
        with torch.no_grad():
            _, entropy = argrpo.token_logp(model, tokens, cond)
        terms = {"reward": A[:, None].expand_as(entropy), "bonus": (both - A)[:, None],
                 "reward, entropy below 0.3": A[:, None] * (entropy < 0.3),
                 "reward, entropy 0.3 to 1": A[:, None] * ((entropy >= 0.3) & (entropy < 1)),
                 "reward, entropy above 1": A[:, None] * (entropy >= 1)}
        for name, advantages in terms.items():
            term = of_advantages(model, tokens, cond, advantages.expand_as(entropy), scale)
            found.setdefault(name, []).append(term)
        rehearsal(model, index, step)
        found.setdefault("rehearsal", []).append(gradient(model, scale))

    print("| term | signal | noise | signal / noise | cosine of its mean to the reward's |")
    print("|---|---|---|---|---|")
    means = {name: torch.stack(rows).mean(0) for name, rows in found.items()}
    for name, rows in found.items():
        noise = torch.stack(rows).var(0).sum()
        signal = means[name].square().sum() - noise / len(rows)
        cosine = means[name] @ means["reward"] / means[name].norm() / means["reward"].norm()
        print(f"| {name} | {signal:.0f} | {noise:.0f} | {signal / noise:.3f} | {cosine:.2f} |")


if __name__ == "__main__":
    main()
