"""Small experiments on NormNet, recorded: python experiments/miniatures.py [NAME ...] --data PATH

NAME is one or more of these (default: all). In brackets: the networks to train and the minutes on
one thread of a slow core.

  rates        accuracy against learning rate, for every norm and none [75, 28]
  groups       accuracy against the number of groups, LN and IN as the ends [6 beside rates', 2]
  layer_norms  GN(1), LayerNorm([C, H, W]) and per-pixel LN in the same network [9, 3]
  batch_size   BN, GN and LN at batch size 128 to 2; BN evaluated in three ways [36, 24]
  bn_rates     with and without BN at three learning rates, epoch by epoch [18, 19]
  norms        every norm and none, each at its best rate of rates, with seeds of its own [15, 11];
               waits for all of rates

Training images are a seeded stratified subset of the training set; validation images are 2,000
others of the TRAINING set. The test set is not touched. All networks of a miniature see the same
number of samples.

A finished network is kept in --work and not trained again, and NAME.json is written anew with all
that are finished. Ctrl-C is safe. Seed 0 of every network comes first, then seed 1, then 2: a run
that is cut short still shows something.

Everything, on two cores, a thread each; twice, because norms waits for all of rates:

  export OMP_NUM_THREADS=1
  for turn in 1 2; do
    for part in 0/2 1/2; do python experiments/miniatures.py --data PATH --part $part & done; wait
  done
"""

import argparse
import copy
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from normcourse import CourseError, batches, count_parameters, load_data, predict
from normcourse.data import Data
from normcourse.engine import fit
from normcourse.engine.record import write_record
from normcourse.errors import DivergedError
from normcourse.norm import NORMS, activations, exchange_norms
from normcourse.results import EXPERIMENTS, Record, accuracies, experiment, run_name, values
from normcourse.train import Settings, default_settings, make_optimizers, percent_correct

IMAGES, VALIDATION = 10_000, 2_000  # training images to train on, and others to judge on
# One where no curve is needed: more images for as many samples seen.
EPOCHS = {"rates": 1, "groups": 1, "layer_norms": 1, "batch_size": 1, "bn_rates": 3, "norms": 2}
TINY = 40  # images, with --preliminary, of every miniature; and one epoch
BATCH_SIZE = 32  # more steps than 128 from as few samples; batch_size has its own
SEEDS, OTHER_SEEDS = (
    (0, 1, 2),
    (3, 4, 5),
)  # norms has the others: its rates were chosen on the first
BATCH_SIZES = (128, 32, 8, 2)
FACTORS = (1 / 9, 1 / 3, 1, 3, 9)  # of rates, around Group Norm's rate
BN_FACTORS = (1 / 5, 1, 5)  # of bn_rates, around the same
GROUPS = (2, 4, 8)  # every number between 1 and C that divides all widths
LAYERS = ("", "chw", "pixel")  # GN(1), LayerNorm([C, H, W]), per-pixel LN

WHAT = {
    "rates": "peak learning rates around the Group Norm recipe's, scaled to the batch size; "
    "one cycle",
    "groups": "one learning rate for all: Group Norm's, scaled to the batch size",
    "layer_norms": "one learning rate for all; no weight decay, which would touch only those "
    "scales that are not vectors",
    "batch_size": "each norm's learning rate, scaled with the batch size: by its root for Muon "
    "and AdamW, in proportion for SGD",
    "bn_rates": "constant learning rates, so that a rate means the same in every epoch",
    "norms": "each norm at the best rate of the miniature rates, with seeds that had no part "
    "in choosing it",
}
LONGER, BETWEEN = "longer training", "rates between and beyond these"
NOT_RUN = {
    "rates": [BETWEEN, "a rate for each number of groups", LONGER],
    "groups": [
        "group numbers that do not divide every width",
        "a learning rate tuned for each number of groups",
    ],
    "layer_norms": ["a learning rate tuned for each", "with weight decay"],
    "batch_size": [
        "batch size 1",
        "Instance Norm and no norm",
        "a learning rate tuned at each batch size",
        "another momentum of the running averages",
    ],
    "bn_rates": ["Group, Layer and Instance Norm", "a schedule", BETWEEN],
    "norms": [f"{LONGER} (the full runs have it)"],
}
PROVENANCE = ("device", "threads", "precision", "versions", "system")


# --- what is trained on what ----------------------------------------------------------------------


