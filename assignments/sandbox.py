"""Runs functions in forked children of this process, each with limits of time and memory.

The parent imports torch once and stays warm.  A child answers through a pipe, so that what it
prints is nothing; it runs in an empty folder of its own, which is deleted afterwards.  This keeps
mistakes apart, not attackers: a child may still read and write what this user may.
"""

import faulthandler
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

from source import NO_LINE

GIGABYTE = 2 ** 30


class Outcome(NamedTuple):
    """What a job came to: its value, or what went wrong, in words."""
    value: object = None
    error: str = ""


class Job(NamedTuple):
    key: object
    function: object                             # () -> something that can be pickled
    seconds: int = 5                             # of the processor; four times that of the clock


def run_all(jobs, workers=2, memory=2.5 * GIGABYTE):
    """Runs the jobs, `workers` at a time: {key: Outcome}."""
    jobs, outcomes, running = list(reversed(jobs)), {}, {}
    while jobs or running:
        while jobs and len(running) < workers:
            child = Child(jobs.pop(), memory)
            running[child.pipe] = child
        ready, _, _ = select.select(list(running), [], [], 0.05)
        for pipe, child in list(running.items()):
            if pipe in ready:
                child.read()
            if child.finished or time.monotonic() > child.deadline:
                outcomes[child.job.key] = child.end()
                del running[pipe]
    return outcomes


class Child:
    def __init__(self, job, memory):
        self.job, self.received, self.finished = job, b"", False
        self.deadline = time.monotonic() + 4 * job.seconds
        self.folder = tempfile.mkdtemp(prefix="grade-")
        self.pipe, answer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            self.work(answer, memory)
        os.close(answer)

    def work(self, answer, memory):
        """The child: runs the job, answers, and is gone, whatever happens."""
        outcome = Outcome(error="it ended without an answer")
        try:
            os.setsid()
            faulthandler.disable()               # a crash is reported by the parent
            os.chdir(self.folder)
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            resource.setrlimit(resource.RLIMIT_CPU, (self.job.seconds, self.job.seconds))
            room = virtual_size() + int(memory)
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            outcome = Outcome(self.job.function())
        except SystemExit:
            outcome = Outcome(error="it called sys.exit or exit")
        except BaseException as error:
            said = in_words(error)
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):      # torch
                said = f"it needs more than {memory / GIGABYTE:.1f} GB of memory"
            outcome = Outcome(error=said)
        finally:
            write_all(answer, pickle.dumps(outcome))
            os._exit(0)

    def read(self):
        data = os.read(self.pipe, 2 ** 20)
        self.received += data
        self.finished = not data

    def end(self):
        """Kills what is left of the child, and says what it came to."""
        late = not self.finished
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)    # it had not come to setsid
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if late or killed == signal.SIGXCPU or (killed == signal.SIGKILL and not self.received):
            return Outcome(error=f"it does not end: stopped after {self.job.seconds} seconds of "
                                 f"processor time, or {4 * self.job.seconds} of the clock")
        try:
            return pickle.loads(self.received)
        except Exception:
            return Outcome(error="it ended the process without an answer (os._exit, or a crash)")


def virtual_size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def write_all(pipe, data):
    while data:
        data = data[os.write(pipe, data):]


def in_words(error):
    """An exception as one line, with the submission's line it came from, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename in ("argrpo.py", "my_reward.py")
              and f.lineno < NO_LINE]
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {text}"
    if theirs and not isinstance(error, NotImplementedError):
        frame = theirs[-1]
        return f"{frame.filename}, line {frame.lineno}: {text}"
    return text
