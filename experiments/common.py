"""What the recorded experiments share: trials that resume, and their records.

An experiment is a module with a docstring, its protocol; ``load(source)``, its data; and
``trials()``. A trial is an arm with a seed. Its record, EXPERIMENT/ARM-seedN.json, has the
protocol, the settings, the figures of every epoch, the hardware and the versions. The same seed
means the same first weights and the same order of images in every arm; the arms of a seed share
processor, version of torch and precision.
"""

import fcntl
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import update_bn

from normcourse import results
from normcourse.data import Data, batches, split_validation
from normcourse.engine import fit
from normcourse.engine.record import device_name, origin, write_record
from normcourse.errors import DivergedError
from normcourse.model import count_parameters
from normcourse.results import Record
from normcourse.train import Settings, percent_correct, predict

CPU = torch.device("cpu")
DEVICE = fit.pick_device()  # of trainings on images; the others are small, and stay on the CPU


class Trial(Protocol):
    """An arm with a seed."""

    arm: str  # what varies, in words: "k = 8"

    @property
    def seed(self) -> int:
        """Draws the first weights and the order of the data."""

    def measure(self, data: Any, path: Path) -> dict[str, Any]:
        """Train; ``path``, without its suffix, is for a checkpoint.

        Returns settings, history, figures and whether it diverged, for the record.
        """


def record_path(experiment: str, trial: Trial) -> Path:
    """Where a trial's record stands."""
    words = re.sub(r"[^a-z0-9]+", "-", trial.arm.lower()).strip("-")
    return results.EXPERIMENTS / experiment / f"{words}-seed{trial.seed}.json"


def run_trial(experiment: str, protocol: str, trial: Trial, data: Any) -> Record:
    """Train, or go on from the last epoch, and write the record: all that a reader needs."""
    path = record_path(experiment, trial)
    record = {
        "experiment": experiment,
        "protocol": protocol,
        "arm": trial.arm,
        "command": f"python experiments/run.py {experiment}",
        "data": data.name,
        "copy": data.copy,
        **origin(CPU, "fp32"),
        **trial.measure(data, path.with_suffix("")),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_record(path, record)
    path.with_suffix(".ckpt").unlink(missing_ok=True)
    return record


def missing(experiment: str, trials: Iterable[Trial]) -> list[Trial]:
    """The trials without a record.

    A seed that another processor, version or precision began is wholly missing: differences are
    taken within a seed.
    """
    trials, left = list(trials), []
    for seed in sorted({trial.seed for trial in trials}):
        arms = [trial for trial in trials if trial.seed == seed]
        paths = [record_path(experiment, trial) for trial in arms]
        if not all(path.exists() for path in paths):
            left += [arm for arm, path in zip(arms, paths, strict=True) if not made_here(path)]
    return left


def made_here(path: Path) -> bool:
    """Whether there is a record, of this machine and this version of torch."""
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    same_torch = record["versions"]["torch"] == str(torch.__version__)
    return same_torch and record["device"] in (device_name(CPU), device_name(DEVICE))


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process, and no other, may make a record now; a killed one claims nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)


def train_steps(
    loss: Callable[[], Tensor],
    val_loss: Callable[[], float],
    optimizer: Optimizer,
    schedule: LRScheduler,
    steps: int,
    every: int,
) -> list[dict[str, float]]:
    """A training counted in steps: its losses after every ``every``, while they are finite.

    ``loss`` draws a batch and gives its loss, ``val_loss`` that of what judges.
    """
    losses, history = [], []
    for step in range(1, steps + 1):
        new = loss()
        optimizer.zero_grad()
        new.backward()
        optimizer.step()
        schedule.step()
        losses.append(new.item())
        if step % every == 0:
            train, val = sum(losses[-every:]) / every, val_loss()
            if not math.isfinite(train + val):
                break
            history.append({"step": step, "train_loss": train, "val_loss": val})
    return history


# --- trainings of the course's networks -----------------------------------------------------------


def nothing(run: fit.Run, data: Data) -> dict[str, float]:
    """What a training measures beside the usual figures, unless it says so."""
    return {}


