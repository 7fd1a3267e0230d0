"""Makes the students' folder, and Gradescope's zip, from the repository itself.

    python assignments/make.py --out handout/                     # and handout.key.json beside it
    python assignments/make.py --out handout/ --debug-seed 7      # other runs to debug
    python assignments/make.py --out handout/ --variant loo       # another objective
    python assignments/make.py --solution perfect/ --key handout.key.json     # what gets 100 of 100
    python assignments/make.py --gradescope grader.zip --key handout.key.json --seed 12345

STAFF.md tells the rest.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import faults  # noqa: E402
import grade  # noqa: E402
import source  # noqa: E402
import torch  # noqa: E402
from catalogue import VARIANTS  # noqa: E402
from source import HERE, ROOT  # noqa: E402

PUBLIC_SEED = 0
GIVEN = ("vqgan.py", "reward.py", "pretrained.py", "diversity.py", "toy", "rewards/__init__.py",
         "rewards/shapes.py", "LICENSE", "assignments/checks")
GRADER = (*GIVEN, "argrpo.py", "harness", "assignments")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def copy(names, out):
    """Copies files and folders of the repository to the same places under `out`."""
    for name in names:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=SKIPPED, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / name, target)


def blanked(variant=None):
    """argrpo.py with all items blank."""
    text = source.reference(variant)
    for item in source.parts(variant)["item"].values():
        if "file" not in item:
            text = source.with_blank(text, item)
    return text


def make_handout(out, debug_seed=0, variant=None, steps=20):
    """Makes the students' folder `out`, which must not exist or be empty.  Returns the key:
    {"variant", "debug_seed", "runs": {run: {"fault", "shows"}}}."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: name a new folder")
    copy(GIVEN, out)
    shutil.move(out / "assignments/checks", out / "checks")
    shutil.rmtree(out / "assignments")
    shutil.copytree(HERE / "handout", out, ignore=SKIPPED, dirs_exist_ok=True)
    (out / "argrpo.py").write_text(blanked(variant), "utf-8")
    (out / "README.md").write_text(readme(variant), "utf-8")
    hints = {name: item | {"name": source.label(item)}
             for name, item in source.parts(variant)["item"].items()}
    (out / "hints.json").write_text(json.dumps(hints, indent=1) + "\n", "utf-8")
    torch.save(expected(variant), out / "expected.pt")
    key = make_debug_runs(out / "debug", debug_seed, steps)
    (out / "answers.toml").write_text("".join(
        f'[{run}]\nfault = ""\nstep = -1\nmetric = ""\n\n' for run in key), "utf-8")
    return {"variant": variant, "debug_seed": debug_seed, "runs": key}


def expected(variant):
    """What the reference computes in the public tests: {says: [flat values at each level]}."""
    reference = grade.load_reference(variant)
    values = {"seed": PUBLIC_SEED, "faults": list(faults.FAULTS)}
    for check in grade.checks.CHECKS:
        levels = grade.compute(reference, check, PUBLIC_SEED)
        if any(error for _, error, _ in levels):
            raise RuntimeError(f"the reference itself fails: {check.says}: {levels[-1][1]}")
        values[check.says] = [value for value, _, _ in levels]
    return values


