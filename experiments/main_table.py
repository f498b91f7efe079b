"""The main table: does the norm decide the accuracy, and do running averages lag behind?

Question: with everything else equal and a full training, how far apart do the norms end (Wu & He
2018, table 1; Ioffe & Szegedy 2015)? And after which epochs does Batch Norm's test accuracy
understate the network, because its running averages lag behind the weights (Wu & Johnson 2021,
section 3)?
Varies: the norm, with the learning rate that the same search found for it (lr_search.py).
Held: the course's recipe, 20 epochs of all 50,000 training images, batches of 128, bf16; the first
weights and the order of images. "No norm" has PyTorch's initialization, as under a norm; "no norm,
He" has that of He et al. (2015), which keeps a signal's variance without a norm.
Judged on the 10,000 test images after the last epoch; nothing is chosen by them. Batch Norm also
after each epoch with precise statistics, of 10,000 training images in batches of 500.
Controls: a test evaluates the published weights again and finds the recorded accuracy. Layer and
Group Norm have no running averages: precise statistics change nothing, to the last bit (a test).
Seeds 0 to 4; Instance Norm and no norm 0 to 2. Cost: 24 trainings of about 30 minutes on one core.
The papers found: Wu & He, ResNet-50, ImageNet, error (%) with 32 images per GPU: Batch Norm 23.6,
Group Norm 24.1, Layer Norm 25.3, Instance Norm 28.4. Zhang et al. (2019, Fixup): without a norm,
but with a careful initialization, a deep residual network trains nearly as well.
"""

import copy
from collections.abc import Iterator

from common import (
    Training,
    accuracy,
    final_accuracy,
    he_initialization,
    nothing,
    with_precise_statistics,
)

from normcourse.data import Data, load_data
from normcourse.engine import fit
from normcourse.results import RESULTS, run_name
from normcourse.train import default_settings

SEEDS, FEWER_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)


def trials() -> Iterator[Training]:
    """Seed by seed, so that a part of them already says something."""
    for seed in SEEDS:
        yield arm("Batch Norm", "bn", seed, after_epoch=precise_accuracy)
        yield arm("Layer Norm", "ln", seed)
        yield arm("Group Norm", "gn", seed)
        if seed in FEWER_SEEDS:
            yield arm("Instance Norm", "in", seed)
            yield arm("no norm", "none", seed)
            he = default_settings(norm="none", seed=seed)
            yield Training("no norm, He", he, he_initialization, at_end=final_accuracy)


def arm(name: str, norm: str, seed: int, after_epoch=nothing) -> Training:
    """A run that is published: the command trains the same."""
    settings = default_settings(norm=norm, seed=seed)
    return Training(name, settings, after_epoch=after_epoch, at_end=publish)


def load(source: str | None) -> Data:
    return load_data(source)


def precise_accuracy(run: fit.Run, data: Data) -> dict[str, float]:
    """Test accuracy (%) with precise statistics; the run itself keeps its own."""
    model = with_precise_statistics(copy.deepcopy(run.model), data)
    return {"precise_accuracy": accuracy(model, data)}


def publish(run: fit.Run, data: Data) -> dict[str, float]:
    """Write the run's record and weights beside the others that the course publishes."""
    path = RESULTS / run_name(run.settings, data)
    record = fit.finish(run, data, path)
    if run.settings.seed > 0:
        path.with_suffix(".pt").unlink()  # the lessons load those of seed 0
    return final_accuracy(run, data) | {"flip_accuracy": record["flip_accuracy"]}
