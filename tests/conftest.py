import hashlib
import importlib.util
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normcourse.data import Data, load_data
from normcourse.engine import sources

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def script(name):
    """The module experiments/NAME.py; benchmarks, too, has a run.py."""
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def experiments():
    """Lets a test import what stands in experiments/, as its command does."""
    sys.path.insert(0, str(EXPERIMENTS))
    yield EXPERIMENTS
    sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests decode into a cache of their own, shared by the session: the user's is left alone."""
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
        train_images=digits.train_images[:80],
        train_labels=digits.train_labels[:80],
        test_images=digits.test_images[:40],
        test_labels=digits.test_labels[:40],
    )


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
                pixels = torch.randint(
                    0, 60, (size[1], size[0], 3), generator=random, dtype=torch.uint8
                )
                pixels[..., k % 3] += 150
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{n}.{kind}")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "insects")


class Python2Pickler(pickle._Pickler):
    """Writes bytes as the official files have them: as the strings of Python 2."""

    dispatch = pickle._Pickler.dispatch | {
        bytes: lambda self, text: self.write(b"T" + struct.pack("<i", len(text)) + text)
    }


def write_batches(root, per_file=20, classes=10):
    """The official layout with random images; returns what should be read."""
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6 * per_file, 3072), dtype=np.uint8)
    labels = [i % classes for i in range(6 * per_file)]
    contents = {b"label_names": [f"class{i}".encode() for i in range(classes)]}
    write_python2(root / "batches.meta", contents)
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        part = slice(i * per_file, (i + 1) * per_file)
        write_python2(root / name, {b"data": images[part], b"labels": labels[part]})
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.tensor(labels)


def write_python2(path, content):
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def checksums(folder):
    """To put in place of the official files' table: then those in the folder are the right ones."""
    table = {}
    for name in sources.OFFICIAL_MD5:
        table[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return table


class Evil:
    """Its pickle, when it is read, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickle_of_an_address(target):
    """Asks for nothing but numpy's arrays, and yet puts "ran" into the dictionary ``target``.

    A scalar of the type object, made of eight bytes, is whatever lies at that address.
    """
    no_flags = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    scalar = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n(U\x02O8K\x00K\x01tR" + no_flags
    return b"\x80\x02" + scalar + b"U\x08" + struct.pack("=Q", id(target)) + b"\x86RU\x03ran\x88s."
