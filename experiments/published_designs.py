"""The published designs, as published and with the course's recipe.

Question: do the designs reach here what their authors report (ERA V1, session 8, 2023), and what
is their recipe worth?
Varies: the recipe. As published: SGD with momentum 0.9, batches of 64, a tenth of the rate every 8
epochs, L1 of 5e-4 divided by the batch size, decay on all parameters, no augmentation, images
normalized with the constants of their code, dropout of 0.001 in "GN". Or the course's.
Held: the network, 20 epochs of all 50,000 training images, fp32.
Judged on the 10,000 test images after the last epoch; nothing is chosen by them.
Control: their own code, run on the same JPEG copy, ends at (train / test) BN 71.9 / 71.0 and 71.0 /
69.8, LN 78.4 / 74.4: ours must end within a point of it.
Seeds 0, 1, 2; LN and GN with m = 1, which were not published, by the published recipe: 0 alone.
Cost: 26 trainings of 15 to 85 minutes on one core.
They found, one unseeded run each (train / test, %): BN 74.08 / 72.39, LN 80.72 / 75.84, "GN", which
is Instance Norm, 77.86 / 71.71. On original pixels, not the JPEG copy. In the last, short batch of
an epoch their L1 is four times as strong, here it is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common import Training, final_accuracy

from normcourse.data import Data, load_data
from normcourse.model import DESIGNS
from normcourse.train import Settings, default_settings

SEEDS = (0, 1, 2)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of their code
COURSE = ("batch_size", "optimizer", "schedule", "momentum", "l1", "shift", "flip")


@dataclass(frozen=True)
class AsPublished(Training):
    """A training on images normalized as their authors did."""

    def measure(self, data: Data, path: Path) -> dict[str, Any]:
        return super().measure(data._replace(mean=MEAN, std=STD), path)


def trials() -> Iterator[Training]:
    for seed, (norm, multiplier) in product(SEEDS, DESIGNS):
        design = {"net": "reference", "norm": norm, "multiplier": multiplier, "seed": seed}
        name = f"{norm.upper()}, m = {multiplier}"
        their = default_settings(**design, l1=5e-4 / 64, dropout=0.001 if norm == "gn" else 0.0)
        if seed == 0 or multiplier == 2 or norm == "bn":
            arm = f"{name}, as published"
            yield AsPublished(arm, their, at_end=final_accuracy, bf16=False)
        arm = f"{name}, the course's recipe"
        yield Training(arm, course_recipe(design), at_end=final_accuracy, bf16=False)


def course_recipe(design: dict[str, Any]) -> Settings:
    """What NormNet with the same norm is trained with."""
    ours = default_settings(norm=design["norm"])
    same = {name: getattr(ours, name) for name in COURSE}
    return default_settings(**design, **same, lr=ours.lr, weight_decay=ours.weight_decay)


def load(source: str | None) -> Data:
    return load_data(source)
