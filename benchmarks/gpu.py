"""What a GPU makes of a training step, and of whole trainings.

A network this small waits for its launches, not for arithmetic: a compiler makes fewer of them, and
a CUDA graph replays those of a step at once. Without a GPU the same is done on the CPU, eager only.
"""

import time
import timeit
from collections.abc import Callable
from functools import partial

import torch
from measure import MAIN, Figures, Lanes, alternate, floor
from probe import cut
from torch import Tensor, nn
from torch.amp import GradScaler

from normcourse import Data, batches, default_settings, fit
from normcourse.engine.fit import autocast, pick_device, run_epoch, start

ON_CPU = {  # precision, and what becomes of the network
    "fp32": (torch.float32, nn.Module.train),
    "bf16": (torch.bfloat16, nn.Module.train),
}
WAYS = ON_CPU | {  # fp16: slow on a CPU, and what a T4 (Turing), which has no bf16, could use
    "fp16": (torch.float16, nn.Module.train),
    "fp16 compiled": (torch.float16, torch.compile),
    "fp16 graphs": (torch.float16, partial(torch.compile, mode="reduce-overhead")),
}


def gpu(data: Data, size: Figures) -> Figures:
    """Milliseconds a step and seconds of set-up of each way, and whole trainings."""
    device, steps = pick_device(), size["steps"]
    part = cut(data.to(device), steps * size["batch_size"])
    x, y = next(batches(part.train_images, part.train_labels, part, size["batch_size"]))
    whole = {norm: training(norm, data, size) for norm in MAIN}
    lanes: Lanes = {}
    set_up: Figures = {norm: {} for norm in MAIN}
    for norm in MAIN:
        run = start(default_settings(norm=norm, batch_size=size["batch_size"]), part, device)
        lanes[norm, "ours"] = partial(run_epoch, run, part)
        for way in WAYS if device.type == "cuda" else ON_CPU:
            steps_of = lane(norm, way, part, x, y)
            set_up[norm][way] = timeit.timeit(partial(steps_of, steps=1), number=1)
            lanes[norm, way] = partial(steps_of, steps=steps)
    found = alternate(lanes, size["few_rounds"], "ms", 1000 / steps)
    return {"norms": found, "set_up": set_up, "whole": whole}


def lane(norm: str, way: str, part: Data, x: Tensor, y: Tensor) -> Callable[..., float]:
    """The floor of measure.py in one of the ways: a function of the number of ``steps``."""
    precision, change = WAYS[way]
    run = start(default_settings(norm=norm), part, x.device, bf16=False)
    run.forward = change(run.model)
    if precision != torch.float32:
        run.forward = autocast(run.forward, x.device, precision)
    scaler = GradScaler(x.device.type, enabled=precision == torch.float16)  # it has a small range
    return partial(floor, run, x, y, scaler=scaler)


def training(norm: str, data: Data, size: Figures) -> Figures:
    """A whole training: its record, its seconds with evaluation, and the peak memory so far."""
    started = time.perf_counter()
    record = fit(default_settings(norm=norm, epochs=size["gpu_epochs"]), data)
    seconds = time.perf_counter() - started
    return record | {"all_seconds": seconds, "peak_mb": torch.cuda.max_memory_allocated() / 1e6}
