"""Data: whole image sets as uint8 tensors, and batches of them, augmented as tensors."""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normcourse.errors import CourseError


class Data(NamedTuple):
    """An image set, and what a record must say about it.

    Images are uint8 (N, 3, 32, 32), labels int64 (N,).
    """

    name: str  # "CIFAR-10", "digits" or the folder's name
    copy: str  # the layout it came in, and the start of the SHA-256 of its content
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of the training images scaled to [0, 1]
    std: tuple[float, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Data":
        """The same data set with its images and labels on a device."""
        return self._replace(
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def load_data(source: str | Path | None = None) -> Data:
    """Load an image set, by the name of its source or from a path.

    ``cifar10``, ``digits``, or ``auto``: CIFAR-10 if it can be had, else digits. ``None`` means
    ``$NORMCOURSE_DATA``, or ``auto`` where that is not set. Raises CourseError if the source is
    unknown, unreadable or cannot be had.
    """
    from normcourse.engine import sources  # downloads, archives, folders: one door further in

    source = str(source or os.environ.get("NORMCOURSE_DATA") or "auto")
    if source == "digits":
        return digits()
    if source == "cifar10":
        return sources.load_cifar10()
    if source != "auto":
        return sources.load_path(source)
    try:
        return sources.load_cifar10(hurry=True)
    except CourseError as error:
        line = "!" * 100
        message = "!!  NOT CIFAR-10: training on scikit-learn's small handwritten DIGITS instead."
        print(f"\n{line}\n{message}\n!!  {error}\n{line}\n", file=sys.stderr)
        return digits()


def home() -> Path:
    """The checkout that we are in, else the working folder: where data/ and runs/ are."""
    here = Path.cwd()
    holds_course = (
        path for path in (here, *here.parents) if (path / "normcourse/norm.py").exists()
    )
    return next(holds_course, here)


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged to 3 x 32 x 32.

    A fifth of them is the test set.
    """
    from sklearn.datasets import load_digits  # a second to import, and CIFAR-10 has no need of it

    loaded = load_digits()
    images = torch.from_numpy(loaded.images * (255 / 16)).round().to(torch.uint8)  # (N, 8, 8)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)  # (N, 32, 32)
    images = images[:, None].repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
    labels = torch.from_numpy(loaded.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    parts = [images[train], labels[train], images[test], labels[test]]
    return make_data("digits", "scikit-learn", tuple("0123456789"), parts)


def make_data(name: str, layout: str, classes: tuple[str, ...], parts: list[Tensor]) -> Data:
    """Add the content hash and the channel statistics.

    ``parts`` are train images, train labels, test images, test labels.
    """
    names = []
    for text in (name, *classes):  # file names may be any bytes
        names.append(text.encode(errors="replace").decode())
    mean, std = channel_statistics(parts[0])
    copy = f"{layout} {content_hash(parts)[:12]}"
    return Data(names[0], copy, tuple(names[1:]), mean, std, *parts)


def content_hash(parts: Iterable[Tensor], text: str = "") -> str:
    """The SHA-256 of a text and of the tensors' content."""
    digest = hashlib.sha256(text.encode())
    for part in parts:
        digest.update(part.contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), scaled to [0, 1]."""
    channels = [channel.flatten() for channel in images.unbind(1)]
    counts = torch.stack([values.bincount(minlength=256) for values in channels])  # (C, 256)
    weight = counts / counts.sum(1, keepdim=True)  # of each value, 0 to 255
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (weight * values).sum(1)
    std = ((weight * values**2).sum(1) - mean**2).clamp(min=0).sqrt()
    std = torch.where(std > 1e-4, std, 1.0)  # a channel that never varies stays as it is
    return tuple(mean.tolist()), tuple(std.tolist())


def split_validation(data: Data) -> Data:
    """Hold out a tenth of the training images in place of the test images, always the same.

    Of CIFAR-10's 50,000 that is 5,000.
    """
    count = len(data.train_labels)
    if count < 10:
        message = f"{count} training images are too few to hold a tenth out for validation"
        raise CourseError(f"{message}; at least 10 needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, kept = order[: count // 10], order[count // 10 :]
    return data._replace(
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


# --- batches --------------------------------------------------------------------------------------


def batches(
    images: Tensor,
    labels: Tensor,
    data: Data,
    batch_size: int,
    generator: torch.Generator | None = None,
    shift: int = 0,
    flip: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalized float batches (N, 3, 32, 32) and labels (N,), on the images' device.

    They are channels_last in memory. With a generator the order is random, and each image is moved
    and mirrored at random (``augment``). The random numbers of an epoch are drawn at once, on the
    CPU: the same on any device, and nothing waits for a GPU. The last batch may be short: no image
    is left out. Of several processes, each gets its share of every batch, which may be empty.
    """
    count, device = len(images), images.device
    pixels = images.permute(0, 2, 3, 1)  # (N, H, W, C)
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    if generator is not None:
        order = torch.randperm(count, generator=generator).to(device)
        moves = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator).to(device)
        mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device) & flip
    for start in range(0, count, batch_size):
        part = slice(start + rank, min(start + batch_size, count), processes)
        if generator is None:
            yield normalize(pixels[part], mean, std), labels[part]
        else:
            batch = augment(pixels, order[part], moves[:, part], mirrored[part])
            yield normalize(batch, mean, std), labels[order[part]]


def augment(pixels: Tensor, chosen: Tensor, moves: Tensor, mirrored: Tensor) -> Tensor:
    """The ``chosen`` (B,) of the images (N, H, W, C), moved and mirrored: (B, H, W, C).

    Each moves by ``moves`` (2, B, 1) pixels, and is mirrored where ``mirrored`` (B, 1) says so.
    What a move uncovers is filled with the image's mirror image. One gather does it all: (B, H, W,
    C).
    """
    size = pixels.shape[1]
    places = torch.arange(size, device=pixels.device).expand(1, size)
    rows, columns = reflect(places + moves, size)  # (B, H), (B, W)
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def reflect(index: Tensor, size: int) -> Tensor:
    """Mirror positions beyond the edge back into 0 .. size - 1.

    The pixel at the edge is not repeated.
    """
    return (size - 1) - ((size - 1) - index.abs()).abs()


def normalize(batch: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel, of uint8 images (B, H, W, C).

    Returns floats (B, C, H, W), channels_last.
    """
    size = batch.shape[2]
    rows = batch.contiguous().float().view(-1, size, size * 3)  # (B, H, W * C): long rows are fast
    rows.sub_(255 * mean.repeat(size)).div_(255 * std.repeat(size))
    return rows.view(batch.shape).permute(0, 3, 1, 2)


def unnormalize(batch: Tensor, data: Data) -> Tensor:
    """Turn a batch (N, 3, H, W) back into uint8 images, exactly as they went in."""
    mean = torch.tensor(data.mean, device=batch.device).view(3, 1, 1)
    std = torch.tensor(data.std, device=batch.device).view(3, 1, 1)
    return ((batch * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
