"""A whole run: started or resumed, epoch by epoch, with the record at the end.

A checkpoint is kept after each epoch. A finished run is NAME.json, its record, and NAME.pt, its
weights; an unfinished one is NAME.ckpt, which the next call with the same settings, data and folder
goes on from.
"""

import ctypes
import json
import math
import time
import timeit
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from normcourse import train
from normcourse.data import Data, batches, split_validation
from normcourse.engine import parallel
from normcourse.engine import record as files
from normcourse.errors import CourseError, DivergedError
from normcourse.results import Record, run_name
from normcourse.train import Settings


@dataclass
class Run:
    """A training that has begun."""

    settings: Settings
    model: nn.Module
    forward: nn.Module  # the model as it is trained: in its precision, shared by the processes
    optimizers: list[Optimizer]
    generator: torch.Generator  # of the order and the augmentation of the images
    identity: dict[str, Any]  # its settings and data
    origin: dict[str, Any]  # what the figures depend on beside settings and data
    earlier: list[dict[str, Any]] = field(default_factory=list)  # other origins of its first epochs
    history: list[dict[str, float]] = field(default_factory=list)  # the figures of each epoch


@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def fit(
    settings: Settings,
    data: Data,
    folder: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Record:
    """Train the network that ``settings`` name, evaluate it after each epoch, return the record.

    With a folder, the record (.json) and the weights (.pt) are kept there, and a checkpoint (.ckpt)
    after each epoch: a run that was stopped goes on from it and ends with the numbers it would have
    had; a finished one is only read. The processes of a torch.distributed group, if there is one,
    share the work. Raises CourseError for settings or a device that cannot be used, DivergedError
    where the loss is no longer finite.
    """
    train.check_settings(settings, more_epochs=True)
    settings = replace(settings, processes=parallel.rank_and_size()[1])
    path = Path(folder).expanduser() / run_name(settings, data) if folder is not None else None
    if path and parallel.from_first(path.with_suffix(".json").exists):
        wanted = files.identity(settings, data)
        return parallel.from_first(lambda: files.read_record(path.with_suffix(".json"), wanted))
    where = pick_device(device)
    run = start(settings, data, where)
    if settings.validate:
        data = split_validation(data)
    data = data.to(where)
    if path:
        resume(run, path)
        save_checkpoint(run, path)  # a folder that cannot be written is found out now
    while len(run.history) < settings.epochs:
        add_epoch(run, data, path, progress)
    return parallel.from_first(lambda: finish(run, data, path))


def add_epoch(run: Run, data: Data, path: Path | None, progress: bool) -> None:
    """Train and keep one more epoch, and say what it reached; Ctrl-C says how to go on."""
    done = len(run.history)
    try:
        run.history.append(train_and_evaluate(run, data, progress))
        if path:
            save_checkpoint(run, path)
    except KeyboardInterrupt as stop:
        if str(stop) or not (path and progress):  # stopped by another process, or nothing is kept
            raise
        again = f"interrupted: run the cell again to go on after epoch {done}"
        raise KeyboardInterrupt(again) from None
    if progress:
        parallel.tell(last_epoch(run))


def last_epoch(run: Run) -> str:
    """The last epoch in a line: what it reached, and how long the others will take."""
    last, done, epochs = run.history[-1], len(run.history), run.settings.epochs
    name, key = ("validation", "val") if run.settings.validate else ("test", "test")
    reached = f"epoch {done} of {epochs}: {name} accuracy {last[f'{key}_accuracy']:.1f} %"
    left = f", about {last['seconds'] * (epochs - done):,.0f} s left" if done < epochs else ""
    return f"{reached}, {last['seconds']:,.0f} s{left}"


def start(
    settings: Settings, data: Data, device: torch.device, bf16: Any = None, prepare: Any = None
) -> Run:
    """A fresh run: weights drawn from the seed, the optimizers, the fastest way of this machine.

    An experiment says whether it is bf16, and may ``prepare`` the fresh network, in place.
    """
    parallel.check_sync_bn(settings.sync_bn, device)
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    model = train.build(settings, len(data.classes))
    if prepare:
        prepare(model)
    bf16 = parallel.from_first(lambda: has_fast_bf16(device)) if bf16 is None else bf16
    if settings.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Convolutions and pooling are faster in channels_last, on a CPU and a GPU.
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if bf16 and device.type == "cpu":
        make_norms_contiguous(model)
    forward = parallel.wrap(autocast(model, device, torch.bfloat16) if bf16 else model)
    optimizers = train.make_optimizers(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    where = files.origin(device, "bf16 autocast" if bf16 else "fp32")
    identity = files.identity(settings, data)
    return Run(settings, model, forward, optimizers, generator, identity, where)


def make_norms_contiguous(model: nn.Module) -> None:
    """Have Group Norm of many groups train on contiguous copies; changes the model in place.

    In bf16 and channels_last its CPU kernel takes up to 40 times as long as on contiguous numbers,
    the longer the fewer channels a group has. With up to 4 groups the copies cost more.
    """
    for norm in model.modules():
        if isinstance(norm, nn.GroupNorm) and norm.num_groups > 4:
            norm.register_forward_pre_hook(lambda m, x: x[0].contiguous() if m.training else None)
            norm.register_forward_hook(lambda _, x, y: y.to(memory_format=torch.channels_last))


def autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same model, computed in a short type where torch.autocast does that.

    The model itself stays in fp32, for evaluation.
    """
    wrapper = nn.Sequential(model)
    wrapper.forward = torch.autocast(device.type, dtype)(wrapper.forward)  # type: ignore
    return wrapper


def train_and_evaluate(run: Run, data: Data, progress: bool) -> dict[str, float]:
    """One more epoch: its figures. Raises DivergedError if the loss is not finite."""
    started = time.perf_counter()
    figures = run_epoch(run, data, progress)
    seconds = time.perf_counter() - started
    loss, accuracy = parallel.from_first(lambda: evaluate(run.model, data))
    if not math.isfinite(loss + figures["train_loss"]):
        message = f"the loss is no longer finite in epoch {len(run.history) + 1}"
        raise DivergedError(f"{message}: lr, weight_decay or l1 is too large; try a tenth")
    name = "val" if run.settings.validate else "test"
    return figures | {f"{name}_loss": loss, f"{name}_accuracy": accuracy, "seconds": seconds}


def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Loss and accuracy (%) on the test images."""
    loss, predicted = train.evaluate(model, data.test_images, data.test_labels, data)
    return loss, train.percent_correct(predicted, data.test_labels)


def run_epoch(run: Run, data: Data, progress: bool = False) -> dict[str, float]:
    """One pass over the training images in random order.

    Returns the mean loss and accuracy as they were on the way.
    """
    settings, epoch = run.settings, len(run.history)
    part = rank, processes = parallel.rank_and_size()
    images, labels, size = data.train_images, data.train_labels, settings.batch_size
    # For dropout: not the same in two processes, and after a restart what it would have been.
    torch.manual_seed(settings.seed + 1_000_003 * (epoch * processes + rank + 1))
    pairs = batches(images, labels, data, size, run.generator, settings.shift, settings.flip, *part)
    title = f"{settings.net} {settings.norm} epoch {epoch + 1}/{settings.epochs}"
    off = None if progress and rank == 0 else True  # None: shown in a terminal, not in a file
    bar = tqdm(pairs, title, math.ceil(len(images) / size), unit="batch", leave=False, disable=off)
    sums = train.train_epoch(run.forward, run.optimizers, bar, settings, epoch, len(images))
    parallel.total(*sums)
    loss, accuracy = sums[0].item() / len(images), 100 * sums[1].item() / len(images)
    lr = run.optimizers[0].param_groups[0]["lr"]
    return {"train_loss": loss, "train_accuracy": accuracy, "lr": lr}


def finish(run: Run, data: Data, path: Path | None) -> Record:
    """Make the record; write it and the weights, then let the checkpoint go."""
    record = files.make_record(run.model, run.settings, data, run.history)
    record |= run.origin | {"resumed_from": run.earlier}
    if path:
        weights = {name: value.cpu() for name, value in run.model.state_dict().items()}
        files.write_file(path.with_suffix(".pt"), lambda file: torch.save(weights, file))
        files.write_record(path.with_suffix(".json"), record)
        path.with_suffix(".ckpt").unlink(missing_ok=True)
    return record


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(run: Run, path: Path) -> None:
    """Write all that an uninterrupted run would have had in memory at this moment."""
    state = {
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "history": run.history,
        "identity": run.identity,
        "origins": [*run.earlier, run.origin],
        "generator": run.generator.get_state(),
    }
    file = path.with_suffix(".ckpt")
    parallel.from_first(lambda: files.write_file(file, lambda opened: torch.save(state, opened)))


def resume(run: Run, path: Path) -> None:
    """Go on from the checkpoint if there is one.

    Raises CourseError if it cannot be read, or is of other settings or data.
    """
    file = path.with_suffix(".ckpt")
    try:
        state = parallel.from_first(lambda: torch.load(file, map_location="cpu", weights_only=True))
        files.check_identity(file, state.get("identity", {}), run.identity)
        files.check_history(state["history"], run.settings)
        json.dumps([state["history"], state["origins"]])  # the record will have them
        run.model.load_state_dict(state["model"])
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run.history = state["history"]
        run.earlier = [origin for origin in state["origins"] if origin != run.origin]
        run.generator.set_state(state["generator"])
    except (FileNotFoundError, NotADirectoryError):
        return  # there is none, or another process has just finished the same run
    except CourseError:
        raise
    except Exception as error:
        reason = " ".join(str(error).partition(". ")[0].split())  # not torch's advice to load code
        message = f"cannot go on from {file} ({type(error).__name__}: {reason}); delete it"
        raise CourseError(f"{message} to start this run again") from error


# --- the machine ----------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """CUDA if it is there, else the CPU.

    MPS only when asked for: its norm gradients have been wrong.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    usable = ["auto", "cpu", *["cuda"] * cuda, *["mps"] * mps]
    if name not in usable:
        raise CourseError(f"there is no device {name!r} here; allowed: {', '.join(usable)}")
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have glibc keep what one step frees for the next one.

    To have it back costs a page fault for every 4 KiB.
    """
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (mallopt(3)), in bytes
            ctypes.CDLL(None).mallopt(option, 1 << 30)


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays here: a matrix product is timed.

    Some CPUs have its instructions without their speed.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # no public name yet
    native = device.type == "cpu" and supported()
    return native and product_seconds(torch.bfloat16) < product_seconds(torch.float32)


def product_seconds(dtype: torch.dtype) -> float:
    """The time of a matrix product, the shortest of many.

    The first ones, and those that other work disturbs, take longer.
    """
    matrix = torch.ones(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=30))
