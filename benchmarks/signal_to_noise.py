"""How much of a step's gradient is signal: of the reward, the diversity bonus, and rehearsal.

    python benchmarks/signal_to_noise.py runs/train_c2i-toy-diverse        # a finished toy run, c2i

Draws several steps' pictures from the run's final policy and takes the gradient of each term by
itself, in AdamW's coordinates: every entry is divided by the root of its running square, as the
update divides it.  Signal is the squared length of the expected gradient (estimated without bias),
noise the total variance of one step's.  Cosines are those of the expected gradients, likewise
without the part that is noise.  Signals and cosines have a standard error, by jackknife over the
steps.  The reward is also taken apart by how uncertain the policy was at a token.
"""

import argparse
import math
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
        logp, _ = argrpo.token_logp(model, tokens[rows], cond[rows])
        (-(advantages[rows] * logp).mean() * len(rows) / len(tokens)).backward()
    return gradient(model, scale)


def expected(gram):
    """E[a] . E[b], without bias, from the products (n, n) of independent draws of a and of b.

    Draws of the same step are left out: a and b come from the same pictures there."""
    n = len(gram)
    return ((gram.sum() - gram.trace()) / (n * (n - 1))).item()


def cosine(own, across, other):
    """Of E[a] and E[b], from the products of a with a, of a with b, and of b with b.

    NaN where there are too few steps to see a signal."""
    squares = expected(own), expected(other)
    return expected(across) / math.sqrt(math.prod(squares)) if min(squares) > 0 else math.nan


def with_error(measure, digits, *grams):
    """"value (± standard error)" of measure(*grams), by leaving out one step at a time."""
    n = len(grams[0])
    others = [torch.arange(n) != k for k in range(n)]
    without = torch.tensor([measure(*[gram[kept][:, kept] for gram in grams]) for kept in others])
    error = ((n - 1) * without.var(unbiased=False)).sqrt()
    return f"{measure(*grams):,.{digits}f} (± {error:,.{digits}f})"


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

    found, right, shares = {}, [], {}
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
        right.append(rewards.mean().item())
        with torch.no_grad():
            _, entropy = argrpo.token_logp(model, tokens, cond)
        kinds = {"entropy below 0.3": entropy < 0.3, "entropy above 1": entropy >= 1,
                 "entropy 0.3 to 1": (entropy >= 0.3) & (entropy < 1)}
        terms = {"reward": A[:, None].expand_as(entropy), "bonus": (both - A)[:, None]}
        for kind, tokens_of_it in kinds.items():
            terms[f"reward, {kind}"] = A[:, None] * tokens_of_it
            shares[kind] = shares.get(kind, 0) + tokens_of_it.float().mean().item() / args.steps
        for name, advantages in terms.items():
            term = of_advantages(model, tokens, cond, advantages.expand_as(entropy), scale)
            found.setdefault(name, []).append(term)
        rehearsal(model, index, step)
        found.setdefault("rehearsal", []).append(gradient(model, scale))

    print(f"{sum(right) / len(right):.1%} right; of the tokens have "
          + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()) + "\n")
    print("| term | signal | noise | signal / noise | cosine of its signal to the reward's |")
    print("|---|---|---|---|---|")
    rewards = torch.stack(found["reward"])
    for name, rows in found.items():
        rows = torch.stack(rows)
        own, across = rows @ rows.T, rows @ rewards.T                           # (steps, steps)
        noise = rows.var(0).sum().item()
        print(f"| {name} | {with_error(expected, 0, own)} | {noise:,.0f} "
              f"| {expected(own) / noise:.3f} "
              f"| {with_error(cosine, 2, own, across, rewards @ rewards.T)} |", flush=True)


if __name__ == "__main__":
    main()
