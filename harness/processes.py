"""Where a run computes: which device, and, under torchrun, which of several processes; and Ctrl-C.

Every process of a run takes an equal share of each step's prompts, with a copy of the model of
its own.  After each backward pass the processes average their gradients, so that all copies take
the same step.

Whatever the processes do together begins with `gather`.  A process that fails calls it, too, and
says so: that is how the others, which wait for it there, learn that they must end.
"""

import atexit
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist


def kinds_of_device():
    """What --device takes here: "cpu", and this machine's accelerator, "cuda", "mps", "xpu", ..."""
    if not hasattr(torch, "accelerator"):        # before torch 2.6
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if not torch.accelerator.is_available():
        return ["cpu"]
    return ["cpu", torch.accelerator.current_accelerator().type]


def pick_device(name):
    """The torch device of that name, by default cuda if it is there, else the CPU: another kind of
    accelerator, which nobody has tried yet, must be named.

    Under torchrun it also joins the other processes, and gives each of them a GPU of its own."""
    kinds = kinds_of_device()
    if name and not re.fullmatch(f"({'|'.join(kinds)})(:[0-9]+)?", name):
        raise ValueError(f"--device {name}: torch sees no such device here, but {', '.join(kinds)};"
                         " leave the option out to use the first GPU, or the CPU")
    device = torch.device(name or ("cuda" if "cuda" in kinds else "cpu"))
    if device.index:                             # the first is the current one anyway
        torch.get_device_module(device).set_device(device)
    # On H100 and H200 torch prefers cuDNN's attention, which makes a new plan for every number of
    # keys: decoding has one more at each token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        device = join_processes(device)
    return device


def join_processes(device):
    """Joins the processes that torchrun has started, and returns the device of this one.

    They wait for each other for an hour: so long may the first one's evaluation take.  gloo is left
    before Python ends: its threads may still hold Python's objects, and to let go of one while the
    interpreter shuts down aborts the process, one time in some forty.  The threads end with the
    last reference to the process group.  torch.distributed.nn, which an optimizer imports, would
    hold one for ever, as its functions' default, if there were a group by then: so it comes first.
    """
    import torch.distributed.nn
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    if backend == "gloo":
        atexit.register(dist.destroy_process_group)
    return device


def rank_and_size():
    """This process's number and how many there are: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class OtherProcessFailed(Exception):
    """Another process of this run has ended with an error: what that process gives to `gather`."""


def gather(value):
    """The values of all processes, in their order.  Each must call it.

    Raises OtherProcessFailed if one of them has failed."""
    if rank_and_size()[1] == 1:
        return [value]
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    for answer in answers:
        if isinstance(answer, OtherProcessFailed):
            raise answer
    return answers


@contextmanager
def failing_together():
    """An error in here ends all processes.  Without this the others would wait for this one."""
    try:
        yield
    except OtherProcessFailed:
        raise
    except Exception as error:
        rank, what = rank_and_size()[0], f"{type(error).__name__}: {error}"
        failure = OtherProcessFailed(f"process {rank} has failed: {what}")
        with suppress(OtherProcessFailed, RuntimeError):         # they may have gone already
            gather(failure)
        raise


def average_over_processes(values, maximum=(), known=None):
    """Means over all processes of {name: number}, but the largest of the names in `maximum`.

    Of {name: number} in `known` each is how many pictures a process's mean is over; without it, a
    name's means count alike.  What a process could not measure, None or NaN, is left out."""
    if rank_and_size()[1] == 1:
        return values
    answers, averages = gather(values), dict(values)
    weights = gather(known) if known else [{}] * len(answers)
    for name in values:
        numbers = [(a[name], w.get(name, 1)) for a, w in zip(answers, weights)
                   if a[name] is not None and not math.isnan(a[name])]
        if numbers and name in maximum:
            averages[name] = max(number for number, _ in numbers)
        elif numbers:
            total = sum(weight for _, weight in numbers)
            averages[name] = sum(number * weight for number, weight in numbers) / total
    return averages


def average_gradients(model):
    """The `sync` seam of `argrpo.train`: the step follows the mean of all processes' gradients."""
    size = rank_and_size()[1]
    if size == 1:
        return
    gather(None)
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= size


def wait_for_all():
    """Returns when all processes have come here."""
    gather(None)


class Interrupted(Exception):
    """A signal asked for the end, and the current work can be left."""


class StopRequest:
    """`with StopRequest() as stop`: Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP) only set
    stop.received.

    So the current step can finish.  A second Ctrl-C ends the program at once.  What is ignored, as
    SIGHUP by nohup, stays so."""
    received = None

    def __enter__(self):
        signals = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
        self.previous = {number: signal.signal(number, self.note) for number in signals
                         if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def note(self, number, frame):
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):                  # the terminal may be gone
            print(f"\n{self.received.name}: finishing what is under way, then saving",
                  file=sys.stderr, flush=True)

    def check(self):
        """Raises Interrupted if a signal has come."""
        if self.received:
            raise Interrupted

    def everywhere(self):
        """Whether any process was asked to stop: all of them must agree on the last step."""
        number = max(gather(int(self.received or 0)))
        if number:
            self.received = signal.Signals(number)
        return number > 0

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
