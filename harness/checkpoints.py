"""The files that a run writes, and how it continues from them.

A write never leaves half a file behind: it goes into a temporary file, which then takes the name.
"""

import json
import os
import sys
from pathlib import Path

import torch


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


def load_checkpoint(path, model, optimizer, remembered=None):
    """Restores model, optimizer and what the recipe remembers; returns the next step's number.

    Raises OSError, naming the last good checkpoint, for a damaged file or another model's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if remembered is not None:
            for name, memory in remembered.items():
                memory.update(state["remembered"].get(name, {}))
        return state["step"]
    except PermissionError:
        raise
    except Exception as error:                       # a damaged file can fail anywhere
        previous = path.with_name("previous.pt")
        advice = ("and there is no earlier one: "
                  "start again without --resume, in another folder")
        if previous.exists():
            advice = (f"the one before it is {previous}: "
                      f"rename it to {path.name}, and resume again")
        raise OSError(f"the checkpoint {path} is damaged or not this run's "
                      f"({type(error).__name__}); {advice}") from error


def write_count(model, optimizer):
    """A number that grows with every write to the weights or the optimizer's state.

    torch counts the writes to each tensor."""
    tensors = list(model.parameters())
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor._version for tensor in tensors)


class Record:
    """What a run has written so far: metrics.jsonl, a line a step, and last.pt.

    It begins with the checkpoint that settings.resume asks for.  Only the first of several
    processes writes."""

    def __init__(self, settings, model, optimizer, remembered, writer=True):
        self.settings, self.writer = settings, writer
        self.model, self.optimizer, self.remembered = model, optimizer, remembered
        self.out = Path(settings.out)
        self.log = self.out / "metrics.jsonl"
        self.metrics, self.done = [], 0          # steps in the log
        # Between the two renames of `save_checkpoint` there is no last.pt: then new.pt is complete.
        checkpoints = [path for path in (self.out / "last.pt", self.out / "new.pt")
                       if settings.resume and path.exists()]
        if checkpoints:
            self.done = load_checkpoint(checkpoints[0], model, optimizer, remembered)
        if self.done:                            # steps that were logged but not saved run again
            lines = self.log.read_text().splitlines()[:self.done]
            self.metrics = [json.loads(line) for line in lines]
        if writer:
            write_metrics(self.log, self.metrics)
        self.saved = self.done                   # steps in the last checkpoint
        self.written = write_count(model, optimizer)

    def add(self, metrics):
        """Logs a step that is done, and saves it if it is time to."""
        self.metrics.append(metrics)
        self.done = metrics["step"] + 1
        self.written = write_count(self.model, self.optimizer)
        if not self.writer:
            return
        with open(self.log, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.done % self.settings.save_every == 0 or self.done == self.settings.steps:
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
        unchanged = write_count(self.model, self.optimizer) == self.written
        if self.done > self.saved and unchanged:
            self.save()
        if self.done == self.settings.steps:
            return
        how_far = f"saved up to step {self.saved}"
        if self.done == 0:
            how_far = "before anything was trained"
        elif self.saved == self.done:
            how_far = "saved up to there"
        print(f"stopped in step {self.done} of {self.settings.steps}, {how_far}; continue with: "
              f"python {self.settings.script}.py --resume {self.out}", file=sys.stderr, flush=True)
