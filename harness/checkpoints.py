"""The checkpoints that a run writes, how it continues from them, and the lock of its folder."""

import os
import platform
import shlex
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from harness.logs import in_json, read_log, write_atomically, write_metrics
from pretrained import not_finite


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
        reason = error if isinstance(error, ValueError) else type(error).__name__
        previous = path.with_name("previous.pt")
        raise OSError(f"the checkpoint {path} is damaged or not this run's ({reason}); the one "
                      f"before it is {previous}: rename it to {path.name}, and resume again; if "
                      "there is none, start again in another folder") from error


def load_checkpoint(path, model, optimizer, remembered=None):
    """Restores model, optimizer and what the recipe remembers; returns the next step's number.

    Raises OSError, naming the last good checkpoint, for a damaged file, another model's, or numbers
    that are not finite."""
    with naming_damage(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        averages = [(f"the optimizer's {name}", value) for of_one in
                    state["optimizer"]["state"].values() for name, value in of_one.items()]
        ill = not_finite([*state["model"].items(), *averages])
        if ill:
            raise ValueError(f"NaN or infinite numbers in {ill[0]}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, memory in (remembered or {}).items():
            memory.update(state["remembered"].get(name, {}))
        return state["step"]


class Record:
    """What a run has written so far: metrics.jsonl, a line a step, and last.pt.

    `done` is how many steps it has made: those of the checkpoint that settings.resume asks for.
    `restore` reads the rest of that.  Only the first of several processes writes.  Raises OSError
    for a damaged checkpoint, ValueError for one of more steps than settings.steps."""

    def __init__(self, settings, writer=True):
        self.settings, self.writer, self.out = settings, writer, Path(settings.out)
        self.log, self.metrics, self.done = self.out / "metrics.jsonl", [], 0
        # Between the two renames of `save_checkpoint` there is no last.pt: then new.pt is complete.
        self.start = next((path for path in (self.out / "last.pt", self.out / "new.pt")
                           if settings.resume and path.exists()), None)
        if self.start:
            with naming_damage(self.start):      # the weights stay on the disk
                state = torch.load(self.start, map_location="cpu", weights_only=True, mmap=True)
                self.done = state["step"]
            if self.done > settings.steps:
                raise ValueError(f"{self.out} has done {self.done} steps already: --steps must be "
                                 f"at least {self.done}, not {settings.steps}")
            # Steps that were logged but not saved run again.
            self.metrics = [m for m in read_log(self.log) if m["step"] < self.done]
        self.saved = self.done if self.start else None       # steps in the last checkpoint, if any
        missing = self.done - len(self.metrics)
        if missing and writer:
            print(f"warning: {self.log} is damaged: {missing} of the checkpoint's {self.done} "
                  "steps are missing in it; the run goes on, without them in its curves",
                  file=sys.stderr)

    def restore(self, model, optimizer, remembered):
        """Gives them the state of the checkpoint, if there is one, and the log its steps."""
        self.model, self.optimizer, self.remembered = model, optimizer, remembered
        if self.start:
            load_checkpoint(self.start, model, optimizer, remembered)
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
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(in_json(metrics))
            if saves:                            # the log is never behind the checkpoint
                file.flush()
                os.fsync(file.fileno())
        if saves:
            self.save()

    def save(self):
        """A checkpoint of what is done: of step 0 after rehearsal alone."""
        if self.writer:
            save_checkpoint(self.out / "last.pt", self.done, self.model, self.optimizer,
                            self.remembered)
        self.saved = self.done

    def close(self):
        """Saves what can be saved, and says how to continue if there are steps left.

        A step that failed before its update has changed nothing: the steps before it are saved."""
        if not self.writer:
            return
        if self.done > (self.saved or 0) and not self.updating:
            self.save()
        if self.done == self.settings.steps:
            return
        ending = (f"saved up to step {self.saved or 0}; continue with: python "
                  f"{self.settings.script}.py --resume {shlex.quote(str(self.out))}")
        if self.done == 0 and self.saved is None and not self.settings.resume:
            ending = "before anything was trained: nothing is kept"
        print(f"stopped in step {self.done} of {self.settings.steps}, {ending}",
              file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# The lock of a run's folder
# ---------------------------------------------------------------------------------------------

@contextmanager
def locked(folder):
    """Keeps a folder, which it makes if need be, for this process.

    The lock is the system's: it ends with the process, however that ends and on whatever machine.
    A file system without locks gets a warning.  In the end nothing of the lock remains, and of
    folders made here none that is empty.  Raises OSError, saying who has the folder, if one has."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock", fallback_to_soft=False), folder / ".holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise OSError(f"{folder} is in use by {who}: wait until that has ended, or take another "
                      "folder with --out NAME") from error
    except PermissionError:                      # another user's
        raise
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error}): take care that no second run uses it",
              file=sys.stderr)
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()}, "
                          f"since {time.strftime('%Y-%m-%d %H:%M:%S')}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        with suppress(OSError):                  # Windows removes no open file, but filelock does
            os.unlink(lock.lock_file)
        lock.release()
        with suppress(OSError):                  # what is not empty stays
            for path in made:
                path.rmdir()
