"""The plain loop, as a learner would write it.

PIL images, torchvision's transforms, a DataLoader, NCHW, fp32, SGD.
"""

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from normcourse.data import Data
from normcourse.train import build, default_settings

CROP_AND_FLIP = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
# The public solution with the highest accuracy (woncoh1/era1a8: 81.67 % with Batch Norm, the best
# of its 20 epochs) has this augmentation, SGD with momentum 0.9 and no weight decay, and one cycle
# up to 0.5, batch 128.
RANDOM_AUGMENT = [transforms.RandAugment()]
PEAK_LR, MOMENTUM = 0.5, 0.9


class Images(Dataset):
    """As torchvision.datasets.CIFAR10: an array, a PIL image and its transforms for each item."""

    def __init__(self, images: Tensor, labels: Tensor, data: Data, augmentation: list[Any]):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
        self.labels = labels.tolist()
        normalize = transforms.Normalize(data.mean, data.std)
        self.transform = transforms.Compose([*augmentation, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train_loader(
    data: Data, batch_size: int, workers: int = 0, augmentation: list[Any] = CROP_AND_FLIP
) -> DataLoader:
    """Batches of all training images in random order; workers are started once and kept."""
    images = Images(data.train_images, data.train_labels, data, augmentation)
    keep = workers > 0
    return DataLoader(images, batch_size, True, num_workers=workers, persistent_workers=keep)


def test_loader(data: Data, batch_size: int) -> DataLoader:
    """Batches of all test images."""
    return DataLoader(Images(data.test_images, data.test_labels, data, []), batch_size)


def network(norm: str, data: Data) -> nn.Module:
    """The course's network in PyTorch's defaults: NCHW, fp32."""
    torch.manual_seed(0)
    return build(default_settings(norm=norm), len(data.classes))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=MOMENTUM)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any], scheduler: Any = None
) -> tuple[float, float]:
    """One pass over the loader; returns mean loss and accuracy (%) on the way."""
    model.train()
    total_loss, correct, seen = 0.0, 0, 0
    for x, y in loader:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        total_loss += loss.item() * len(y)
        correct += (logits.argmax(1) == y).sum().item()
        seen += len(y)
    return total_loss / seen, 100 * correct / seen


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any]) -> float:
    """Accuracy (%) in eval mode."""
    model.eval()
    correct = seen = 0
    for x, y in loader:
        correct += (model(x).argmax(1) == y).sum().item()
        seen += len(y)
    return 100 * correct / seen