class Point(NamedTuple):
    """One network to be trained: its settings, and what they do not say."""

    settings: Settings
    layer: str = ""  # of LAYERS: what replaces its norms
    three_ways: bool = False  # BN evaluated in three ways


def scaled_rate(norm: str, batch_size: int) -> float:
    """The recipe's learning rate, scaled from its batch size to another.

    AdamW and Muon divide a gradient by its own size, which for small batches is noise that falls
    with the root of the batch size: so the root (Malladi et al. 2022). SGD: in proportion (Goyal et
    al. 2017). Betas and weight_decay stay.
    """
    recipe = default_settings(norm=norm)
    power = 1 if recipe.optimizer == "sgd" else 0.5
    return recipe.lr * (batch_size / recipe.batch_size) ** power


def changes(name: str, rates: Record | None) -> list[dict[str, Any]]:
    """The settings that differ from point to point of a miniature."""
    rate = scaled_rate("gn", BATCH_SIZE)
    if name == "rates":
        return grid(lr=[rate * factor for factor in FACTORS], norm=NORMS)
    if name == "groups":
        inner = grid(norm=["gn"], num_groups=GROUPS, lr=[rate])
        return grid(norm=["ln"], lr=[rate]) + inner + grid(norm=["in"], lr=[rate])
    if name == "layer_norms":
        return grid(norm=["ln"], lr=[rate], weight_decay=[0.0], layer=LAYERS)
    if name == "batch_size":
        return grid(batch_size=BATCH_SIZES, norm=["bn", "gn", "ln"])
    if name == "bn_rates":
        constant = [rate * factor for factor in BN_FACTORS]
        return grid(lr=constant, norm=["bn", "none"], schedule=["step"])
    return [{"norm": norm, "lr": best_rate(rates, norm)} for norm in NORMS] if rates else []


def grid(**lists: Iterable[Any]) -> list[dict[str, Any]]:
    """Every combination of the values; the last setting changes fastest."""
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def best_rate(record: Record, norm: str) -> float:
    """The learning rate with the highest mean validation accuracy in the miniature ``rates``."""
    rates: list[float] = values(record, "lr", norm=norm)
    return max(rates, key=lambda lr: statistics.mean(accuracies(record, norm=norm, lr=lr)))


def plan(name: str, tiny: bool = False, rates: Record | None = None) -> list[Point]:
    """The points of a miniature, seed by seed; those of ``norms`` need the record of ``rates``."""
    points = []
    epochs = 1 if tiny else EPOCHS[name]
    for seed in OTHER_SEEDS if name == "norms" else SEEDS:
        for change in changes(name, rates):
            layer = change.pop("layer", "")
            chosen = {"batch_size": BATCH_SIZE, "epochs": epochs, "seed": seed} | change
            rate = chosen.get("lr") or scaled_rate(chosen["norm"], chosen["batch_size"])
            chosen["lr"] = float(f"{rate:.2g}")
            three_ways = name == "batch_size" and chosen["norm"] == "bn"
            points.append(Point(default_settings(**chosen), layer, three_ways))
    return points


def subset(data: Data, images: int, held_out: int) -> Data:
    """Training images, as many of each class, and others in place of the test images."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    classes = len(data.classes)
    count, apart = images // classes, held_out // classes  # of each class
    kept, held = [], []
    for k, name in enumerate(data.classes):
        own = order[data.train_labels[order] == k]
        if len(own) < count + apart:
            told = f"{images} + {held_out} images are asked for"
            raise CourseError(f"{told}, but class {name!r} has {len(own)}; ask for fewer")
        held.append(own[:apart])
        kept.append(own[apart : apart + count])
    train, test = mixed(torch.cat(kept)), mixed(torch.cat(held))
    return data._replace(
        copy=f"{data.copy}, {images} + {held_out} of its training images",
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        test_images=data.train_images[test],
        test_labels=data.train_labels[test],
    )


def mixed(indices: Tensor) -> Tensor:
    """The same (N,) in random order: batch statistics need classes mixed."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


# --- what is done to a network --------------------------------------------------------------------


