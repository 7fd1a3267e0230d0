"""Makes the checkpoints that labs 5 to 7 share: about an hour on two cores for each seed, once.

    python labs/prepare.py                       # everything, of seed 0
    python labs/prepare.py --seeds 3             # of three seeds
    python labs/prepare.py --only kl,entropy     # some of it

Checkpoints are runs/labs/prepared/NAME-SEED.pt.  What is there is not made again, and a run that
was interrupted goes on with the same command.  With OMP_NUM_THREADS=1 two commands run side by side
without disturbing each other.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import lab
import torch
from gates import add_gates, still
from lab import ROOT

import argrpo
import toy
from harness.checkpoints import save_weights
from pretrained import load_weights
from toy import pretraining

PAPER = dict(prompts_per_step=16, group_size=8, lr=1.6e-3)          # as in train_c2i.py
FOLDER = ROOT / "runs" / "labs" / "prepared"


def by_command(script, *options):
    """A checkpoint that a training command makes."""
    def make(seed, path, quick):
        run = path.with_suffix("")
        command = [sys.executable, ROOT / script, "--preset", "toy", *options, "--seed", str(seed),
                   "--out", run]
        if quick:
            command += ["--steps", "3", "--eval-images", "32", "--prompts-per-step", "8",
                        "--group-size", "8", "--rehearsal-groups", "1", "--rehearsal-steps", "2"]
        elif (run / "last.pt").exists():
            command = [sys.executable, ROOT / script, "--resume", run]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        (run / "model.pt").rename(path)
    return make


def by_loop(**changes):
    """A checkpoint that the paper's recipe for classes makes, with these seams or settings."""
    def make(seed, path, quick):
        model, _ = toy.load("c2i")
        seams = {name: changes[name] for name in changes if name.endswith("_fn")}
        settings = {name: changes[name] for name in changes if name not in seams}
        config = argrpo.GRPOConfig(**PAPER | dict(steps=3 if quick else 75, seed=seed) | settings)
        for step in lab.train(model, config, **seams):
            if step.metrics["step"] % 25 == 24:
                print(f"  step {step.metrics['step']}, reward {step.metrics['reward']:.3f}")
        save_weights(path, model)
    return make


def entropy_loss(logp, old_logp, ref_logp, advantages, entropy):
    """GRPO's loss with the usual KL penalty, less a bonus for the entropy of every choice."""
    loss, stats = argrpo.grpo_loss(logp, old_logp, ref_logp, advantages, kl_beta=0.01)
    return loss - 0.03 * entropy.mean(), stats


def negatives_only(rewards, images, tokens, index, step):
    """-1 for a wrong picture and 0 for a right one (NSR, arXiv 2506.01347)."""
    return rewards - 1


def scenes(seed, count, plain=False):
    """What t2i's pretraining reads: tokens (count, N), and their Prompts, as `lab.prompts_of`."""
    texts = pretraining.choose_texts(seed, count)["t2i"]
    _, vq = toy.load("t2i")
    images = pretraining.draw_scenes("t2i", texts, seed)
    tokens = torch.cat([vq.encode(chunk * 2 - 1) for chunk in images.split(256)])
    return tokens, lab.prompts_of("t2i", texts, plain)


def transformer(table="zero"):
    """An untrained t2i toy, whose rotary table is "zero" at the condition, or "still"."""
    model = argrpo.Transformer(toy.CONFIGS["t2i"])
    return still(model) if table == "still" else model


def pretrained(table, plain=False):
    """A t2i toy from nothing, with that rotary table at the condition."""
    def make(seed, path, quick):
        tokens, prompts = scenes(seed, 400 if quick else 16000, plain)
        rng = pretraining.random_stream(seed, "composition")
        save_weights(path, pretraining.pretrain_gpt(transformer(table), tokens, prompts, rng,
                                                    20 if quick else 1200))
    return make


# How words are looked at that the shipped toy, pretrained with zeros, has never looked at.
SWITCHES = {"zeros": lambda: transformer("zero"), "once": lambda: transformer("still"),
            "gates": lambda: add_gates(transformer("zero"))}


