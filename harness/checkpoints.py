"""The files that a run writes, how it continues from them, and the lock of its folder.

A write never leaves half a file behind: it goes into a temporary file, which then takes the name.
"""

import errno
import json
import os
import platform
import shlex
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pretrained import not_finite


def write_atomically(path, write):
    """write(file) into a temporary file beside `path`, which replaces it once it is on the disk.

    Raises OSError, with what `path` held before still there, if that fails, as on a full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:     # torch.save has errors of its own for a full disk
        temporary.unlink(missing_ok=True)
        before = "and there was none before"
        if path.exists():
            before = "what it held before is still there"
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); {before}") from error


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_metrics(path, metrics):
    """The log anew: one line of JSON a step."""
    text = "".join(json.dumps(m) + "\n" for m in metrics)
    write_atomically(path, lambda file: file.write(text.encode()))


def save_weights(path, model):
    """The trained model in LlamaGen's own format."""
    write_atomically(path, lambda file: torch.save({"model": model.state_dict()}, file))


def save_checkpoint(path, step, model, optimizer, remembered=None):
    """Everything that --resume needs: the next step's number, the weights, the optimizer's state,
    and what the diverse recipe remembers, {name: {prompt: ...}}.

    The checkpoint before this one stays beside it, as previous.pt."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "remembered": remembered or {}}
    new = path.with_name("new.pt")
    write_atomically(new, lambda file: torch.save(state, file))
    if path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(new, path)


@contextmanager
def naming_damage(path):
    """Turns what fails in reading a checkpoint into an OSError that names the last good one."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:                       # a damaged file can fail anywhere
        previous = path.with_name("previous.pt")
        advice = "and there is no earlier one: start again without --resume, in another folder"
        if previous.exists():
            advice = f"the one before it is {previous}: rename it to {path.name}, and resume again"
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise OSError(f"the checkpoint {path} is damaged or not this run's ({reason}); "
                      f"{advice}") from error


