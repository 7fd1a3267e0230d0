"""Grades a submission and explains what is wrong.

    python assignments/grade.py SUBMISSION                      # a folder: argrpo.py, my_reward.py,
                                                                # answers.toml
    python assignments/grade.py SUBMISSION --seed 7 --json results.json

Every function is graded inside the reference, all else being right, so that no mistake costs twice.
Every check runs in a process of its own, with limits of time and memory (sandbox.py).  What it
computes is compared with what the reference computes from the same inputs, which the seed decides.
In the end the whole file trains the toy for 40 steps: this is reported and worth no points.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")    # before torch: forked children have one thread
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import checks  # noqa: E402
import source  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402
from catalogue import BUGS  # noqa: E402
from checks import Draw, describe, flat, same, watched  # noqa: E402
from sandbox import Job, in_words, run_all  # noqa: E402


class Result(NamedTuple):
    """What an item, or another test, came to."""
    name: str
    score: float
    points: float
    output: str


class Wrong(NamedTuple):
    """A check that failed: at its smallest level, what came out and what should have."""
    check: checks.Check
    got: object                                  # a flat list, or None
    error: str
    calls: list                                  # of the function, in words
    wanted: list
    levels: list                                 # what `compute` gave, at all levels


def load_reference(variant=None):
    """argrpo.py as a module of its own, with the variant's exchanges."""
    module = tasks.load(source.reference(variant), "argrpo_reference")
    module.__source__ = source.reference(variant)
    return module


def compute(module, check, seed):
    """A check at every level, up to the first error: [(flat values or None, error, calls), ...]"""
    levels = []
    for level in range(checks.LEVELS):
        with watched(module, source.ITEMS[check.item]) as calls:
            try:
                value = check.compute(module, Draw(seed, check.says, level))
                levels.append((flat(value), "", calls))
            except Exception as error:
                levels.append((None, in_words(error), calls))
                break
    return levels


class Grader:
    """Grades code items of one text, `submitted`, against the reference."""

    def __init__(self, submitted, seed=1, variant=None, workers=2):
        self.submitted, self.seed, self.workers = submitted, seed, workers
        self.variant, self.reference = variant, load_reference(variant)

    def grafted(self, text, item, these):
        """Computes checks with the item of another text.  Only ever called in a child."""
        source.graft(self.reference, text, item)
        return {check.says: compute(self.reference, check, self.seed) for check in these}

    def grade(self, items, more_jobs=()):
        """The Results of the items, {id: Result}, and the Outcomes of further jobs."""
        jobs = list(more_jobs)
        for item in items:
            these = checks.of_item(item["id"])
            jobs.append(Job((item["id"], "right"), lambda these=these: {
                check.says: compute(self.reference, check, self.seed) for check in these}, 30))
            for check in these:
                jobs.append(Job((item["id"], check.says), lambda item=item, check=check:
                                self.grafted(self.submitted, item, [check])[check.says]))
        outcomes = run_all(jobs, self.workers)
        wrong = {item["id"]: self.compare(item, outcomes) for item in items}
        named = self.recognise(wrong)
        return {item["id"]: self.result(item, wrong[item["id"]], named.get(item["id"]))
                for item in items}, outcomes

    def compare(self, item, outcomes):
        """The failed checks of an item."""
        right = outcomes[item["id"], "right"]
        if right.error:
            raise RuntimeError(f"the reference itself fails at {item['id']}: {right.error}")
        wrong = []
        for check in checks.of_item(item["id"]):
            wanted, outcome = right.value[check.says], outcomes[item["id"], check.says]
            if outcome.error:
                wrong.append(Wrong(check, None, outcome.error, [], [], []))
                continue
            for (got, error, calls), (should, broken, _) in zip(outcome.value, wanted):
                if broken:
                    raise RuntimeError(f"the reference itself fails at {item['id']}: {broken}")
                if error or not same(got, should, check.tolerance):
                    wrong.append(Wrong(check, got, error, calls, should, outcome.value))
                    break
        return wrong

    def recognise(self, wrong):
        """Which classic mistake each failing item makes, if any: {id: Bug}."""
        jobs = [Job(name, lambda name=name, failed=failed: self.closest(name, failed), 60)
                for name, failed in wrong.items()
                if any(w.levels and not is_blank(w) for w in failed)]
        return {name: outcome.value for name, outcome in run_all(jobs, self.workers).items()}

    def closest(self, name, failed):
        """The mistake that computes the same in most of the failed checks.  Only in a child."""
        item, text, these = source.ITEMS[name], self.reference.__source__, [w.check for w in failed]
        best, closest = 0, None
        for mistake in mistakes_of(item, text):
            values = self.grafted(source.with_bug(text, mistake), item, these)
            alike = sum(same_failure(w, values[w.check.says]) for w in failed)
            if alike > best:
                best, closest = alike, mistake
        return closest

    def result(self, item, wrong, mistake):
        total = len(checks.of_item(item["id"]))
        score = item["points"] * (total - len(wrong)) / total
        name = f"{item['id']} {source.label(item)}"
        if not wrong:
            return Result(name, score, item["points"], f"all {total} checks passed")
        if len(wrong) == total and all(map(is_blank, wrong)):
            part = wrong[0].error.removeprefix("NotImplementedError: ")
            return Result(name, 0.0, item["points"], f"not done yet ({part})")
        lines = [mistake.says] if mistake else []
        lines += [f"- {describe(w.check, w.calls, w.got, w.wanted, w.error)}" for w in wrong]
        lines.append(f"Read {item['read']}.")
        return Result(name, score, item["points"], "\n".join(lines))


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------