@dataclass(frozen=True)
class Training:
    """One training of a network on images."""

    arm: str
    settings: Settings
    prepare: Callable[[nn.Module], object] | None = None  # changes the fresh network in place
    before_epoch: Callable[[fit.Run, Data], object] = nothing
    after_epoch: Callable[[fit.Run, Data], dict[str, float]] = nothing  # more figures of the epoch
    at_end: Callable[[fit.Run, Data], dict[str, float]] = nothing  # figures of the whole trial
    bf16: bool = True  # or fp32; not chosen by a timing, which a busy machine could turn

    @property
    def seed(self) -> int:
        """The seed of the settings."""
        return self.settings.seed

    @torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)  # as fit()
    def measure(self, data: Data, path: Path) -> dict[str, Any]:
        """Epoch by epoch, from the checkpoint if there is one."""
        data = data.to(DEVICE)
        run = fit.start(self.settings, data, DEVICE, self.bf16, self.prepare)
        fit.resume(run, path)
        diverged = False
        while len(run.history) < self.settings.epochs:
            self.before_epoch(run, data)
            try:
                figures = fit.train_and_evaluate(run, data, progress=True)
            except DivergedError:
                diverged = True
                break
            run.history.append(figures | self.after_epoch(run, data))
            fit.save_checkpoint(run, path)
        return {
            "settings": asdict(self.settings),
            "parameters": count_parameters(run.model),
            "images": [len(data.train_labels), len(data.test_labels)],
            "history": run.history,
            "seconds": sum(epoch["seconds"] for epoch in run.history),
            "diverged": diverged,
            "figures": {} if diverged else self.at_end(run, data),
            "resumed_from": run.earlier,
            **run.origin,
        }


def final_accuracy(run: fit.Run, data: Data) -> dict[str, float]:
    """The figures of most trainings: after the last epoch."""
    last = run.history[-1]
    return {name: last[name] for name in last if name.endswith("_accuracy")}


def he_initialization(model: nn.Module) -> None:
    """He et al. (2015, section 2.2): a signal keeps its variance through the network.

    The weights behind an activation have the variance 2 / fan_in; those of a 1x1 convolution behind
    its depthwise filters, with no activation between, 1 / fan_in. Biases are 0. In place.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())  # the same numbers in any arm
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            kind = "linear" if name.endswith("conv.1") else "relu"
            init.kaiming_normal_(conv.weight, nonlinearity=kind, generator=generator)
            if conv.bias is not None:
                init.zeros_(conv.bias)


# --- the search for a rate ------------------------------------------------------------------------


def power(step: int) -> float:
    """The rates 0.01, 0.03, 0.1, 0.3, 1 are the steps -4 to 0."""
    return float(f"{10 ** (step / 2):.0e}")


def search(
    experiment: str, steps: Iterable[int], trials_at: Callable[[int], list[Training]]
) -> tuple[list[int], int | None]:
    """The steps of a rate to be tried, and the best of them, or None while some are missing.

    Where the best is at an edge, one more is to be tried beyond it.
    """
    steps = list(steps)
    while True:
        reached = {step: mean_accuracy(experiment, trials_at(step)) for step in steps}
        if None in reached.values():
            return steps, None
        best = max(steps, key=lambda step: reached[step] or 0.0)
        if steps[0] < best < steps[-1]:
            return steps, best
        steps = [steps[0] - 1, *steps] if best == steps[0] else [*steps, best + 1]


def mean_accuracy(experiment: str, trials: list[Training]) -> float | None:
    """Accuracy (%) after the last epoch; a diverged trial counts as chance. None: not all ran."""
    reached = []
    for trial in trials:
        path = record_path(experiment, trial)
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        name = "val_accuracy" if trial.settings.validate else "test_accuracy"
        reached.append(10.0 if record["diverged"] else record["figures"][name])
    return statistics.mean(reached)


# --- data and judging -----------------------------------------------------------------------------


def held_out(data: Data, batch_size: int) -> Data:
    """45,000 training images, judged on the 5,000 others, in place of the test images.

    As many training images are left out as would make a short last batch.
    """
    data = split_validation(data)
    count = len(data.train_labels) // batch_size * batch_size
    images, labels = data.train_images[:count], data.train_labels[:count]
    return data._replace(train_images=images, train_labels=labels)


def accuracy(model: nn.Module, data: Data, batch_size: int = 500) -> float:
    """Accuracy (%) on the images that judge."""
    predicted = predict(model, data.test_images, data, batch_size).argmax(1)
    return percent_correct(predicted, data.test_labels)


def some_images(data: Data, count: int) -> Data:
    """The data set with ``count`` of its training images as those that judge, always the same."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(1))
    chosen = order[:count]
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    return data._replace(test_images=images, test_labels=labels)


def inputs(data: Data, batch_size: int) -> list[torch.Tensor]:
    """The images that judge as batches (N, 3, 32, 32) for a network."""
    stream = batches(data.test_images, data.test_labels, data, batch_size)
    return [x for x, _ in stream]


def with_precise_statistics(model: nn.Module, data: Data) -> nn.Module:
    """The same network with Batch Norm's statistics of 10,000 training images, in place.

    They are averaged over batches of 500 (Wu & Johnson 2021, section 3).
    """
    update_bn(inputs(some_images(data, 10_000), 500), model)
    return model.eval()
