"""The record that a training leaves: made, written whole or not at all, read and checked."""

import glob
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normcourse import __version__
from normcourse.data import Data
from normcourse.errors import CourseError
from normcourse.model import count_parameters
from normcourse.results import Record, command, mistakes, table_order
from normcourse.train import Settings, check_settings, percent_correct, predict

KINDS = {  # what a record must have
    str: ("command", "data", "copy", "device", "precision", "system"),
    int: ("parameters", "threads"),
    list: ("classes", "images", "history", "confusion", "mistakes"),
    dict: ("settings", "versions"),
}
RECORDS = "[!.]*-seed*-????????.json"  # the names that run_name makes
LEFTOVER_SECONDS = 3600  # a temporary file not written to for so long belongs to a killed process


def make_record(model: nn.Module, settings: Settings, data: Data, history: list[Any]) -> Record:
    """What a reader needs to trust a run's figures, but for where it ran (``origin``)."""
    classes, labels = len(data.classes), data.test_labels.cpu()
    logits = predict(model, data.test_images, data).cpu()
    mirrored = predict(model, data.test_images.flip(3), data).cpu()
    averaged = (logits.softmax(1) + mirrored.softmax(1)).argmax(1)
    pairs = labels * classes + logits.argmax(1)
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes)
    return {
        "command": command(asdict(settings)),
        "settings": asdict(settings),
        "parameters": count_parameters(model),
        "data": data.name,
        "copy": data.copy,
        "classes": list(data.classes),
        "images": [len(data.train_labels), len(data.test_labels)],
        "history": history,
        "confusion": confusion.tolist(),  # rows: true class, columns: predicted
        "flip_accuracy": percent_correct(averaged, labels),  # with the mirror image; not the result
        "mistakes": mistakes(logits, labels),
        "seconds": sum(epoch["seconds"] for epoch in history),  # of training, evaluation apart
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def origin(device: torch.device, precision: str) -> dict[str, Any]:
    """What the figures of a run depend on beside its settings and data."""
    python = platform.python_version()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"normcourse": __version__, "torch": str(torch.__version__), "python": python},
        "system": platform.system(),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# --- files ----------------------------------------------------------------------------------------


def write_file(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file whole or not at all: into a temporary one beside it, then renamed over it."""
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # pids are not unique
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None)
        if not reason:
            raise
        raise OSError(f"cannot write {path}: {reason}; make room or name another folder") from error
    finally:
        with suppress(OSError):  # of a read-only disk, which would hide the error
            temporary.unlink(missing_ok=True)
            for left in path.parent.glob(f"{glob.escape(path.stem)}.*.????????.tmp"):
                if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                    left.unlink()


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def read_record(path: Path, wanted: dict[str, Any] | None = None) -> Record:
    """Read a record; raises CourseError if it is cut short, not a record, or not the wanted one."""
    try:
        record: Record = json.loads(path.read_text())
        record["settings"] = asdict(Settings(**record["settings"]))  # old ones have fewer
        check_record(record)
        json.dumps(record, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except OSError as error:
        raise CourseError(f"cannot read {path} ({error.strerror})") from error
    except Exception as error:  # what is no record fails in many ways
        message = f"{path} is not a whole record ({type(error).__name__}: {error}); delete it"
        raise CourseError(f"{message} and train again") from error
    check_identity(path, record["settings"] | record, wanted or {})
    return record


def find_records(folder: str | Path) -> dict[Path, Record]:
    """The records of a folder, in the table's order. Raises CourseError if one is cut short."""
    records = {path: read_record(path) for path in sorted(Path(folder).glob(RECORDS))}
    return dict(sorted(records.items(), key=lambda item: table_order(item[1])))


def check_record(record: Record) -> None:
    """Raise an error if a record lacks anything that the report needs."""
    settings = Settings(**record["settings"])
    check_settings(settings, more_epochs=True)
    for kind, keys in KINDS.items():
        for key in keys:
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
    classes, (train, test) = record["classes"], record["images"]
    "".join(classes)  # a TypeError unless all are text
    if [len(row) for row in record["confusion"]] != [len(classes)] * len(classes):
        raise ValueError("confusion: a row and a column for each class are needed")
    check_history(record["history"], settings)
    check_numbers([train, test, record["seconds"], *chain(*record["confusion"])], most=1e300)
    check_numbers([record["flip_accuracy"]], most=100)
    for index, predicted, confidence in record["mistakes"]:
        check_numbers([confidence], most=1)
        if index not in range(test) or predicted not in range(len(classes)):
            raise ValueError("mistakes: an image or a class that is not there")
    if not record["history"] or not record["copy"].split():
        raise ValueError("history and copy must not be empty")


def identity(settings: Settings, data: Data) -> dict[str, Any]:
    """What a run is of: its settings and data, as its record and its checkpoint name them."""
    return asdict(settings) | {"data": data.name, "copy": data.copy, "classes": list(data.classes)}


def check_identity(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise CourseError where a file is of another run than its name says."""
    for name, value in wanted.items():
        if (other := found.get(name, "not named")) != value:
            message = f"{file} is of another run: its {name} is {other!s:.80}, not {value!s:.80}"
            raise CourseError(f"{message}; delete it to start this run again")


def check_history(history: list[Any], settings: Settings) -> None:
    """Raise an error unless these are the figures of epochs of a run with the settings."""
    name = "val" if settings.validate else "test"
    if len(history) > settings.epochs:
        raise ValueError(f"history: {len(history)} epochs, of {settings.epochs}")
    for epoch in history:
        check_numbers([epoch[f"{part}_accuracy"] for part in ("train", name)], most=100)
        check_numbers([epoch["train_loss"], epoch[f"{name}_loss"], epoch["seconds"]], most=1e300)


def check_numbers(values: list[Any], most: float) -> None:
    """Raise ValueError unless each is a number from 0 to ``most``; nan is none."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ValueError(f"a figure that cannot be: {value!r:.80}")
