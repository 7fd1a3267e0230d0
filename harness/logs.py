"""Logging where people look, besides the run's own files: TensorBoard, Weights & Biases.

Both packages are optional, and imported when asked for.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir RUN."""

    def __init__(self, folder, config):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder)

    def numbers(self, step, metrics):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step, name, path):
        pixels = np.array(Image.open(path).convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WandB:
    """A run of Weights & Biases; its project is argrpo, unless WANDB_PROJECT says another.

    WANDB_MODE=offline writes it into the run's folder; `wandb sync` sends it later."""

    def __init__(self, folder, config):
        import wandb
        self.wandb = wandb
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "argrpo"), dir=folder,
                              name=Path(folder).name, config=config)

    def numbers(self, step, metrics):
        self.run.log(metrics, step=step)

    def picture(self, step, name, path):
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self):
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_loggers(names):
    """Raises ImportError if a logger's package is not installed."""
    for name in names.split(","):
        if name and find_spec(name) is None:
            raise ImportError(f"--log {name} needs a package: pip install {name}")


class Logs:
    """All loggers that the setting `log` names, as one."""

    def __init__(self, settings, config):
        names = [name for name in settings.log.split(",") if name]
        self.loggers = [LOGGERS[name](settings.out, config) for name in names]

    def numbers(self, step, metrics):
        """The metrics of a step that are known, under their names."""
        known = {name: value for name, value in metrics.items() if value is not None}
        for logger in self.loggers:
            logger.numbers(step, known)

    def picture(self, step, name, path):
        for logger in self.loggers:
            logger.picture(step, name, path)

    def close(self):
        for logger in self.loggers:
            logger.close()
