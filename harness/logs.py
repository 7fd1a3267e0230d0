"""What a run says and writes down: on the terminal, into files that are whole or not there, into
its own log, and to the loggers.

TensorBoard and Weights & Biases are optional packages, and imported when asked for.  torch is not
needed here.
"""

import json
import os
import shlex
import sys
from contextlib import contextmanager, suppress
from math import isfinite, isnan
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# The terminal, files, and the log metrics.jsonl
# ---------------------------------------------------------------------------------------------

def plain(text):
    """The text in one line that can be drawn and printed: a space for each line end, control
    character or half of a character."""
    return "".join(c if c.isprintable() else " " for c in str(text))


@contextmanager
def one_line_errors(status=2, kinds=(ValueError, OSError, ImportError)):
    """An error of these kinds is for the user to read: one line, and this exit status, by default
    that of what is wrong before any work.

    What a terminal cannot show, then and later, is shown as "?"."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except kinds as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        sys.exit(status)


def say(*lines):
    """Prints lines.  That nobody reads them any more, as after `| head`, is no error."""
    try:
        for line in lines:
            print(plain(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def named(error):
    return plain(f"{type(error).__name__}: {error}")


def write_atomically(path, write):
    """write(file) into a temporary file beside `path`, which replaces it once it is on the disk.

    Returns the path.  Raises OSError, with what `path` held before still there, if that fails, as
    on a full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(path)
    except (OSError, RuntimeError) as error:     # torch.save has errors of its own for a full disk
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); what it held before, if anything, is still "
                      "there") from error


def write_bytes(path, content):
    return write_atomically(path, lambda file: file.write(content))


def write_json(path, value):
    write_bytes(path, f"{json.dumps(value, indent=2)}\n".encode())


def in_json(metrics):
    """A step's metrics as a line of the log.  JSON has neither NaN nor infinity: they are null."""
    known = {name: value if value is not None and isfinite(value) else None
             for name, value in metrics.items()}
    return json.dumps(known) + "\n"


def write_metrics(path, metrics):
    """The log anew: one line of JSON a step."""
    write_bytes(path, "".join(map(in_json, metrics)).encode())


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


# ---------------------------------------------------------------------------------------------
# Loggers
# ---------------------------------------------------------------------------------------------

def flattened(metrics, prefix=""):
    """("a/b", 1), ... of {"a": {"b": 1}, "c": None, "d": NaN}."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}/")
        elif value is not None and not isnan(value):
            yield prefix + name, value


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir RUN.

    What a resumed run writes again, from the step `first` on, replaces what is there."""

    def __init__(self, settings, config, first):
        from torch.utils.tensorboard import SummaryWriter
        self.first = first
        self.board = SummaryWriter(settings.out, purge_step=first if settings.resume else None)

    def numbers(self, step, metrics):
        for name, value in metrics.items() if step >= self.first else ():
            self.board.add_scalar(name, value, step)

    def picture(self, step, name, path):
        pixels = np.array(Image.open(path).convert("RGB"))
        self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self):
        self.board.close()


class WeightsAndBiases:
    """A run of Weights & Biases.

    Its project is argrpo, unless WANDB_PROJECT says another; with WANDB_MODE=offline it lies in the
    run's folder until `wandb sync` sends it."""

    def __init__(self, settings, config, first):
        import wandb
        self.wandb = wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "argrpo"), dir=settings.out,
                   name=Path(settings.out).name, config=config)

    def numbers(self, step, metrics):
        self.wandb.log(metrics, step=step)

    def picture(self, step, name, path):
        self.wandb.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self):
        self.wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


class Logs:
    """What the setting `log` names, besides the run's own files.  Both packages are optional.

    A logger that cannot be opened raises ValueError.  Afterwards nothing that fails ends the run:
    see `attempt`."""
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}

    def __init__(self, settings, config, first, writer=True):
        self.out, self.failed, self.loggers = settings.out, set(), {}
        for name in settings.log.split(",") if settings.log and writer else ():
            try:
                self.loggers[name] = self.kinds[name](settings, config, first)
            except Exception as error:           # anybody's code
                self.close()
                raise ValueError(f"--log {name} cannot be opened: {named(error)}") from error

    def attempt(self, what, function, *given):
        """function(*given), for what a run can do without.

        Where it fails it is said, None is returned, and that is not tried again."""
        if what in self.failed:
            return None
        try:
            return function(*given)
        except Exception as error:
            self.failed.add(what)
            again = f"python report.py {shlex.quote(str(self.out))}"
            tqdm.write(f"warning: {what} failed ({named(error)}); nothing else is lost, and "
                       f"the page can be made again with: {again}", file=sys.stderr)

    def each(self, method, *given):
        for name, logger in self.loggers.items():
            self.attempt(f"--log {name}", getattr(logger, method), *given)

    def numbers(self, step, metrics):
        """The metrics of a step that are known, under their names."""
        self.each("numbers", step, dict(flattened(metrics)))

    def picture(self, step, name, path):
        """The picture, if it could be drawn."""
        if path and path.exists():
            self.each("picture", step, name, path)

    def close(self):
        self.each("close")
