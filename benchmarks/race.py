"""Time to accuracy: our recipe against the plain loop with the best public one.

Each runs with a long and with a short cycle.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import plain
import torch
from measure import CPU, Figures
from report import LEVELS, seconds_to
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from normcourse import Data, default_settings, evaluate
from normcourse.engine.fit import run_epoch, start
from normcourse.engine.record import write_file
from normcourse.train import percent_correct


@dataclass
class Lane:
    """A contestant somewhere in its cycle."""

    name: str  # ours or plain
    epochs: int  # of the cycle
    train: Callable[[], Any]  # an epoch
    parts: list[Any]  # the model, and what else a checkpoint keeps
    generator: torch.Generator  # of ours; the plain loop has PyTorch's own
    history: list[Figures] = field(default_factory=list)

    def done(self) -> bool:
        """At the highest level, or at the end of the cycle."""
        return isfinite(seconds_to(max(LEVELS), self.history)) or len(self.history) == self.epochs


def race(data: Data, checkpoint: Path, size: Figures) -> Figures:
    """Train each contestant once for each length of its cycle, all in turn, an epoch each.

    Test accuracy is measured after each epoch, by the same code for all, and its time does not
    count. Goes on from the checkpoint, which is written after each epoch.
    """
    workers = 2 if (os.cpu_count() or 1) > 2 else 0  # they need cores of their own
    loader = plain.train_loader(data, size["batch_size"], workers, plain.RANDOM_AUGMENT)
    lanes = [ours(data, epochs, size["batch_size"]) for epochs in size["cycles"]["ours"]]
    lanes += [theirs(data, epochs, loader) for epochs in size["cycles"]["plain"]]
    if checkpoint.exists():
        load(lanes, checkpoint)
    with tqdm(desc="accuracy", unit="epoch") as bar:
        while waiting := [lane for lane in lanes if not lane.done()]:
            lane = min(waiting, key=lambda lane: len(lane.history))
            lane.history.append(epoch(lane, data))
            save(lanes, checkpoint)
            bar.update()
            bar.set_postfix_str(f"{lane.name}: {lane.history[-1]['test_accuracy']:.2f} %")
    told = [{"name": each.name, "epochs": each.epochs, "history": each.history} for each in lanes]
    return {"norm": "bn", "workers": workers, "lanes": told}


def ours(data: Data, epochs: int, batch_size: int) -> Lane:
    run = start(default_settings(epochs=epochs, batch_size=batch_size), data, CPU)
    train = partial(run_epoch, run, data)
    return Lane("ours", epochs, train, [run.model, *run.optimizers], run.generator, run.history)


def theirs(data: Data, epochs: int, loader: DataLoader) -> Lane:
    model = plain.network("bn", data)
    optimizer = plain.sgd(model)
    scheduler = OneCycleLR(optimizer, plain.PEAK_LR, epochs=epochs, steps_per_epoch=len(loader))
    train = partial(plain.train_epoch, model, optimizer, loader, scheduler)
    return Lane("plain", epochs, train, [model, optimizer, scheduler], torch.default_generator)


def epoch(lane: Lane, data: Data) -> Figures:
    """Train an epoch, and measure its seconds and the test accuracy (%) after it."""
    started = time.perf_counter()
    lane.train()
    seconds = time.perf_counter() - started
    _, predicted = evaluate(lane.parts[0], data.test_images, data.test_labels, data)
    return {"seconds": seconds, "test_accuracy": percent_correct(predicted, data.test_labels)}


def save(lanes: list[Lane], checkpoint: Path) -> None:
    kept = []
    for lane in lanes:
        states = [part.state_dict() for part in lane.parts]
        last = states[-1].items()  # PyTorch 2.3 adds a function to a scheduler's
        states[-1] = {name: value for name, value in last if not callable(value)}
        kept.append((lane.history, states, lane.generator.get_state()))
    write_file(checkpoint, lambda file: torch.save(kept, file))


def load(lanes: list[Lane], checkpoint: Path) -> None:
    """Put all lanes where they were."""
    saved = torch.load(checkpoint, weights_only=True)
    for lane, (history, states, generator) in zip(lanes, saved, strict=True):
        lane.history.extend(history)
        lane.generator.set_state(generator)
        for part, state in zip(lane.parts, states, strict=True):
            part.load_state_dict(state)