class PixelLayerNorm(nn.LayerNorm):
    """Layer Norm of each pixel over its C channels, as in ConvNeXt (Liu et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_layer_norm(model: nn.Module, layer: str) -> nn.Module:
    """Replace every norm of a NormNet: ``chw`` by LayerNorm([C, H, W]), ``pixel`` by LayerNorm(C).

    Works in place, for images (N, 3, 32, 32).
    """
    device = next(model.parameters()).device
    blocks = [name.removesuffix(".norm") for name, _ in model.named_modules() if ".norm" in name]
    seen = activations(model, torch.zeros(2, 3, 32, 32, device=device), blocks)

    def make(name: str, norm: nn.Module) -> nn.Module:
        shape = seen[name.removesuffix(".norm")][0].shape[1:]  # (C, H, W)
        own = nn.LayerNorm(shape) if layer == "chw" else PixelLayerNorm(shape[0])
        return own.to(device)

    return exchange_norms(model, make)


def precise_statistics(
    model: nn.Module, data: Data, count: int = 4_000, batch_size: int = 500
) -> nn.Module:
    """A copy whose Batch Norms have statistics of the population, not running averages.

    With the weights fixed, ``count`` training images, drawn at random but always the same, pass
    once in training mode, in large batches; each channel's mean and variance are averaged over
    these batches (Wu & Johnson 2021, section 3).
    """
    model = copy.deepcopy(model).eval()
    drawn = mixed(torch.arange(len(data.train_labels)))[:count]
    stream = batches(data.train_images[drawn], data.train_labels[drawn], data, batch_size)
    update_bn((x for x, _ in stream), model)
    return model


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy whose Batch Norms use the statistics of the batch in evaluation, too."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return model


# --- one network ----------------------------------------------------------------------------------


def stem(point: Point, data: Data) -> str:
    """The name of a point's file: no two points have the same, nor two data sets."""
    parts = [run_name(point.settings, data)]
    if point.layer:
        parts.append(point.layer)
    if point.three_ways:
        parts.append("3ways")
    return "-".join(parts)


def run(point: Point, data: Data, work: Path) -> Record:
    """Train and evaluate one point on a subset; what is finished is only read."""
    path = work / f"{stem(point, data)}.point"
    if not path.exists():
        write_record(path, train(point, data))
    return json.loads(path.read_text())


def train(point: Point, data: Data) -> Record:
    """The figures of one network; from the epoch on whose loss is not finite, those of a guess."""
    begun, diverged = start(point, data), False
    data, epochs = data.to(fit.pick_device()), point.settings.epochs
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        try:
            while len(begun.history) < epochs:
                begun.history.append(fit.train_and_evaluate(begun, data, progress=False))
        except DivergedError:
            diverged = True
        guess = dict.fromkeys(("test_accuracy", "train_accuracy"), 100 / len(data.classes))
        history = begun.history + [guess] * (epochs - len(begun.history))
        result: Record = {
            "settings": asdict(point.settings) | {"layer": point.layer},
            "parameters": count_parameters(begun.model),
            "val_accuracy": [round(epoch["test_accuracy"], 4) for epoch in history],  # held out
            "train_accuracy": [round(epoch["train_accuracy"], 4) for epoch in history],
        }
        if point.three_ways:
            last = result["val_accuracy"][-1]
            result |= {"precise_accuracy": last, "batch_accuracy": last}
            if not diverged:
                result |= two_other_ways(begun.model, data, point.settings.batch_size)
    result |= {key: begun.origin[key] for key in PROVENANCE}
    seconds = sum(epoch["seconds"] for epoch in begun.history)
    return result | {"seconds": round(seconds, 1), "diverged": diverged}


def start(point: Point, data: Data) -> fit.Run:
    """Begin the training of a point's network."""
    begun = fit.start(point.settings, data, fit.pick_device())
    if point.layer:
        with_layer_norm(begun.model, point.layer)
        begun.optimizers = make_optimizers(begun.model, point.settings)  # they have new weights
    return begun


def two_other_ways(model: nn.Module, data: Data, batch_size: int) -> dict[str, float]:
    """Accuracy of a Batch Norm network with precise statistics, and with those of each batch."""
    precise = predict(precise_statistics(model, data), data.test_images, data)
    batch = predict(with_batch_statistics(model), data.test_images, data, batch_size)
    return {
        "precise_accuracy": round(percent_correct(precise.argmax(1), data.test_labels), 4),
        "batch_accuracy": round(percent_correct(batch.argmax(1), data.test_labels), 4),
    }


# --- the records ----------------------------------------------------------------------------------


