"""Does Batch Norm allow larger learning rates, and is that what it is good for?

Question: Ioffe & Szegedy (2015, section 4.2) trained Inception with Batch Norm at 5 and 30 times
the rate; without it, five times the rate did not train. Bjorck et al. (2018) hold that the larger
rate is what makes Batch Norm better.
Varies: Batch Norm or none, and the learning rate.
Held: plain SGD with momentum 0.9 and no decay (Muon sets the size of a step whatever the
gradient's, and would hide it), He's initialization in both arms, batches of 128, fp32; the first
weights and the order of images.
First, a constant rate, from 0.001 to 1 and beyond where the best is at the edge, two epochs of
24,960 images. Then five epochs of 44,928 images and one cycle: each at its own best rate, and each
at the other's. Apart: no norm with PyTorch's initialization, at the same rates.
Judged on 5,000 training images held out, after the last epoch; the five epochs with seeds that had
no part in choosing a rate. A training whose loss is no longer finite counts as 10 %, chance.
Control: at a rate of 1e-6 nothing can be learned in two epochs; both arms must stay near chance.
Seeds 0, 1, 2 (rates), 3, 4, 5 (five epochs). Cost: 69 trainings of up to half a minute and 12
of 1.5 minutes on a GPU (NVIDIA H200). In fp32, so that it cannot be the precision that keeps a
network without a norm from learning.
The papers found: Ioffe & Szegedy: 72.2 % after 31 million steps without, 2.1 million with Batch
Norm at 5 times the rate. Bjorck, ResNet-110, CIFAR-10: without Batch Norm 0.0001 was the largest
rate that trained; at that rate both generalize alike; with Batch Norm and 0.1 the accuracy is
higher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from common import Training, final_accuracy, he_initialization, held_out, power, search

from normcourse.data import Data, load_data
from normcourse.train import default_settings

SEEDS, NEW_SEEDS = (0, 1, 2), (3, 4, 5)
STEPS = range(-6, 1)  # rates 0.001 to 1
NORMS = {"Batch Norm": "bn", "no norm": "none"}
NO_RATE = -12  # a rate of 1e-6


@dataclass(frozen=True)
class Short(Training):
    """A training on about half of the images."""

    def measure(self, data: Data, path: Path) -> dict[str, Any]:
        images, labels = data.train_images[:24_960], data.train_labels[:24_960]
        return super().measure(data._replace(train_images=images, train_labels=labels), path)


def trials() -> Iterator[Training]:
    """First the rates; when the best are known, the longer trainings."""
    best = {}
    for name in NORMS:
        steps, best[name] = search("larger_rates", STEPS, partial(short_trainings, name))
        for step in (*steps, NO_RATE):
            yield from short_trainings(name, step)
    for step in STEPS:
        yield from short_trainings("no norm", step, he=False)
    if None not in best.values():
        for seed, name, whose in product(NEW_SEEDS, NORMS, NORMS):
            yield long_training(name, best[whose], seed)


def short_trainings(name: str, step: int, he: bool = True) -> list[Training]:
    """Two epochs at a constant rate, each seed."""
    arm = f"{name}, rate {power(step):g}" + ("" if he else ", default initialization")
    prepare = he_initialization if he else None
    trainings: list[Training] = []
    for seed in SEEDS:
        settings = sgd(norm=NORMS[name], lr=power(step), seed=seed, epochs=2, schedule="step")
        trainings.append(Short(arm, settings, prepare, at_end=final_accuracy, bf16=False))
    return trainings


def long_training(name: str, step: int, seed: int) -> Training:
    """Five epochs, one cycle."""
    settings = sgd(norm=NORMS[name], lr=power(step), seed=seed, epochs=5)
    arm = f"{name}, five epochs, rate {power(step):g}"
    return Training(arm, settings, he_initialization, at_end=final_accuracy, bf16=False)


def sgd(**settings):
    """The step schedule is constant before epoch 8."""
    return default_settings(optimizer="sgd", weight_decay=0.0, validate=True, **settings)


def load(source: str | None) -> Data:
    return held_out(load_data(source), 128)
