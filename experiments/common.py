"""What the recorded experiments share: trials that resume, and their records.

An experiment is a module with a docstring, its protocol, and ``trials()``. Each trial is one
training; its record, records/EXPERIMENT/ARM-seedN.json, has the protocol, the settings, the figures
of every epoch, the hardware and the versions. The same seed means the same first weights and the
same order of images in every arm, and every arm of an experiment is computed in the same precision.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normcourse.data import Data, batches, split_validation
from normcourse.engine import fit
from normcourse.engine.fast_norm import use_fast_group_norm
from normcourse.engine.record import origin, write_record
from normcourse.errors import DivergedError
from normcourse.model import count_parameters
from normcourse.results import Record
from normcourse.train import Settings, build, make_optimizers, percent_correct, predict

RECORDS = Path(__file__).resolve().parent / "records"
CPU = torch.device("cpu")


def nothing(run: fit.Run, data: Data) -> dict[str, float]:
    """What a trial measures beside the usual figures, unless it says so."""
    return {}


@dataclass(frozen=True)
class Trial:
    """One training of an experiment."""

    arm: str  # what varies, in words: "k = 8"
    settings: Settings
    prepare: Callable[[nn.Module], object] | None = None  # changes the fresh network in place
    before_epoch: Callable[[fit.Run, Data], object] = nothing
    after_epoch: Callable[[fit.Run, Data], dict[str, float]] = nothing  # more figures of the epoch
    at_end: Callable[[fit.Run, Data], dict[str, float]] = nothing  # figures of the whole trial
    bf16: bool = True  # or fp32; not chosen by a timing, which a busy machine could turn

    def path(self, experiment: str) -> Path:
        """Where the record stands, without its suffix."""
        words = re.sub(r"[^a-z0-9]+", "-", self.arm.lower()).strip("-")
        return RECORDS / experiment / f"{words}-seed{self.settings.seed}"


def run_trial(experiment: str, protocol: str, trial: Trial, data: Data) -> Record:
    """Train, or go on from the last epoch, and write the record; a finished trial is only read."""
    path = trial.path(experiment)
    if path.with_suffix(".json").exists():
        record: Record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return record
    run = start(trial, data)
    fit.resume(run, path)
    diverged = False
    while len(run.history) < trial.settings.epochs and not diverged:
        trial.before_epoch(run, data)
        try:
            figures = fit.train_and_evaluate(run, data, progress=True)
        except DivergedError:
            diverged = True
            continue
        run.history.append(figures | trial.after_epoch(run, data))
        fit.save_checkpoint(run, path)
    record = make_record(experiment, protocol, trial, run, data)
    record["diverged"] = diverged
    record["figures"] = {} if diverged else trial.at_end(run, data)
    write_record(path.with_suffix(".json"), record)
    path.with_suffix(".ckpt").unlink(missing_ok=True)
    return record


def start(trial: Trial, data: Data) -> fit.Run:
    """The trial before its first epoch; as fit.start, but for what it changes and its precision."""
    settings = trial.settings
    fit.keep_freed_memory()
    torch.manual_seed(settings.seed)
    model = build(settings, len(data.classes))
    if trial.prepare:
        trial.prepare(model)
    if trial.bf16:
        use_fast_group_norm(model)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = fit.in_bf16(model, CPU) if trial.bf16 else model
    generator = torch.Generator().manual_seed(settings.seed)
    where = origin(CPU, "bf16 autocast" if trial.bf16 else "fp32")
    return fit.Run(settings, model, forward, make_optimizers(model, settings), generator, where)


def make_record(
    experiment: str, protocol: str, trial: Trial, run: fit.Run, data: Data
) -> dict[str, Any]:
    """Everything a reader needs to trust a trial's figures, or to run it again."""
    return {
        "experiment": experiment,
        "protocol": protocol,
        "arm": trial.arm,
        "command": f"python experiments/run.py {experiment}",
        "settings": asdict(trial.settings),
        "parameters": count_parameters(run.model),
        "data": data.name,
        "copy": data.copy,
        "images": [len(data.train_labels), len(data.test_labels)],
        "history": run.history,
        "seconds": sum(epoch["seconds"] for epoch in run.history),
        **run.origin,
        "resumed_from": run.earlier,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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
