"""Where a run computes: which device, and, under torchrun, which of several processes.

Every process of a run takes an equal share of each step's prompts, with a copy of the model of
its own.  After each backward pass the processes average their gradients, so that all copies take
the same step.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def pick_device(name):
    """The torch device of that name, or by default the GPU if there is one, else the CPU.

    Under torchrun it also joins the other processes, and gives each of them a GPU of its own."""
    gpu = torch.cuda.is_available()
    if name.startswith("cuda") and not gpu:
        raise ValueError(f"--device {name}: torch sees no GPU here; "
                         "leave the option out to use the CPU")
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: no such device; there are cpu and cuda")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        device = join_processes(device)
    return device


def join_processes(device):
    """Joins the processes that torchrun has started, and returns the device of this one."""
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device


def rank_and_size():
    """This process's number and how many there are: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_over_processes(values, maximum=()):
    """Means over all processes of {name: number}, but the largest of the names in `maximum`.

    A number that a process could not measure, None, is left out."""
    if rank_and_size()[1] == 1:
        return values
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, values)
    averages = {}
    for name in values:
        numbers = [answer[name] for answer in answers if answer[name] is not None]
        if not numbers:
            averages[name] = None
        elif name in maximum:
            averages[name] = max(numbers)
        else:
            averages[name] = sum(numbers) / len(numbers)
    return averages


def average_gradients(model):
    """The `sync` seam of `argrpo.train`: the step follows the mean of all processes' gradients."""
    size = rank_and_size()[1]
    if size == 1:
        return
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= size


def wait_for_all():
    """Returns when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()
