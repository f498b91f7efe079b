"""The plain loop, as a learner would write it: PIL images, torchvision's transforms, a DataLoader, NCHW fp32, SGD."""

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from normcourse.data import Data
from normcourse.model import build

CROP_AND_FLIP = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
# The public solution with the highest accuracy (woncoh1/era1a8: 81.67 % with Batch Norm, the best of its 20 epochs) has
# this augmentation, SGD with momentum 0.9 and no weight decay, and one cycle up to 0.5, batch 128.
RANDOM_AUGMENT = [transforms.RandAugment()]
PEAK_LR, MOMENTUM = 0.5, 0.9


class Images(Dataset):
    """As torchvision.datasets.CIFAR10: an array in memory, a PIL image and its transforms for each item."""

    def __init__(self, images: Tensor, labels: Tensor, transform: transforms.Compose):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train_loader(data: Data, batch_size: int, workers: int = 0, augmentation: list = CROP_AND_FLIP) -> DataLoader:
    """Batches of all training images in random order; workers are started once and kept."""
    transform = transforms.Compose([*augmentation, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])
    images = Images(data.train_images, data.train_labels, transform)
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def test_loader(data: Data, batch_size: int) -> DataLoader:
    """Batches of all test images."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])
    return DataLoader(Images(data.test_images, data.test_labels, transform), batch_size)


def network(norm: str, data: Data, device: torch.device) -> nn.Module:
    """The course's network in PyTorch's defaults: NCHW, fp32."""
    torch.manual_seed(0)
    return build("normnet", norm, len(data.classes)).to(device)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=MOMENTUM)


def one_cycle(optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LR, epochs=epochs, steps_per_epoch=steps)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    device: torch.device,
    scheduler: torch.optim.lr_scheduler.OneCycleLR | None = None,
) -> tuple[float, float]:
    """One pass over the loader; returns mean loss and accuracy (%) on the way."""
    model.train()
    total_loss, correct, seen = 0.0, 0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
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
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Accuracy (%) in eval mode."""
    model.eval()
    correct = seen = 0
    for x, y in loader:
        correct += (model(x.to(device)).argmax(1) == y.to(device)).sum().item()
        seen += len(y)
    return 100 * correct / seen
