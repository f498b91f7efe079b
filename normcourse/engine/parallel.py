"""More than one process: PyTorch's DistributedDataParallel, started by torchrun.

``torchrun --nproc-per-node 2 -m normcourse train`` shares every batch out: process r of P trains on
its images r, r + P, ... Each of them draws the same random order, and DistributedDataParallel
averages the gradients, so Layer and Group Norm see the same steps as in one process. Batch Norm
takes its statistics from the images of its own process (Li et al. 2020, PyTorch Distributed);
sync_bn takes them from the whole batch. Everything here does nothing in one process.
"""

import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from normcourse.errors import CourseError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Which process this is (its rank, from 0), and of how many."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def tell(text: str) -> None:
    """Print, in the first process alone."""
    if rank_and_size()[0] == 0:
        print(text, flush=True)


def start(device: torch.device) -> None:
    """Join the processes that torchrun started, if it did.

    By gloo on a CPU, by NCCL on GPUs, one GPU for each process. Raises CourseError where that
    cannot be.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "1") or rank_and_size()[1] > 1:
        return
    if device.type == "mps":
        raise CourseError("device 'mps' takes one process; allowed for more: cpu, cuda")
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if local >= there:
            raise CourseError(f"more processes than GPUs; allowed: {there}")
        torch.cuda.set_device(local)
    signal.signal(signal.SIGTERM, stopped)  # torchrun sends it to the others when one has ended
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))  # without an answer: dead
    except (ValueError, RuntimeError) as error:
        message = f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but its processes cannot meet"
        raise CourseError(f"{message} ({error}); start them by torchrun, or unset it") from error


def stopped(*_: Any) -> None:
    """What a process does when torchrun ends it."""
    raise KeyboardInterrupt("stopped, as another process of this run ended")


def check_sync_bn(wanted: bool, device: torch.device) -> None:
    """Raise CourseError for what torch's SyncBatchNorm cannot do."""
    if wanted and device.type != "cuda":
        raise CourseError("sync_bn needs GPUs (SyncBatchNorm has no CPU form); leave --sync-bn out")


def wrap(model: nn.Module) -> nn.Module:
    """The model whose gradients are averaged over the processes after each backward.

    It shares the model's parameters.
    """
    if rank_and_size()[1] == 1:
        return model
    # Of 1x1 filters, whose strides may be named in two ways: a matter of speed, not of value.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket")
    return DistributedDataParallel(model)


def from_first(function: Callable[[], T]) -> T:
    """Call a function in the first process alone; all get its result, or its error.

    So one process reads and writes the files.
    """
    rank, count = rank_and_size()
    if count == 1:
        return function()
    box: list[Any] = [None]
    if rank == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[0] = error
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def total(*values: Tensor) -> None:
    """Replace each value by its sum over the processes."""
    if rank_and_size()[1] > 1:
        for value in values:
            dist.all_reduce(value)


def end() -> None:
    """Leave the group once every process is done.

    A process that ends within it may be aborted by its own gloo threads.
    """
    if rank_and_size()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()


def leave_it_to_the_first() -> None:
    """Wait for the end, in all processes but the first.

    All have the same error; when the first has told it, torchrun ends the others.
    """
    if os.environ.get("RANK", "") not in ("", "0"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)


def is_lost(error: RuntimeError) -> bool:
    """Whether gloo or NCCL says that another process no longer answers."""
    lost = re.search("gloo|nccl|connection|timed out", str(error).lower())
    return rank_and_size()[1] > 1 and lost is not None