def make_debug_runs(folder, seed, steps):
    """Six runs with a fault each, chosen by the seed: {run: {"fault", "shows"}}."""
    rng, key = random.Random(seed), {}
    for number, fault in enumerate(rng.sample(list(faults.FAULTS), 6), start=1):
        for attempt in range(5):                 # a run may be too short to show its fault
            try:
                run_seed = rng.randrange(10 ** 6)
                start = rng.randrange(2, 2 + max(1, steps // 3 - 1))
                made = faults.make_run(folder / f"run_{number}", fault, run_seed, steps, start,
                                       pictures=True)
                break
            except RuntimeError:
                if attempt == 4:
                    raise
        key[f"run_{number}"] = {"fault": fault, "shows": made["shows"]}
        print(f"made {folder}/run_{number}", flush=True)
    return key


def readme(variant):
    rows, told = ["| item | what | points |", "|---|---|---|"], source.parts(variant)
    for part in told["part"]:
        items = [i for i in told["item"].values() if i["id"].startswith(f"{part['number']}.")]
        points = sum(i["points"] for i in items)
        rows.append(f"| **{part['number']}** | **{part['title']}**. Read: {part['reading']} "
                    f"| **{points}** |")
        rows += [f"| {i['id']} | `{source.label(i)}` | {i['points']} |" for i in items]
    table = ["| fault | what is wrong |", "|---|---|"]
    table += [f"| `{name}` | {fault.says} |" for name, fault in sorted(faults.FAULTS.items())]
    says = VARIANTS.get(variant)
    note = f"\n\n**The objective of this course is not the published one**: {says}. Mind the " \
           "docstrings." if says else ""
    text = (HERE / "handout/README.md").read_text("utf-8")
    for name, value in (("title", told["title"]), ("variant", note), ("parts", "\n".join(rows)),
                        ("faults", "\n".join(table))):
        text = text.replace("{" + name + "}", value)
    return text


# ---------------------------------------------------------------------------------------------
# Gradescope
# ---------------------------------------------------------------------------------------------

RUN_AUTOGRADER = """\
#!/usr/bin/env bash
# Gradescope runs this as /autograder/run_autograder.
set -euo pipefail
base=${{AUTOGRADER:-/autograder}}
export OMP_NUM_THREADS=1
mkdir -p "$base/results"
"${{PYTHON:-python3}}" "$base/source/assignments/grade.py" "$base/submission" --seed {seed} \\
    --key "$base/source/key.json" --json "$base/results/results.json"
"""


def make_solution(out, key):
    """Writes the submission that is all right, by the key of a handout, into the new folder out."""
    out.mkdir(parents=True)
    (out / "argrpo.py").write_text(source.reference(key["variant"]), "utf-8")
    shutil.copy(HERE / "solution/my_reward.py", out)
    lines = []
    for run, truth in key["runs"].items():
        metric, steps = next((name, steps) for name, steps in truth["shows"].items() if steps)
        lines.append(f'[{run}]\nfault = "{truth["fault"]}"\nstep = {steps[0]}\n'
                     f'metric = "{metric}"\n')
    (out / "answers.toml").write_text("\n".join(lines), "utf-8")


def make_gradescope(path, key, seed):
    """Writes the zip that Gradescope takes as an autograder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        copy(GRADER, out)
        shutil.copy(HERE / "setup.sh", out / "setup.sh")
        shutil.copy(key, out / "key.json")
        (out / "run_autograder").write_text(RUN_AUTOGRADER.format(seed=seed), "utf-8")
        for script in ("setup.sh", "run_autograder"):
            (out / script).chmod(0o755)
        shutil.make_archive(str(path.with_suffix("")), "zip", out)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes the handout, and Gradescope's zip.")
    parser.add_argument("--out", type=Path, help="folder of the handout")
    parser.add_argument("--debug-seed", type=int, help="of the runs to debug (default: a random "
                        "one, which the key holds; from a small one students can find the faults)")
    parser.add_argument("--variant", choices=list(VARIANTS),
                        help="another objective, of bugs/variants.txt")
    parser.add_argument("--solution", type=Path, help="new folder for the submission that is right")
    parser.add_argument("--gradescope", type=Path, help="zip to write, such as grader.zip")
    parser.add_argument("--key", type=Path, help="key that was made with the handout; with --out "
                                                 "where to write it (default: OUT.key.json)")
    parser.add_argument("--seed", type=int, help="of the hidden inputs, for --gradescope")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not (args.out or args.gradescope or args.solution):
        parser.error("say what to make: --out FOLDER, --solution FOLDER or --gradescope FILE.zip")
    key = args.key or (args.out and args.out.with_name(args.out.name + ".key.json"))
    if args.gradescope and (args.seed is None or key is None):
        parser.error("--gradescope needs --seed, which students must not know, and --key")
    if args.gradescope and args.gradescope.suffix != ".zip":
        parser.error(f"Gradescope takes a file that ends in .zip, not {args.gradescope}")
    if args.solution and (key is None or args.solution.exists()):
        parser.error("--solution needs a new folder, and --key")
    if args.out:
        seed = secrets.randbelow(2 ** 60) if args.debug_seed is None else args.debug_seed
        key.write_text(json.dumps(make_handout(args.out, seed, args.variant), indent=1), "utf-8")
        print(f"wrote {args.out}/ for students, and {key}, which is not for them")
    if not key.is_file():
        parser.error(f"there is no key at {key}: make the handout first")
    if args.solution:
        make_solution(args.solution, json.loads(key.read_text("utf-8")))
        print(f"wrote {args.solution}/, which should get 100 of 100")
    if args.gradescope:
        make_gradescope(args.gradescope, key, args.seed)
        print(f"wrote {args.gradescope}")


if __name__ == "__main__":
    main()