def load_checkpoint(path, model, optimizer, remembered=None):
    """Restores model, optimizer and what the recipe remembers; returns the next step's number.

    Raises OSError, naming the last good checkpoint, for a damaged file, another model's, or numbers
    that are not finite."""
    with naming_damage(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        averages = [(f"the optimizer's {name}", value) for of_one in
                    state["optimizer"]["state"].values() for name, value in of_one.items()]
        ill = not_finite([*state["model"].items(), *averages])
        if ill:
            raise ValueError(f"NaN or infinite numbers in {ill[0]}")
        optimizer.load_state_dict(state["optimizer"])
        for name, memory in (remembered or {}).items():
            memory.update(state["remembered"].get(name, {}))
        return state["step"]


def read_log(path):
    """The metrics of the log's steps, in their order.  What is no whole line is left out: after a
    power cut a file may end in half a line, or in zeros."""
    steps = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            metrics = json.loads(line.strip(b"\0 "))
            if isinstance(metrics, dict) and "step" in metrics:
                steps[metrics["step"]] = metrics
    return [steps[step] for step in sorted(steps)]


class Record:
    """What a run has written so far: metrics.jsonl, a line a step, and last.pt.

    `done` is how many steps it has made: those of the checkpoint that settings.resume asks for.
    `restore` reads the rest of that.  Only the first of several processes writes."""

    def __init__(self, settings, writer=True):
        self.settings, self.writer, self.out = settings, writer, Path(settings.out)
        self.log, self.metrics, self.done = self.out / "metrics.jsonl", [], 0
        # Between the two renames of `save_checkpoint` there is no last.pt: then new.pt is complete.
        self.start = [path for path in (self.out / "last.pt", self.out / "new.pt")
                      if settings.resume and path.exists()][:1]
        for path in self.start:
            with naming_damage(path):            # the weights stay on the disk
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self.done = state["step"]
        if self.done:                            # steps that were logged but not saved run again
            self.metrics = [m for m in read_log(self.log) if m["step"] < self.done]
        self.saved = self.done                   # steps in the last checkpoint
        missing = self.done - len(self.metrics)
        if missing and writer:
            print(f"warning: {self.log} is damaged: {missing} of the checkpoint's {self.done} "
                  "steps are missing in it; the run goes on, without them in its curves",
                  file=sys.stderr)

    def restore(self, model, optimizer, remembered):
        """Gives them the state of the checkpoint, if there is one, and the log its steps."""
        self.model, self.optimizer, self.remembered = model, optimizer, remembered
        for path in self.start:
            load_checkpoint(path, model, optimizer, remembered)
        if self.writer:
            write_metrics(self.log, self.metrics)
        self.updating = False                    # whether weights have changed since the last step
        optimizer.register_step_pre_hook(self.note_update)

    def note_update(self, *given):
        self.updating = True

    def add(self, metrics):
        """Logs a step that is done, and saves it if it is time to."""
        self.metrics.append(metrics)
        self.done, self.updating = metrics["step"] + 1, False
        if not self.writer:
            return
        saves = self.done % self.settings.save_every == 0 or self.done == self.settings.steps
        with open(self.log, "a") as file:
            file.write(json.dumps(metrics) + "\n")
            if saves:                            # the log is never behind the checkpoint
                file.flush()
                os.fsync(file.fileno())
        if saves:
            self.save()

    def save(self):
        save_checkpoint(self.out / "last.pt", self.done, self.model, self.optimizer,
                        self.remembered)
        self.saved = self.done

    def close(self):
        """Saves what can be saved, and says how to continue if there are steps left.

        A step that failed before its update has changed nothing: the steps before it are saved."""
        if not self.writer:
            return
        if self.done > self.saved and not self.updating:
            self.save()
        if self.done == self.settings.steps:
            return
        command, how_far = f"--resume {shlex.quote(str(self.out))}", f"up to step {self.saved}"
        if self.saved == self.done:
            how_far = "up to there"
        how_far = f"saved {how_far}; continue with: python {self.settings.script}.py {command}"
        if self.done == 0 and not self.settings.resume:
            how_far = "before anything was trained: nothing is kept"
        print(f"stopped in step {self.done} of {self.settings.steps}, {how_far}",
              file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# The lock of a run's folder
# ---------------------------------------------------------------------------------------------

LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
BEAT = 60                                        # seconds between two signs of life


def lock_file(file):
    """Takes the system's lock of an open file, which ends with the process, however that ends.

    Raises OSError if another process has it, or with an error of LOCKLESS if there are no locks."""
    try:
        import fcntl
    except ImportError:                          # on Windows; what is locked there cannot be read
        import msvcrt
        file.seek(2 ** 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Keeps a folder, which it makes, for this process, until `release`.

    In a file system without locks the lock's file gets a sign of life every BEAT seconds, and a
    process without one for five times that is gone.  Raises OSError, saying who holds it."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.released = folder / ".lock", threading.Event()
        while True:
            self.file = open(self.path, "a+")
            try:
                self.lock()
            except OSError as error:
                self.file.close()
                holder = self.path.read_text().strip() or "another process"
                raise OSError(f"{folder} is in use by {holder}: wait until that has ended, or take "
                              "another folder with --out NAME") from error
            # The one before may have removed this file after it was opened here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    break
            self.file.close()
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}, "
                        f"since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self.file.flush()

    def lock(self):
        try:
            lock_file(self.file)
        except OSError as error:
            age = time.time() - os.stat(self.path).st_mtime
            if error.errno not in LOCKLESS or (self.path.read_text() and age < 5 * BEAT):
                raise
            threading.Thread(target=self.beat, daemon=True).start()

    def beat(self):
        while not self.released.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def release(self):
        self.released.set()
        with suppress(OSError):                  # Windows removes no open file
            self.path.unlink()
        self.file.close()
