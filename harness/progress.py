"""progress.gif: the same prompts and seeds, drawn again as the policy changes.

A run leaves a picture in its folder `progress` every few steps, and the animation at its end.  What
draws has random streams of its own and no gradient: the training is the same without it.
"""

import time

import torch
from PIL import Image, ImageDraw, ImageFont

from harness.before_after import draw_like_rollout
from harness.checkpoints import write_atomically

SHARE = 0.05                                     # of a run's time, at most
COLUMNS, SAMPLES = 2, 4                          # prompts and images of each, side by side
SMALL, LARGE = 72, 144                           # pixels of an image's side, for small images, else
GAP, LINE = 4, 20                                # pixels between two images, and of a line of text


class Progress:
    """Draws a picture whenever `draw` is called, unless pictures have taken too long already.

    It has a quarter as many images as a step, 32 at most: SAMPLES of each of some prompts, evenly
    chosen.  measure(images, texts) may give "verified"; else reward_fn's total is averaged.
    started is when the run began, by time.perf_counter."""

    def __init__(self, vq, prompts, reward_fn, settings, measure, folder, started):
        self.vq, self.prompts, self.settings = vq, prompts, settings
        self.reward_fn, self.measure, self.folder = reward_fn, measure, folder
        images = min(32, settings.prompts_per_step * settings.group_size // 4)
        count = min(len(prompts.texts), max(1, images // SAMPLES))
        self.index = torch.linspace(0, len(prompts.texts) - 1, count).long()
        self.started, self.spent, self.last = started, 0.0, 0.0

    def is_due(self, done):
        """Whether a picture belongs to the moment after `done` steps, and there is time for it."""
        s = self.settings
        if not s.progress_every or (done % s.progress_every and done != s.steps):
            return False
        return self.spent + self.last <= SHARE * (time.perf_counter() - self.started)

    def draw(self, model, done):
        """Draws what the model draws after `done` steps, and returns the picture's path."""
        start, s = time.perf_counter(), self.settings
        texts, _, _, images = draw_like_rollout(model, self.vq, self.prompts, self.index, s,
                                                SAMPLES, "progress")
        title = f"step {done} of {s.steps}:   {self.score(images, texts)}"
        picture = sheet(images.cpu(), texts, title)
        self.folder.mkdir(exist_ok=True)
        kind = "png" if images.shape[-1] <= SMALL else "jpeg"
        path = self.folder / f"{done:06}.{kind}"
        write_atomically(path, lambda file: picture.save(file, kind, quality=90))
        self.last = time.perf_counter() - start
        self.spent += self.last
        return path

    def score(self, images, texts):
        """What a picture's corner says of its images."""
        measured = self.measure(images, texts)
        if "verified" in measured:
            return f"{measured['verified'].mean():.0%} right"
        total, _ = self.reward_fn(images, texts)
        return f"reward {total.nanmean():.3f}"


def sheet(images, texts, title):
    """A picture of images (B, 3, H, W), SAMPLES for each prompt, the prompt above them."""
    font, large = ImageFont.load_default(13), ImageFont.load_default(17)
    groups = len(images) // SAMPLES
    columns = min(COLUMNS, groups)
    rows = -(-groups // columns)
    cell, resampling = SMALL, Image.Resampling.NEAREST
    if images.shape[-1] > SMALL:
        cell, resampling = LARGE, Image.Resampling.LANCZOS
    block = SAMPLES * (cell + GAP) + 2 * GAP, cell + LINE + 2 * GAP          # of one prompt
    canvas = Image.new("RGB", (columns * block[0] + GAP, rows * block[1] + 30), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * GAP, 5), title, "black", large)
    for i, image in enumerate(images):
        group, sample = divmod(i, SAMPLES)
        x = (group % columns) * block[0] + 2 * GAP
        y = (group // columns) * block[1] + 30
        if sample == 0:
            draw.text((x, y), texts[i][:48], "black", font)
        canvas.paste(to_pillow(image).resize((cell, cell), resampling),
                     (x + sample * (cell + GAP), y + LINE))
    return canvas


def to_pillow(image):
    """An image (3, H, W) in [0, 1] for Pillow."""
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())


def write_animation(folder, path):
    """The pictures in the folder as one animation, which stands still at its end, for 3 seconds.

    Returns whether there were any."""
    frames = [Image.open(file) for file in sorted(folder.glob("*.*g"))]
    if not frames:
        return False
    frames = [frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    times = [400] * (len(frames) - 1) + [3000]                               # milliseconds
    write_atomically(path, lambda file: frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0))
    return True
