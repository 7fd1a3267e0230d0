"""How long the parts of a training step take, measured from outside `argrpo.train`."""

import time

import torch


def clock(device):
    """Seconds, after the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds of every step.

    Pass stopwatch.timed(reward_fn) to `argrpo.train`, and wrap the making of each step:

        stopwatch.start()
        step = next(steps)
        step.metrics | stopwatch.seconds()

    The rollout lasts until the reward is asked, and includes making the images.  The update begins
    with the model's first pass that has a gradient.  Between reward and update stands the
    reference."""

    def __init__(self, model):
        self.device = next(model.parameters()).device
        self.times = {}                          # when each part of the step began
        model.layers[0].register_forward_pre_hook(self.note_pass)

    def begin(self, part):
        self.times[part] = clock(self.device)

    def note_pass(self, layer, given):
        if torch.is_grad_enabled() and "update" not in self.times:
            self.begin("update")

    def timed(self, reward_fn):
        """The reward function, which also tells the stopwatch when it is asked and answers."""
        def ask(images, texts):
            self.begin("reward")
            answer = reward_fn(images, texts)
            self.begin("reference")
            return answer
        return ask

    def start(self):
        self.times = {}
        self.begin("rollout")

    def seconds(self):
        """{"seconds": of the step that now ends, "seconds_rollout": ..., and of its other parts}"""
        self.begin("end")
        order, t = ("rollout", "reward", "reference", "update", "end"), self.times
        parts = {f"seconds_{a}": t[b] - t[a] for a, b in zip(order, order[1:])}
        return {"seconds": t["end"] - t["rollout"]} | parts
