"""Which learning rate does each norm stand, and is scale invariance why?

Question: behind a norm, weights ten times as large give the same output and a tenth of the
gradient. So a step that is too large makes the weights grow, and the next one is smaller for it:
the network lowers its own rate (van Laarhoven 2017; Arora et al. 2019). Does that decide who stands
what rate?
Varies: the norm, and the learning rate: 0.01 to 1, and beyond where the best is at the edge.
Held: plain SGD with momentum 0.9, a constant rate, no decay, He's initialization, one epoch of all
50,000 training images, batches of 128, fp32; the first weights and the order of images.
Judged on the 10,000 test images; nothing is chosen by them for another experiment. (Each norm's
best rate is: what it reaches there is a little too high, for all norms alike.) Also how much the
weights of each convolution have grown: their norm over that at the start. A training whose loss is
no longer finite counts as 10 %, chance.
Control: "along" is the cosine between the weights of a convolution and their gradient, the largest
of all layers, on 500 images: behind a norm 0, up to rounding; without one it need not be.
Seeds 0, 1, 2. Cost: 78 trainings of 20 seconds on a GPU (NVIDIA H200).
The papers found: Arora et al.: with Batch Norm gradient descent reaches a stationary point at any
fixed rate of the scale-invariant weights. Bjorck et al. (2018): without a norm, ResNet-110 trained
with rates up to 0.0001 only; with Batch Norm, with 0.1, too.
"""

from collections.abc import Iterator
from functools import partial

import torch
from common import (
    DEVICE,
    Training,
    final_accuracy,
    he_initialization,
    inputs,
    power,
    search,
    some_images,
)
from torch import Tensor, nn
from torch.nn import functional as F

from normcourse.data import Data, load_data
from normcourse.engine import fit
from normcourse.norm import NORMS
from normcourse.train import default_settings

SEEDS = (0, 1, 2)
STEPS = range(-4, 1)  # rates 0.01 to 1


def trials() -> Iterator[Training]:
    for norm in NORMS:
        steps, _ = search("rates_by_norm", STEPS, partial(trainings, norm))
        for step in steps:
            yield from trainings(norm, step)


def trainings(norm: str, step: int) -> list[Training]:
    """One epoch, each seed."""
    arm, found = f"{NORMS[norm]}, rate {power(step):g}", []
    sgd = {"optimizer": "sgd", "schedule": "step", "weight_decay": 0.0, "lr": power(step)}
    for seed in SEEDS:
        settings = default_settings(norm=norm, seed=seed, epochs=1, **sgd)
        found.append(Training(arm, settings, he_initialization, at_end=judge, bf16=False))
    return found


def load(source: str | None) -> Data:
    return load_data(source)


def judge(run: fit.Run, data: Data) -> dict[str, float]:
    """The accuracy, the growth of each convolution's weights, and the control."""
    start = fit.start(run.settings, data, DEVICE, False, he_initialization).model
    before, figures = convolutions(start), final_accuracy(run, data)
    for name, weight in convolutions(run.model).items():
        figures[f"growth {name}"] = (weight.norm() / before[name].norm()).item()
    return figures | {"along": along(start, inputs(some_images(data, 500), 500)[0], data)}


def convolutions(model: nn.Module) -> dict[str, Tensor]:
    """The weights of every convolution but the last, which no norm follows."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return {name: layer.weight for name, layer in layers.items() if name != "C10"}


def along(model: nn.Module, x: Tensor, data: Data) -> float:
    """The largest cosine between a convolution's weights and their gradient."""
    labels = some_images(data, 500).test_labels
    F.cross_entropy(model.train()(x), labels).backward()
    cosines = []
    for weight in convolutions(model).values():
        cosines.append(F.cosine_similarity(weight.flatten(), weight.grad.flatten(), 0).abs())
    return torch.stack(cosines).max().item()
