import os

import pytest
import torch
from PIL import Image

from normcourse.data import Data, load_data


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests decode into a cache of their own, shared by the session: none of the user's files is read or written."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder / "normcourse"
    os.environ.pop("XDG_CACHE_HOME")
    if before:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="session")
def small(digits: Data) -> Data:
    """80 training and 40 test images: an epoch takes a moment. The last batch of 32 is short."""
    return digits._replace(
        train_images=digits.train_images[:80], train_labels=digits.train_labels[:80],
        test_images=digits.test_images[:40], test_labels=digits.test_labels[:40],
    )  # fmt: skip


@pytest.fixture(scope="session")
def cifar10() -> Data:
    """The real images, where $NORMCOURSE_DATA names a copy of CIFAR-10."""
    source = os.environ.get("NORMCOURSE_DATA", "digits")
    if source in ("digits", "auto"):
        pytest.skip("needs real CIFAR-10 images: set NORMCOURSE_DATA to a copy of it")
    data = load_data(source)
    if data.name != "CIFAR-10":
        pytest.skip(f"needs CIFAR-10, NORMCOURSE_DATA is {data.name}")
    return data


def make_folder(root, classes=("ant", "bee", "cow"), count=8, size=(32, 32), kind="png", seed=0):
    """An image folder whose classes differ in colour: {train,test}/<class>/N.<kind>."""
    random = torch.Generator().manual_seed(seed)
    for part in ("train", "test"):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = torch.randint(0, 60, (size[1], size[0], 3), generator=random, dtype=torch.uint8)
                pixels[..., k % 3] += 150
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{n}.{kind}")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "insects")