def mistakes_of(item, text):
    """The bugs of the catalogue that fit into the item's body (variants differ)."""
    return [bug for bug in BUGS if bug.item == item["id"] and source.fits(text, bug)]


def same_failure(wrong, levels):
    """Whether a mistake computes at all levels of a check what the submission computed."""
    if not wrong.levels or len(wrong.levels) != len(levels or ()):
        return False
    for (ours, our_error, _), (theirs, their_error, _) in zip(levels, wrong.levels):
        if our_error.split(": ", 1)[-1] != their_error.split(": ", 1)[-1]:
            return False
        if ours is not None and not same(ours, theirs, wrong.check.tolerance):
            return False
    return True


def is_blank(wrong):
    return wrong.error.startswith("NotImplementedError: part")


# ---------------------------------------------------------------------------------------------
# The whole submission
# ---------------------------------------------------------------------------------------------

def read_submission(folder):
    """The texts of a submission, read once: what its code does to the folder changes nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}")
    paths = [folder / name for name in ("argrpo.py", "my_reward.py", "answers.toml")]
    return {path.name: path.read_text("utf-8", errors="replace") if path.is_file() else None
            for path in paths}


def code_problem(text):
    """Why no item of this text can be graded, or ""."""
    if text is None:
        return "there is no argrpo.py in the submission"
    try:
        compile(text, "argrpo.py", "exec")
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        return f"argrpo.py cannot be read: line {line}: {error.args[0]}"
    return ""


def grade(folder, seed=1, variant=None, key=None, workers=2, only=None):
    """All Results of a submission, that of the whole file last.

    key is what make.py wrote beside the handout: the faults of the runs to debug.  only names
    items to grade, all by default."""
    texts = read_submission(folder)
    wanted = [item for name, item in source.parts(variant)["item"].items()
              if only is None or name in only]
    code = [item for item in wanted if "file" not in item]
    problem = code_problem(texts["argrpo.py"])
    grader = Grader(texts["argrpo.py"], seed, variant, workers)
    more = []
    if only is None or "4.1" in only:
        more.append(Job("reward", lambda: tasks.measure_reward(
            grader.reference, texts["my_reward.py"], seed), 120))
    if only is None and not problem:
        more.append(Job("train", lambda: tasks.train_whole(texts["argrpo.py"], seed), 120))
    results, outcomes = grader.grade([] if problem else code, more)
    if problem:
        results = {item["id"]: Result(f"{item['id']} {source.label(item)}", 0.0, item["points"],
                                      problem) for item in code}
    if "reward" in outcomes:
        results["4.1"] = Result("4.1 my_reward.py", *tasks.score_reward(
            outcomes["reward"], source.ITEMS["4.1"]))
    if only is None or "4.2" in only:
        for name, score, points, output in tasks.score_debug(texts["answers.toml"], key):
            results[f"4.2 {name}"] = Result(f"4.2 {name}", score, points, output)
    if only is None:
        results["whole"] = Result("the whole file", 0.0, 0.0, problem or tasks.describe_whole(
            outcomes["train"]))
    return list(results.values())


def table(results):
    lines = [f"{'':<42}points"]
    for r in results:
        of = f"{r.score:5.2f} / {r.points:g}" if r.points else ""
        lines.append(f"{r.name:<42}{of}")
        if r.score < r.points or not r.points:
            lines += ["    " + line for line in r.output.splitlines()]
    total, most = sum(r.score for r in results), sum(r.points for r in results)
    return "\n".join([*lines, f"{'total':<42}{total:.2f} / {most:g}"])


def gradescope(results):
    """Gradescope's results.json, as a dict.  4.2 could be solved by trying, if it were visible."""
    return {"tests": [{"name": r.name, "score": round(r.score, 2), "max_score": r.points,
                       "output": r.output, "visibility": "after_due_date"
                       if r.name.startswith("4.2") else "visible"} for r in results]}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Grades a submission and explains what is wrong.")
    parser.add_argument("submission", help="folder with argrpo.py, my_reward.py, answers.toml")
    parser.add_argument("--seed", type=int, default=1, help="of the hidden inputs (default: 1)")
    parser.add_argument("--json", type=Path, help="write Gradescope's results.json here")
    parser.add_argument("--key", type=Path, default=Path("handout.key.json"),
                        help="what make.py wrote beside the handout (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.key.is_file():
        parser.error(f"no key of the runs to debug at {args.key}: make.py writes one beside the "
                     "handout; name it with --key")
    torch.set_num_threads(1)
    key = json.loads(args.key.read_text("utf-8"))
    results = grade(args.submission, args.seed, key["variant"], key["runs"])
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(gradescope(results), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
