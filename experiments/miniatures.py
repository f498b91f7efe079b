"""Small experiments on NormNet, recorded: python experiments/miniatures.py [NAME ...] --data PATH

NAME is one or more of these (default: all). In brackets: the networks to train and the minutes on one thread of a slow core.

  rates        accuracy against learning rate, for every norm and none [75, 28]
  groups       accuracy against the number of groups, LN and IN as the ends [6 beside those of rates, 2]
  layer_norms  GN(1), LayerNorm([C, H, W]) and per-pixel LN in the same network [9, 3]
  batch_size   BN, GN and LN at batch size 128 to 2; BN evaluated in three ways [36, 24]
  bn_rates     with and without BN at three learning rates, epoch by epoch [18, 19]
  norms        every norm and none, each at its best rate of rates, with seeds of its own [15, 11]; waits for all of rates

Training images are a seeded stratified subset of the training set; validation images are 2,000 others of the TRAINING set.
The test set is not touched. All networks of a miniature see the same number of samples.

A finished network is kept in --work and not trained again, and NAME.json is written anew with all that are finished. Ctrl-C
is safe. Seed 0 of every network comes first, then seed 1, then 2: a run that is cut short still shows something.

Everything, on two cores, a thread each; twice, because norms waits for all of rates:

  export OMP_NUM_THREADS=1
  for turn in 1 2; do
    for part in 0/2 1/2; do python experiments/miniatures.py --data PATH --part $part & done; wait
  done
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm

from normcourse import CourseError, NormNet, default_settings, fit, load_data, predict
from normcourse import train as train_module
from normcourse.data import Data
from normcourse.miniatures import (
    FOLDER,
    LAYER_NORMS,
    best_rate,
    miniature,
    precise_statistics,
    with_batch_statistics,
    with_layer_norm,
)  # fmt: skip
from normcourse.model import build, count_parameters
from normcourse.norm import NORMS
from normcourse.train import DivergedError, Record, Settings, _percent, run_name, write_record

IMAGES_EPOCHS = {  # one epoch where no curve is needed: more images for as many samples seen
    "rates": (10_000, 1), "groups": (10_000, 1), "layer_norms": (10_000, 1), "batch_size": (10_000, 1),
    "bn_rates": (10_000, 3), "norms": (10_000, 2),
}  # fmt: skip
TINY = (40, 1)  # of every miniature, with --preliminary
VALIDATION = 2_000  # training images that no miniature trains on
PRECISE = 4_000  # training images for precise statistics
BATCH_SIZE = 32  # more steps than 128 from as few samples; batch_size has its own
SEEDS, OTHER_SEEDS = (0, 1, 2), (3, 4, 5)  # norms reports the others: its rates were chosen on the first
BATCH_SIZES = (128, 32, 8, 2)
FACTORS = (1 / 9, 1 / 3, 1, 3, 9)  # of rates, around Group Norm's rate
BN_FACTORS = (1 / 5, 1, 5)  # of bn_rates, around the same

WHAT = {
    "rates": "peak learning rates around the Group Norm recipe's, scaled to the batch size; one cycle",
    "groups": "one learning rate for all: Group Norm's, scaled to the batch size",
    "layer_norms": "one learning rate for all; no weight decay, which would touch only those scales that are not vectors",
    "batch_size": "each norm's learning rate, scaled with the batch size: by its root for Muon and AdamW, in proportion for SGD",
    "bn_rates": "constant learning rates, so that a rate means the same in every epoch",
    "norms": "each norm at the best rate of the miniature rates, with seeds that had no part in choosing it",
}
NOT_RUN = {
    "rates": ["rates between and beyond these", "a rate for each number of groups", "longer training"],
    "groups": ["group numbers that do not divide every width", "a learning rate tuned for each number of groups"],
    "layer_norms": ["a learning rate tuned for each", "with weight decay"],
    "batch_size": ["batch size 1", "Instance Norm and no norm", "a learning rate tuned at each batch size",
                   "another momentum of the running averages"],
    "bn_rates": ["Group, Layer and Instance Norm", "a schedule", "rates between and beyond these"],
    "norms": ["longer training (the full runs have it)"],
}  # fmt: skip
PROVENANCE = ("device", "threads", "precision", "versions", "system")
MILLISECONDS = {
    128: 1.5,
    32: 1.9,
    8: 2.8,
    4: 4.5,
    2: 7.5,
}  # a sample seen, by batch size, on one slow core; for estimates


class Point(NamedTuple):
    """One network to be trained: its settings, and what they do not say."""

    settings: Settings
    images: int  # it trains on
    layer: str = ""  # what replaces its norms: chw, pixel or nothing
    three_ways: bool = False  # BN evaluated in three ways


def scaled_rate(norm: str, batch_size: int) -> float:
    """The recipe's learning rate, scaled from its batch size to another.

    AdamW and Muon divide a gradient by its own size, which for small batches is noise that falls with the root of the
    batch size: so the root (Malladi et al. 2022). SGD: in proportion (Goyal et al. 2017). Betas and weight_decay stay.
    """
    recipe = default_settings(norm=norm)
    return recipe.lr * (batch_size / recipe.batch_size) ** (1 if recipe.optimizer == "sgd" else 0.5)


def changes(name: str, rates: Record | None) -> list[dict[str, Any]]:
    """The settings that differ from point to point of a miniature."""
    rate = scaled_rate("gn", BATCH_SIZE)
    if name == "rates":
        return [{"norm": norm, "lr": rate * factor} for factor in FACTORS for norm in NORMS]
    if name == "groups":
        common = math.gcd(*NormNet.WIDTHS.values())
        inner = [{"norm": "gn", "num_groups": g, "lr": rate} for g in range(2, common + 1) if common % g == 0]
        return [{"norm": "ln", "lr": rate}, *inner, {"norm": "in", "lr": rate}]
    if name == "layer_norms":
        return [{"norm": "ln", "lr": rate, "weight_decay": 0.0, "layer": layer} for layer in LAYER_NORMS]
    if name == "batch_size":
        return [{"norm": norm, "batch_size": size, "lr": scaled_rate(norm, size), "three_ways": norm == "bn"}
                for size in BATCH_SIZES for norm in ("bn", "gn", "ln")]  # fmt: skip
    if name == "bn_rates":
        return [{"norm": norm, "lr": rate * factor, "schedule": "step"} for factor in BN_FACTORS for norm in ("bn", "none")]
    return [{"norm": norm, "lr": best_rate(rates, norm)} for norm in NORMS] if rates else []


def plan(name: str, tiny: bool = False, rates: Record | None = None) -> list[Point]:
    """The points of a miniature, seed by seed; those of ``norms`` need the record of ``rates``, all of it."""
    images, epochs = TINY if tiny else IMAGES_EPOCHS[name]
    points = []
    for seed in OTHER_SEEDS if name == "norms" else SEEDS:
        for change in changes(name, rates):
            change = {"batch_size": BATCH_SIZE} | change | {"lr": float(f"{change['lr']:.2g}")}
            extra = {key: change.pop(key) for key in ("layer", "three_ways") if key in change}
            points.append(Point(default_settings(epochs=epochs, seed=seed, **change), images, **extra))
    return points


def subset(data: Data, images: int, held_out: int) -> Data:
    """As many training images of each class, and others of them in place of the test images; always the same ones."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    classes, kept, held = len(data.classes), [], []
    for k in range(classes):
        own = order[data.train_labels[order] == k]
        held.append(own[: held_out // classes])
        kept.append(own[held_out // classes :][: images // classes])
        if len(held[-1]) + len(kept[-1]) < held_out // classes + images // classes:
            raise CourseError(f"{images} + {held_out} images are asked for, but class {data.classes[k]!r} has {len(own)}")
    parts = [indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
             for indices in (torch.cat(kept), torch.cat(held))]  # fmt: skip
    return data._replace(
        copy=f"{data.copy}, {images} + {held_out} of its training images",
        train_images=data.train_images[parts[0]], train_labels=data.train_labels[parts[0]],
        test_images=data.train_images[parts[1]], test_labels=data.train_labels[parts[1]],
    )  # fmt: skip


def stem(point: Point, data: Data) -> str:
    """The name of a point's file: no two points have the same, nor two data sets."""
    return "-".join(filter(None, [run_name(point.settings, data), point.layer, "3ways" * point.three_ways]))


def network(point: Point, classes: int) -> nn.Module:
    """The point's network, untrained."""
    model = build("normnet", point.settings.norm, classes, point.settings.num_groups)
    return with_layer_norm(model, point.layer) if point.layer else model


def run(point: Point, data: Data, work: Path) -> Record:
    """Train and evaluate one point on a subset; what is finished is only read."""
    path = work / f"{stem(point, data)}.point"
    if path.exists():
        return json.loads(path.read_text())
    fitted = work / (point.layer or "normnet") / run_name(point.settings, data)
    model = network(point, len(data.classes))
    with patch.object(train_module, "build", lambda *_, **__: network(point, len(data.classes))):  # fit knows no layer
        try:
            record = fit(point.settings, data, fitted.parent, progress=False)
        except DivergedError:
            record = diverged(point, fitted, len(data.classes))
    result: Record = {"settings": asdict(point.settings) | {"layer": point.layer}}
    result["parameters"] = count_parameters(model)
    for key in ("val_accuracy", "train_accuracy"):
        result[key] = [round(h[key.replace("val", "test")], 4) for h in record["history"]]  # held out, not the test set
    if point.three_ways:
        result |= {f"{way}_accuracy": result["val_accuracy"][-1] for way in ("precise", "batch")}
        if not record.get("diverged"):
            model.load_state_dict(torch.load(fitted.with_suffix(".pt"), weights_only=True))
            result |= two_other_ways(model, data, point.settings.batch_size)
    result |= {key: record[key] for key in PROVENANCE if key in record} | {"seconds": round(record["seconds"], 1)}
    result["diverged"] = "diverged" in record
    write_record(path, result)
    return result


def diverged(point: Point, fitted: Path, classes: int) -> Record:
    """A record of a run whose loss is no longer finite: from then on it guesses one class, right in 1 of ``classes``."""
    checkpoint = fitted.with_suffix(".ckpt")
    history = torch.load(checkpoint, weights_only=True)["history"] if checkpoint.exists() else []
    guess = {"test_accuracy": 100 / classes, "train_accuracy": 100 / classes}
    history += [guess] * (point.settings.epochs - len(history))
    return {"history": history, "seconds": sum(h.get("seconds", 0.0) for h in history), "diverged": True}


def two_other_ways(model: nn.Module, data: Data, batch_size: int) -> dict[str, float]:
    """Accuracy of a network with Batch Norm, evaluated with precise statistics and with those of each batch."""
    precise = predict(precise_statistics(model, data, PRECISE), data.test_images, data)
    batch = predict(with_batch_statistics(model), data.test_images, data, batch_size)
    accuracy = {"precise_accuracy": precise, "batch_accuracy": batch}
    return {key: round(_percent(logits.argmax(1), data.test_labels), 4) for key, logits in accuracy.items()}


def gather(name: str, points: list[Point], data: Data, work: Path, out: Path, tiny: bool) -> Record:
    """Write NAME.json from all points that are finished, and return it; a list says what was not run."""
    files = [work / f"{stem(point, data)}.point" for point in points]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    settings = [asdict(point.settings) | {"layer": point.layer} for point in points]
    common = {key: value for key, value in settings[0].items() if all(s[key] == value for s in settings)}
    missing = [
        ", ".join(f"{key} {value}" for key, value in s.items() if key not in common)
        for s, file in zip(settings, files, strict=True) if not file.exists()
    ]  # fmt: skip
    record = {
        "name": name, "preliminary": tiny, "what": WHAT[name],
        "command": f"python experiments/miniatures.py {name}{' --preliminary' * tiny}",
        "data": data.name, "copy": data.copy, "images": [len(data.train_labels), len(data.test_labels)],
        "samples_seen": len(data.train_labels) * common["epochs"],
        "seeds": sorted({point["settings"]["seed"] for point in found}),
        **{key: _different(point[key] for point in found if key in point) for key in PROVENANCE},
        "seconds": round(sum(point["seconds"] for point in found)), "not_run": [*missing, *NOT_RUN[name]],
        "complete": not missing, "settings": common,
    }  # fmt: skip
    for point in found:
        point |= {key: value for key, value in point.pop("settings").items() if key not in common}
    record["points"] = [{k: v for k, v in point.items() if k not in PROVENANCE} for point in found]
    if found:
        write_record(out / f"{name}.json", record)
    return record


def _different(values: Iterable[Any]) -> list[Any]:
    """Each value once."""
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]


def seconds(point: Point, held_out: int) -> float:
    """What a point will cost on one slow core: its training, and its evaluations at 0.8 ms an image."""
    seen, epochs = point.images * point.settings.epochs, point.settings.epochs
    extra = (PRECISE + 2 * held_out) * point.three_ways
    return (MILLISECONDS[point.settings.batch_size] * seen + 0.8 * ((epochs + 1) * held_out + extra)) / 1000


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"any of {', '.join(IMAGES_EPOCHS)} (default: all)")
    parser.add_argument("--data", help="source of the images (default: $NORMCOURSE_DATA, else auto)")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="train only every Nth network, from the Kth (from 0)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and its cost, train nothing")
    parser.add_argument("--preliminary", action="store_true", help=f"{TINY[0]} images, {TINY[1]} epoch: the format only")
    parser.add_argument("--work", type=Path, default=Path("runs/miniatures"), help="finished networks (%(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="records (default: inside the package)")
    chosen = parser.parse_args(words)
    names = chosen.name or list(IMAGES_EPOCHS)
    if unknown := set(names) - set(IMAGES_EPOCHS):
        parser.error(f"no miniature {', '.join(sorted(unknown))}; there are {', '.join(IMAGES_EPOCHS)}")
    if not (found := re.fullmatch(r"(\d+)/(\d+)", chosen.part)) or int(found[1]) >= int(found[2]):
        parser.error(f"--part is {chosen.part!r}; expected K/N, K from 0 to N - 1, e.g. 0/2 and 1/2")
    part, parts = int(found[1]), int(found[2])
    try:
        data = load_data(chosen.data)
        for stage in ([name for name in names if name != "norms"], ["norms"] if "norms" in names else []):
            run_all(stage, data, chosen, part, parts)
    except CourseError as error:
        parser.error(str(error))


def run_all(names: list[str], data: Data, chosen: argparse.Namespace, part: int, parts: int) -> None:
    """Train this part's points of these miniatures, seed 0 of every one first, and gather after each."""
    held_out = TINY[0] if chosen.preliminary else VALIDATION
    rates = finished_rates(data, chosen) if "norms" in names else None
    plans = {name: plan(name, chosen.preliminary, rates) for name in names}
    images = {p.images: subset(data, p.images, held_out) for points in plans.values() for p in points}
    todo: dict[str, tuple[str, Point]] = {}  # by file: a network that two miniatures share is trained once
    for name, points in plans.items():
        for point in points:
            todo.setdefault(f"{stem(point, images[point.images])}.point", (name, point))
    mine = sorted(todo.items(), key=lambda item: item[1][1].settings.seed)[part::parts]  # a stable sort
    mine = [(file, item) for file, item in mine if not (chosen.work / file).exists()]
    for name in names:
        cost = [seconds(point, held_out) for _, (owner, point) in mine if owner == name]
        words = f"{len(cost)} of {len(plans[name])} networks to train in part {part}/{parts}"
        waits = "waits for all of `rates`: run this again then" if not plans[name] else ""
        print(f"{name:<12} {waits or f'{words}, about {sum(cost) / 60:.0f} minutes on a slow core'}", flush=True)
    if chosen.dry_run:
        return
    for _, (name, point) in tqdm(mine, unit="network"):
        run(point, images[point.images], chosen.work)
        gather(name, plans[name], images[point.images], chosen.work, chosen.out, chosen.preliminary)
    for name, points in plans.items():  # what is shared, and what another part has finished
        if points:
            gather(name, points, images[points[0].images], chosen.work, chosen.out, chosen.preliminary)


def finished_rates(data: Data, chosen: argparse.Namespace) -> Record | None:
    """The record of ``rates`` on these images, if all of it is there."""
    try:
        rates = miniature("rates", chosen.out)
    except CourseError:
        return None
    fits = rates["preliminary"] == chosen.preliminary and rates["copy"].startswith(data.copy)
    return rates if rates["complete"] and fits else None


if __name__ == "__main__":
    main()
