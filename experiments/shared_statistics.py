"""Statistics from k images: what does Batch Norm lose as its batch shrinks, and where?

Question: Wu & He (2018, figure 5) trained with fewer images per GPU, and Batch Norm lost eleven
points at 2. Is that the noise of the statistics in training, or that evaluation uses others (Wu &
Johnson 2021, section 3)?
Varies: k, the number of images that share Batch Norm's mean and variance: 128, 32, 8, 4, 2. A batch
of 128 is normalized in 128/k parts, each by itself. The running statistics average those that the
parts would have.
Held: batches of 128, so steps, rate, first weights and the order of images; the course's recipe, 10
epochs of 44,928 images, bf16.
Beside it: Layer and Group Norm, which do not see the batch; and k = 2 with the running statistics
in place of the batch's in the last two epochs (frozen), so that training and evaluation agree.
Judged on 5,000 training images held out, after the last epoch, with running statistics; with
precise ones, of 10,000 training images in batches of 500; and with those of k test images at a
time. Also the accuracy on the 10,000 training images, in eval mode.
Controls: k = 128 trains like the course's own Batch Norm to the last bit, and for each k the layer
gives what torch's Batch Norm gives for each part (tests/test_experiments.py).
Seeds 0, 1, 2. Cost: 24 trainings of 14 to 40 minutes on one core; where
other work ran beside them, up to two hours.
The papers found: Wu & He, ResNet-50, ImageNet, error (%) at 32, 16, 8, 4, 2 images per GPU: Batch
Norm 23.6, 23.7, 24.8, 27.3, 34.7; Group Norm 24.1, 24.2, 24.0, 24.2, 24.1. There a smaller batch is
also more steps at a smaller rate; here it is the same training but for k.
"""

import copy
from collections.abc import Iterator

import torch
from common import Training, accuracy, held_out, nothing, some_images, with_precise_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from normcourse.data import Data, load_data
from normcourse.engine.fit import Run
from normcourse.norm import exchange_norms
from normcourse.train import default_settings

BATCH_SIZE, EPOCHS, SEEDS = 128, 10, (0, 1, 2)
SIZES = (128, 32, 8, 4, 2)  # k
FROZEN_EPOCHS = 2


class PartBatchNorm(nn.BatchNorm2d):
    """Batch Norm whose statistics are shared by k images of a batch, not by all."""

    def __init__(self, num_features: int, k: int):
        super().__init__(num_features)
        self.k = k
        self.frozen = False  # in training, too, the running statistics

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        if self.frozen:
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x, *running, self.weight, self.bias, False, eps=self.eps)
        if not self.training or len(x) <= self.k:
            return super().forward(x)
        parts = x.split(self.k)
        means = self.running_mean.repeat(len(parts), 1)  # (N/k, C): each part moves its own
        variances = self.running_var.repeat(len(parts), 1)
        outputs = []
        for part, mean, var in zip(parts, means, variances, strict=True):
            affine = (self.weight, self.bias)
            outputs.append(F.batch_norm(part, mean, var, *affine, True, self.momentum, self.eps))
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return torch.cat(outputs)


def trials() -> Iterator[Training]:
    """Seed by seed, so that a part of them already says something."""
    for seed in SEEDS:
        for k in SIZES:
            yield batch_norm(f"k = {k}", k, seed)
        for norm, arm in (("ln", "Layer Norm"), ("gn", "Group Norm")):
            yield Training(arm, settings(norm, seed), at_end=judge_plainly)
        yield batch_norm("k = 2, frozen at the end", 2, seed, frozen=True)


def settings(norm: str, seed: int):
    return default_settings(norm=norm, seed=seed, epochs=EPOCHS, validate=True)


def batch_norm(arm: str, k: int, seed: int, frozen: bool = False) -> Training:
    """A training with k images to a statistic."""

    def prepare(model: nn.Module) -> None:
        exchange_norms(model, lambda _, norm: PartBatchNorm(norm.num_features, k))

    before = freeze_at_the_end if frozen else nothing
    return Training(arm, settings("bn", seed), prepare, before, at_end=judge_three_ways)


def load(source: str | None) -> Data:
    return held_out(load_data(source), BATCH_SIZE)


def freeze_at_the_end(run: Run, data: Data) -> None:
    """In the last epochs, have every Batch Norm use its running statistics in training, too."""
    if len(run.history) >= EPOCHS - FROZEN_EPOCHS:
        for module in run.model.modules():
            if isinstance(module, PartBatchNorm):
                module.frozen = True


def judge_plainly(run: Run, data: Data) -> dict[str, float]:
    return {
        "running": accuracy(run.model, data),
        "train": accuracy(run.model, some_images(data, 10_000)),
    }


def judge_three_ways(run: Run, data: Data) -> dict[str, float]:
    """Accuracy (%) with running, precise and batch statistics, and on training images."""
    k = next(m.k for m in run.model.modules() if isinstance(m, PartBatchNorm))
    precise = with_precise_statistics(plain_copy(run.model), data)
    return judge_plainly(run, data) | {
        "precise": accuracy(precise, data),
        "precise train": accuracy(precise, some_images(data, 10_000)),
        "batch": accuracy(with_batch_statistics(run.model), data, k),
    }


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy that uses the statistics of the batch in evaluation, too."""
    model = plain_copy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with torch's own Batch Norm."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PartBatchNorm):
            plain = nn.BatchNorm2d(module.num_features, device=module.weight.device)
            plain.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model