def gather(name: str, points: list[Point], data: Data, chosen: argparse.Namespace) -> None:
    """Write NAME.json from all points that are finished; a list says what was not run."""
    settings = [asdict(point.settings) | {"layer": point.layer} for point in points]
    common = {k: v for k, v in settings[0].items() if all(s[k] == v for s in settings)}
    found, missing = [], []
    for point, own in zip(points, settings, strict=True):
        file = chosen.work / f"{stem(point, data)}.point"
        own = {key: value for key, value in own.items() if key not in common}
        if file.exists():
            found.append(json.loads(file.read_text()) | own)
        else:
            missing.append(", ".join(f"{key} {value}" for key, value in own.items()))
    if not found:
        return
    option = " --preliminary" if chosen.preliminary else ""
    record = {
        "name": name,
        "preliminary": chosen.preliminary,
        "what": WHAT[name],
        "command": f"python experiments/miniatures.py {name}{option}",
        "data": data.name,
        "copy": data.copy,
        "images": [len(data.train_labels), len(data.test_labels)],
        "samples_seen": len(data.train_labels) * common["epochs"],
        "seeds": sorted({point["settings"]["seed"] for point in found}),
        **{key: different(point[key] for point in found) for key in PROVENANCE},
        "seconds": round(sum(point["seconds"] for point in found)),
        "not_run": [*missing, *NOT_RUN[name]],
        "complete": not missing,
        "settings": common,
        "points": found,
    }
    for point in found:
        for key in ("settings", *PROVENANCE):
            del point[key]
    write_record(chosen.out / f"{name}.json", record)


def different(values: Iterable[Any]) -> list[Any]:
    """Each value once."""
    texts = {json.dumps(value, sort_keys=True) for value in values}
    return [json.loads(text) for text in sorted(texts)]


def finished_rates(data: Data, chosen: argparse.Namespace) -> Record | None:
    """The record of ``rates`` on these images, if all of it is there."""
    try:
        rates = experiment("rates", chosen.out)
    except CourseError:
        return None
    fits = rates["preliminary"] == chosen.preliminary and rates["copy"] == data.copy
    return rates if rates["complete"] and fits else None


# --- the command ----------------------------------------------------------------------------------


def known(name: str) -> str:
    """The name of a miniature, as the command takes it."""
    if name not in EPOCHS:
        raise argparse.ArgumentTypeError(f"no miniature {name}; there are {', '.join(EPOCHS)}")
    return name


def share(text: str) -> tuple[int, int]:
    """K and N of K/N, as the command takes it."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        told = f"{text!r}; expected K/N, K from 0 to N - 1, e.g. 0/2 and 1/2"
        raise argparse.ArgumentTypeError(told)
    return int(found[1]), int(found[2])


def main(words: list[str] | None = None) -> None:
    """The command."""
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    add, told = parser.add_argument, f"any of {', '.join(EPOCHS)} (default: all)"
    add("name", nargs="*", type=known, default=list(EPOCHS), help=told)
    add("--data", help="source of the images (default: $NORMCOURSE_DATA, else auto)")
    told = "train only every Nth network, from the Kth (from 0)"
    add("--part", default="0/1", type=share, metavar="K/N", help=told)
    add("--preliminary", action="store_true", help=f"{TINY} images, one epoch: the format only")
    add("--work", type=Path, default=Path("runs/miniatures"), help="of the finished networks")
    add("--out", type=Path, default=EXPERIMENTS, help="records (default: inside the package)")
    chosen = parser.parse_args(words)
    sizes = (TINY, TINY) if chosen.preliminary else (IMAGES, VALIDATION)
    try:
        data = subset(load_data(chosen.data), *sizes)
        run_all([name for name in chosen.name if name != "norms"], data, chosen)
        if "norms" in chosen.name:
            run_all(["norms"], data, chosen)
    except CourseError as error:
        parser.error(str(error))


def run_all(names: list[str], data: Data, chosen: argparse.Namespace) -> None:
    """Train this part's points of these miniatures, seed 0 of each first, and gather after each."""
    rates = finished_rates(data, chosen) if "norms" in names else None
    plans = {}
    todo: dict[str, tuple[str, Point]] = {}  # a network that two miniatures share is trained once
    for name in names:
        points = plan(name, chosen.preliminary, rates)
        if not points:
            print(f"{name} waits for all of `rates`: run this again then")
            continue
        plans[name] = points
        for point in points:
            todo.setdefault(stem(point, data), (name, point))
    part, parts = chosen.part
    in_order = sorted(todo.values(), key=lambda item: item[1].settings.seed)
    for name, point in tqdm(in_order[part::parts], unit="network"):
        run(point, data, chosen.work)
        gather(name, plans[name], data, chosen)
    for name, points in plans.items():  # what is shared, and what another part has finished
        gather(name, points, data, chosen)


if __name__ == "__main__":
    main()
