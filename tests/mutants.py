"""Puts bugs into the code, one at a time, and shows which the tests notice.  Run by hand.

    python tests/mutants.py                  # all: about half an hour on a free core
    python tests/mutants.py 3 17 40-52       # some, by number; 0 is the code without a bug
    python tests/mutants.py --list           # without running any
    python tests/mutants.py --jobs 2         # so many at a time, two at most

The bugs are those of assignments/bugs/ that name tests.  Each gets a copy of the tree in a
temporary folder, in which the few test files that should notice it run until the first failure, and
most others if they do not ("wider" in the table).  The table has the first failure's name and
message: they should tell a student which idea is wrong.  The exit status is the number of bugs that
were not noticed ("NO") or could not be tried, 100 at most.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "assignments"))

from catalogue import BUGS, Bug  # noqa: E402
from source import with_bug  # noqa: E402

LIMIT = 600                                      # seconds for a mutant: some bugs never end

# The test files that should notice a bug, by the word in the list, as patterns below tests/.
TESTS = {
    "model": ("method/*_blocks", "method/*_transformer", "method/*_sampler"),
    "vq": ("method/*_vqgan",),
    "policy": ("method/*_sampler",),
    "maths": ("method/*_advantages_kl_loss",),
    "loop": ("method/*_streams", "method/*_wiring", "method/*_settings", "method/*_train"),
    "diversity": ("method/*_diversity", "method/*_rehearsal"),
    "pretraining": ("toy/test_toy_pretraining", "toy/test_toy"),
    "evaluation": ("harness/test_evaluation",),
    "compare": ("harness/test_statistics", "commands/test_evaluate"),
    "sample": ("harness/test_published",),
    "checkpoints": ("harness/test_checkpoints", "harness/test_faults", "harness/test_lost_work"),
    "options": ("commands/test_scripts",),
    "captions": ("harness/test_captions",),
    "rewards": ("rewards/test_reward_tasks", "rewards/test_reward_vlm",
                "rewards/test_reward_models", "rewards/test_reward_checker"),
    "course": ("course/test_assignments",),
    "run": ("harness/test_run", "harness/test_evaluation"),
    "report": ("harness/test_report",),
    "reward": ("rewards/test_reward",),
    "pretrained": ("harness/test_pretrained",),
    "speed": ("harness/test_speed",),
}
TESTS["none"] = sum(TESTS.values(), ())          # without a bug none of them may fail
WIDER = ("method/*", "toy/*", "harness/test_evaluation", "harness/test_run", "rewards/test_reward",
         "harness/test_pretrained", "harness/test_speed", "harness/test_checkpoints")


NO_BUG = Bug("argrpo.py", "none", "", "", "no bug at all, which no test may notice: else the table "
             "says nothing", [("import hashlib\n", "import hashlib\n")])
MUTANTS = list(enumerate([NO_BUG, *(bug for bug in BUGS if bug.tests)]))         # (number, bug)


def copy_tree(folder, bug):
    """A copy of the tree with the bug in it.  Raises ValueError if the bug does not fit."""
    code = with_bug((ROOT / bug.file).read_text("utf-8"), bug)
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT)
        if name.parts[0] not in ("labs", "examples", "runs"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    for name in ("pyproject.toml", "docs", "tests/golden", "toy/weights", "harness/report.html.j2",
                 "assignments/right", "assignments/bugs",
                 *(path.relative_to(ROOT) for path in ROOT.glob("assignments/*.toml"))):
        (folder / name).symlink_to(ROOT / name)
    (folder / bug.file).write_text(code, "utf-8")


def warm_up():
    """Imports what every test needs, so that the processes forked from this one have it.  None of
    it is of this repository."""
    import einops  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import tqdm  # noqa: F401
    from torch.utils.checkpoint import checkpoint
    torch.set_num_threads(1)                     # a forked process has none of OpenMP's threads
    x = torch.ones(1, requires_grad=True)
    checkpoint(torch.exp, x, use_reentrant=False).backward()
    torch.optim.AdamW([x]).step()
    torch.testing.assert_close(x, x)


def files_of(patterns):
    """The test files, in the order of the patterns, as paths from the root."""
    found = []
    for pattern in patterns:
        files = sorted(ROOT.glob(f"tests/{pattern}.py"))
        if not files:
            raise FileNotFoundError(f"no test file is called tests/{pattern}.py")
        found += [str(file.relative_to(ROOT)) for file in files]
    return found


def run_tests(folder, files, log):
    """In a forked process: pytest on those test files until the first failure.  Does not return."""
    import pytest
    os.setsid()                                  # so that what it starts can be ended with it
    signal.signal(signal.SIGINT, signal.default_int_handler)     # under nohup it is ignored
    sys.dont_write_bytecode = True
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    sys.path[:] = [str(folder)] + [p for p in sys.path if Path(p or ".").resolve() not in
                                   (ROOT, ROOT / "tests", ROOT / "assignments")]
    for name in ("catalogue", "source"):         # the copy has its own
        del sys.modules[name]
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    status = pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *files])
    sys.stdout.flush()
    os._exit(int(status))


def first_failure(text):
    """(test, message) of pytest's first failure, or None."""
    name = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    if name is None:
        return None
    lines = [line for line in re.findall(r"^E +(.*)$", text, re.M) if "not close!" not in line]
    return name[1].removeprefix("tests/"), " / ".join(lines[:2])


