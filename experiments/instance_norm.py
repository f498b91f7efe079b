"""What Instance Norm removes: can a classifier behind it still name the class?

Question: Instance Norm takes the mean and the standard deviation of each channel out of each image,
and global average pooling reads nothing but means. What is left to read, and what brings it back:
the activation, or the skip?
Varies: what stands in the last block (C9) between its convolution and the pooling. A norm: Instance
Norm with gamma 1 and beta 0, to see what the operation leaves; Instance Norm with the network's
gamma and beta kept; the network's own Group Norm, from which the second differs in nothing but the
number of groups. Behind it: nothing; ReLU; hard swish; skip and hard swish, as in the network.
Beside it: skip and hard swish without the branch, so that the skip stands alone.
Held: the published Group Norm network, seed 0, in eval mode and fp32; a linear classifier of the
pooled features (152 -> 10), each divided by its standard deviation: scikit-learn's logistic
regression with the penalty that it has unless told (C = 1), for nothing is to be chosen. A feature
whose standard deviation is below 1e-5 varies by rounding alone, and is put to 0.
Judged on the 10,000 test images. The classifier learns from training images. So did the network,
which separates those better, in every arm: see train_accuracy.
Controls: with Instance Norm and nothing behind it each feature is its beta for any image, so the
classifier is at chance, 10 %. head_accuracy is that of the network's own head on the same features:
with Group Norm, skip and hard swish it is the published test accuracy.
Seeds 0, 1, 2: each learns from another third of the training images, the same in every arm. So an
interval says how much these images matter, not what another network would do. Cost: about ten
minutes on one core, most of it for the features, which the arms share.
The papers found: Ulyanov et al. (2016) use Instance Norm in style transfer to remove the contrast
of the photograph. Huang & Belongie (2017) exchange a style by exchanging each channel's mean and
standard deviation. Nam & Kim (2018): classes can differ in style, so a classifier may lose by it.
Wu & He (2018), ResNet-50, ImageNet, error (%): Instance Norm 28.4, Group Norm 24.1; those networks
have learned with their norm, which is in every block, and have skips.
To expect of hard swish: from -3 to 3 it is y (y + 3) / 6, whose mean over a channel of mean 0 and
variance 1 is 1/6 for any image: only values beyond tell images apart.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from normcourse.data import Data, load_data
from normcourse.norm import norm_layer
from normcourse.results import load_weights, published
from normcourse.train import default_settings, percent_correct, predict

SEEDS = (0, 1, 2)
ROUNDING = 1e-5  # the mean of fp32 numbers of size 1 is off by about 1e-7
NORMS = ("Instance Norm", "Instance Norm with gamma and beta kept", "Group Norm")
BEHIND = {  # of the norm's output y and the block's input x
    "nothing": lambda y, x: y,
    "ReLU": lambda y, x: F.relu(y),
    "hard swish": lambda y, x: F.hardswish(y),
    "skip and hard swish": lambda y, x: F.hardswish(y + x),
}
ARMS = (*product(NORMS, BEHIND), ("no branch", "skip and hard swish"))


@dataclass(frozen=True)
class Reader:
    """A linear classifier that learns to read the features of an arm."""

    norm: str
    behind: str
    seed: int  # which third of the training images it learns from

    @property
    def arm(self) -> str:
        return f"{self.norm}, {self.behind}"

    def measure(self, data: Data, path: Path) -> dict[str, Any]:
        """Some seconds; the first of a process makes the features, too."""
        start = time.perf_counter()
        arm = ARMS.index((self.norm, self.behind))
        known, new = (images[:, arm] for images in features(data))  # (N, C)
        chosen = third(len(known), self.seed)
        known, labels = known[chosen], data.train_labels[chosen]
        varies = known.std(0) > ROUNDING  # (C,)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit((known * varies).numpy(), labels.numpy())
        return {
            "settings": asdict(self) | {"C": classifier[-1].C, "scikit-learn": sklearn.__version__},
            "parameters": classifier[-1].coef_.size + classifier[-1].intercept_.size,
            "images": [len(known), len(new)],
            "history": [],
            "seconds": time.perf_counter() - start,
            "diverged": False,
            "figures": {
                "test_accuracy": accuracy(classifier, new * varies, data.test_labels),
                "train_accuracy": accuracy(classifier, known * varies, labels),
                "head_accuracy": head_accuracy(new, data),
            },
            "precision": "fp32",
        }


def trials() -> Iterator[Reader]:
    """Seed by seed, so that a part of them already says something."""
    for seed in SEEDS:
        for norm, behind in ARMS:
            yield Reader(norm, behind, seed)


def load(source: str | None) -> Data:
    return load_data(source)


class Features(nn.Module):
    """The pooled features of every arm, from a network's last block."""

    def __init__(self, model: nn.Module):
        super().__init__()
        *trunk, self.block, _, _ = model.children()  # behind the block: pooling and head
        self.trunk = nn.Sequential(*trunk)
        own = self.block.norm
        plain, kept = norm_layer("in", own.num_channels), norm_layer("in", own.num_channels)
        kept.load_state_dict(own.state_dict())
        self.norms = dict(zip(NORMS, (plain, kept, own), strict=True))
        self.norms["no branch"] = torch.zeros_like

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, arms, C)
        x = self.trunk(x)  # (N, C, H, W), into the block
        y = self.block.conv(x)  # into its norm
        pooled = []
        for norm, behind in ARMS:
            between = BEHIND[behind](self.norms[norm](y), x)
            pooled.append(between.mean((2, 3)))
        return torch.stack(pooled, 1)


@functools.cache
def network(data: Data) -> nn.Module:
    """The published Group Norm network."""
    settings = default_settings(norm="gn")
    weights, _ = published(settings)
    return load_weights(settings, data, weights)


@functools.cache
def features(data: Data) -> tuple[Tensor, Tensor]:
    """Those of all training and of all test images, each (N, arms, C)."""
    model = Features(network(data))
    return predict(model, data.train_images, data), predict(model, data.test_images, data)


def third(count: int, seed: int) -> Tensor:
    """The indices of a third of the images; those of different seeds share none."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[seed :: len(SEEDS)]


def accuracy(classifier: Pipeline, features: Tensor, labels: Tensor) -> float:
    """Accuracy (%) on features (N, C)."""
    predicted = torch.from_numpy(classifier.predict(features.numpy()))
    return percent_correct(predicted, labels)


def head_accuracy(features: Tensor, data: Data) -> float:
    """Accuracy (%) of the network's own head, as it is, on the test images' features (N, C)."""
    logits = network(data).C10(features[:, :, None, None])  # (N, 10, 1, 1)
    return percent_correct(logits.flatten(1).argmax(1), data.test_labels)