def shipped(switch):
    """The shipped t2i toy, with that switch thrown."""
    model, (published, _) = SWITCHES[switch](), toy.load("t2i")
    model.load_state_dict(published.state_dict(), strict=False)      # all but the gates
    return model


def tuned(switch):
    """The shipped toy, trained on by likelihood with that switch thrown."""
    def make(seed, path, quick):
        tokens, prompts = scenes(seed, 200 if quick else 6000)
        rng = pretraining.random_stream(seed, "switch")
        save_weights(path, pretraining.pretrain_gpt(shipped(switch), tokens, prompts, rng,
                                                    5 if quick else 400, lr=1e-3))
    return make


def reinforced(build, start=None):
    """The paper's recipe from a prepared checkpoint on, or from the model that build() makes, with
    the settings of the toy's classes.  The reference is the policy at its start."""
    def make(seed, path, quick):
        model, reference = build(), build()
        if start:
            begin = path.with_name(f"{start}-{seed}.pt")
            if not begin.exists():               # --only may have left it out
                JOBS[start](seed, begin, quick)
            for part in (model, reference):
                load_weights(part, begin)
        config = argrpo.GRPOConfig(**PAPER | dict(steps=3 if quick else 75, seed=seed))
        for _ in lab.train(model, config, task="t2i", reference=reference.requires_grad_(False),
                           prompts=lab.prompts_of("t2i")):
            pass
        save_weights(path, model)
    return make


JOBS = {
    "paper": by_command("train_c2i.py"),
    "diverse": by_command("train_c2i.py", "--recipe", "diverse"),
    "kl": by_loop(kl_beta=0.1),
    "entropy": by_loop(loss_fn=entropy_loss),
    "negatives": by_loop(advantage_fn=negatives_only),
    "t2i_paper": by_command("train_t2i.py"),
    "t2i_diverse": by_command("train_t2i.py", "--recipe", "diverse"),
    "zero": pretrained("zero"),
    "still": pretrained("still"),
    "zero_plain": pretrained("zero", plain=True),
    "still_plain": pretrained("still", plain=True),
    "zero_paper": reinforced(lambda: transformer("zero"), "zero"),
    "still_paper": reinforced(lambda: transformer("still"), "still"),
    "zeros_tuned": tuned("zeros"),
    "once_tuned": tuned("once"),
    "gates_tuned": tuned("gates"),
    "zeros_tuned_paper": reinforced(SWITCHES["zeros"], "zeros_tuned"),
    "gates_tuned_paper": reinforced(SWITCHES["gates"], "gates_tuned"),
    "zeros_shipped_paper": reinforced(lambda: shipped("zeros")),
    "gates_shipped_paper": reinforced(lambda: shipped("gates")),
}


def prepared(experiment, name, seed):
    """The path of a prepared checkpoint.  With --quick a short run makes one that is good for
    nothing but a trial."""
    options = experiment.options
    folder = options.out / "quick" if options.quick else FOLDER
    path = folder / f"{name}-{seed}.pt"
    if options.quick and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        JOBS[name](seed, path, quick=True)
    return path


def require(experiment, *names):
    """Ends the lab, before it does anything, if a checkpoint that it needs is missing."""
    options = experiment.options
    if options.quick or options.stored:
        return
    missing = sorted({name for name in names for seed in range(options.seeds)
                      if not prepared(experiment, name, seed).exists()})
    if missing:
        sys.exit(f"error: {FOLDER} lacks checkpoints of {', '.join(missing)}; this makes them: "
                 f"python labs/prepare.py --only {','.join(missing)} --seeds {options.seeds}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many training seeds, from 0 on")
    parser.add_argument("--only", default="", help=f"some of {', '.join(JOBS)}")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(JOBS)
    unknown = set(names) - set(JOBS)
    if unknown:
        parser.error(f"nothing is called {', '.join(sorted(unknown))}: choose among "
                     f"{', '.join(JOBS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for name in names:
            path = FOLDER / f"{name}-{seed}.pt"
            if not path.exists():
                print(f"{path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path}",
                      flush=True)
                JOBS[name](seed, path, quick=False)


if __name__ == "__main__":
    main()