class Trial:
    """One bug under test: its expected test files first, then all the others."""

    def __init__(self, number, bug, folder):
        self.number, self.bug, self.folder = number, bug, folder
        expected = files_of(TESTS[bug.tests])
        wider = [file for file in files_of(WIDER) if file not in expected]
        self.rounds = [files for files in (expected, wider) if files]
        self.started, self.pid, self.result = time.time(), None, None
        self.where = "expected"
        self.next_round()

    def next_round(self):
        files = self.rounds.pop(0)
        self.log = self.folder / "log.txt"
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run_tests(self.folder, files, self.log)
            finally:
                os._exit(99)

    def poll(self):
        """Whether it is done: then `result` is (noticed, test, message)."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and time.time() - self.started < LIMIT:
            return False
        if pid == 0:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.result = "yes", "(no end)", f"longer than {LIMIT} s"
            return True
        failure = first_failure(self.log.read_text("utf-8", errors="replace"))
        code = os.waitstatus_to_exitcode(status)
        if code == 0 and self.rounds:
            self.where = "wider"
            self.next_round()
            return False
        if code == 1 and failure:
            self.result = ("yes" if self.where == "expected" else "wider"), *failure
        else:
            noticed = "NO" if code == 0 else "broken"    # such as code that cannot be imported
            self.result = noticed, *(failure or ("-", f"pytest ended with {code}"))
        return True


def try_all(mutants, jobs):
    """Runs the mutants, `jobs` at a time, and yields (number, bug, result) as they end."""
    waiting, running = list(mutants), []
    with tempfile.TemporaryDirectory() as top:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, bug = waiting.pop(0)
                folder = Path(top) / str(number)
                folder.mkdir()
                try:
                    copy_tree(folder, bug)
                except ValueError as error:
                    yield number, bug, ("stale", "-", str(error))
                    continue
                running.append(Trial(number, bug, folder))
            for trial in [trial for trial in running if trial.poll()]:
                running.remove(trial)
                shutil.rmtree(trial.folder)
                yield trial.number, trial.bug, trial.result
            time.sleep(0.05)


def chosen(texts):
    """The mutants of the numbers and ranges such as 3 and 40-52, or all."""
    wanted = set()
    for text in texts:
        first, _, last = text.partition("-")
        wanted |= set(range(int(first), int(last or first) + 1))
    return [(number, bug) for number, bug in MUTANTS if not texts or number in wanted]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", help="such as 3 or 40-52; all without any")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2))
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    mutants = chosen(args.numbers)
    if args.list:
        for number, bug in mutants:
            print(f"{number:4} {bug.file}: {bug.says}")
        return 0
    warm_up()
    counts = {}
    for number, bug, (noticed, test, message) in try_all(mutants, args.jobs):
        if number == 0:
            noticed = "fine" if noticed == "NO" else "FAILS"
        counts[noticed] = counts.get(noticed, 0) + 1
        print(f"{number:4} {noticed:7}{bug.file}: {bug.says}\n"
              f"            {test}\n            {message}", flush=True)
    print(f"{len(mutants)} mutants: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    unnoticed = sum(n for name, n in counts.items() if name not in ("fine", "yes", "wider"))
    return min(100, unnoticed)


if __name__ == "__main__":
    sys.exit(main())
