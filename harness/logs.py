"""Logging where people look, besides the run's own files: TensorBoard, Weights & Biases.

Both packages are optional, and imported when asked for.
"""

import os
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


def flattened(metrics, prefix=""):
    """{"a": {"b": 1}, "c": None} as {"a/b": 1}."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = value
    return flat


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
                raise ValueError(f"--log {name} cannot be opened: {in_a_line(error)}") from error

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
            tqdm.write(f"warning: {what} failed ({in_a_line(error)}); nothing else is lost, and "
                       f"the page can be made again with: {again}", file=sys.stderr)

    def each(self, method, *given):
        for name, logger in self.loggers.items():
            self.attempt(f"--log {name}", getattr(logger, method), *given)

    def numbers(self, step, metrics):
        """The metrics of a step that are known, under their names."""
        self.each("numbers", step, flattened(metrics))

    def picture(self, step, name, path):
        """The picture, if it could be drawn."""
        if path and path.exists():
            self.each("picture", step, name, path)

    def close(self):
        self.each("close")


def in_a_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
