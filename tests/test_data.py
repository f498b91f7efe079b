import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import Evil, checksums, make_folder, pickle_of_an_address, write_batches
from PIL import Image

from normcourse import CourseError, batches, load_data
from normcourse import data as data_module
from normcourse.data import make_data, split_validation, unnormalize
from normcourse.engine import sources

# --- what load_data returns


def test_digits(digits):
    assert (digits.name, len(digits.classes)) == ("digits", 10)
    assert digits.train_images.shape[1:] == (3, 32, 32) and digits.train_images.dtype == torch.uint8
    assert len(digits.train_images) + len(digits.test_images) == 1797
    again = load_data("digits")
    assert again.copy == digits.copy and torch.equal(again.test_labels, digits.test_labels)


def test_mean_and_std_are_those_of_the_training_images(digits, folder):
    for data in (digits, load_data(folder)):
        pixels = data.train_images.double() / 255
        torch.testing.assert_close(
            torch.tensor(data.mean).double(), pixels.mean((0, 2, 3)), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            torch.tensor(data.std).double(), pixels.std((0, 2, 3), correction=0), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("kind", "size"), [("png", (32, 32)), ("jpg", (32, 32)), ("JPEG", (70, 41)), ("PNG", (8, 100))]
)
def test_image_folder_of_any_size(tmp_path, kind, size):
    data = load_data(make_folder(tmp_path / "mine", size=size, kind=kind))
    assert data.name == "mine" and data.classes == ("ant", "bee", "cow")
    assert (
        data.train_images.shape == (24, 3, 32, 32)
        and data.train_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    )
    strongest = (
        data.train_images.float().mean((2, 3)).argmax(1)
    )  # the generator makes class k strongest in channel k
    assert torch.equal(strongest, data.train_labels)


def test_pixels_come_through_unchanged(folder):
    data = load_data(folder)
    for n, label in ((0, "ant"), (9, "bee")):
        stored = np.asarray(Image.open(folder / "train" / label / f"{n % 8}.png"))
        assert np.array_equal(data.train_images[n].permute(1, 2, 0).numpy(), stored)


@pytest.mark.parametrize("kind", ["webp", "bmp", "gif", "tif", "TIFF"])
def test_every_kind_of_image_is_read(folder, kind):
    for n in range(8):
        png = folder / "train" / "ant" / f"{n}.png"
        with Image.open(png) as image:
            image.save(png.with_suffix(f".{kind}"), "tiff" if kind == "tif" else kind.lower())
        png.unlink()
    assert load_data(folder).train_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_images_in_folders_of_folders_are_read_in_the_order_of_their_paths(folder):
    deep = folder / "train" / "ant" / "deep" / "deeper"
    deep.mkdir(parents=True)
    Image.new("RGB", (32, 32), "white").save(deep / "1.png")
    data = load_data(folder)
    assert data.train_labels.tolist() == [0] * 9 + [1] * 8 + [2] * 8
    assert (data.train_images[8] == 255).all()  # behind 0.png to 7.png


def test_what_is_left_out_is_counted(folder, capsys):
    ant = folder / "train" / "ant"
    load_data(folder)
    assert capsys.readouterr().err == ""  # nothing is left out
    (ant / ".ipynb_checkpoints").mkdir()
    for name in ("1.heic", "2.heic", "notes", ".hidden", ".ipynb_checkpoints/3.png", "../x.png"):
        shutil.copy(ant / "0.png", ant / name)
    (ant / "link").symlink_to(folder / "train" / "bee")
    for _ in range(2):  # the second time, the images are not decoded again
        assert len(load_data(folder).train_labels) == 24
        (line,) = capsys.readouterr().err.splitlines()
        assert f"5 files in {folder / 'train'} are left out; read are .png, " in line
        assert line.endswith(
            "read are .png, .jpg, .jpeg, .webp, .bmp, .gif, .tif, .tiff in a class's folder"
        )


def test_fractions_are_refused(folder):
    Image.fromarray(np.zeros((32, 32), np.float32)).save(folder / "train" / "ant" / "0.tif")
    with pytest.raises(CourseError, match=r"cannot read .*0\.tif \(its pixels are fractions"):
        load_data(folder)


def test_no_image_runs_a_program(folder, monkeypatch):
    """Pillow hands EPS to ghostscript, whatever the file is called."""
    Image.new("RGB", (32, 32)).save(folder / "train" / "ant" / "0.eps")
    (folder / "train" / "ant" / "0.eps").rename(folder / "train" / "ant" / "0.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(CourseError, match=r"cannot read .*0\.png \(cannot identify image file"):
        load_data(folder)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_shown_in_a_terminal_and_not_in_a_file(folder, monkeypatch, capsys, terminal):
    ant = folder / "train" / "ant"
    for n in range(500):
        shutil.copy(ant / "0.png", ant / f"more{n}.png")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    load_data(folder)
    assert ("Reading images" in capsys.readouterr().err) == terminal


def test_grey_transparent_and_palette_images_are_read_as_rgb(folder):
    for n, mode in enumerate(("L", "RGBA", "P", "1", "LA", "CMYK")):
        name = folder / "train" / "ant" / (f"{n}.jpg" if mode == "CMYK" else f"{n}.png")
        Image.new("RGB", (32, 32), "white").convert(mode).save(name)
    assert load_data(folder).train_images[:6].shape == (6, 3, 32, 32)


def test_decoded_once_and_again_when_a_file_changes(folder, monkeypatch):
    first, calls = load_data(folder), []
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(sources, "_read_image", lambda file: calls.append(file) or black)
    assert load_data(folder).copy == first.copy and not calls
    Image.new("RGB", (32, 32)).save(folder / "test" / "cow" / "new.png")
    assert len(load_data(folder).test_labels) == 25 and len(calls) == 49


def test_what_is_kept_of_a_folder_does_not_pile_up(folder, monkeypatch, cache):
    load_data(folder)
    kept = set(cache.iterdir())
    Image.new("RGB", (32, 32)).save(folder / "test" / "cow" / "new.png")
    again = load_data(folder)
    monkeypatch.setattr(data_module, "channel_statistics", None)  # kept, too: they take long
    assert load_data(folder)[:5] == again[:5] and set(cache.iterdir()) == kept


def test_a_cache_cut_short_is_made_again(folder, cache):
    first = load_data(folder)
    for file in cache.glob("*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    assert load_data(folder).copy == first.copy


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A folder x with batches of random images, which have the right checksums; what they hold."""
    content = write_batches(tmp_path / "x" / sources.BATCHES)
    monkeypatch.setattr(sources, "OFFICIAL_MD5", checksums(tmp_path / "x" / sources.BATCHES))
    return tmp_path / "x", *content


def test_official_batches(official):
    root, images, labels = official
    for path in (root, root / sources.BATCHES):
        data = load_data(path)
        assert torch.equal(data.train_images, images[:100])
        assert torch.equal(data.train_labels, labels[:100])
        assert torch.equal(data.test_images, images[100:])
        assert torch.equal(data.test_labels, labels[100:])
        assert data.classes == tuple(f"class{i}" for i in range(10))
        assert data.name == "x"  # not CIFAR-10: other classes and counts


def test_official_batches_as_torchvision_reads_them(official):
    from torchvision.datasets import CIFAR10

    class Own(CIFAR10):
        """The same reader, for files with other checksums."""

        train_list = [[name, sources.OFFICIAL_MD5[name]] for name, _ in CIFAR10.train_list]
        test_list = [[name, sources.OFFICIAL_MD5[name]] for name, _ in CIFAR10.test_list]
        meta = CIFAR10.meta | {"md5": sources.OFFICIAL_MD5["batches.meta"]}

    data = load_data(official[0])
    train, test = Own(official[0], train=True), Own(official[0], train=False)
    assert tuple(train.classes) == data.classes
    assert np.array_equal(train.data, data.train_images.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(test.data, data.test_images.permute(0, 2, 3, 1).numpy())
    assert train.targets == data.train_labels.tolist() and test.targets == data.test_labels.tolist()


def test_the_published_checksums_are_those_of_torchvision():
    from torchvision.datasets import CIFAR10

    theirs = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    assert sources.OFFICIAL_MD5 == theirs | {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    assert (sources.BATCHES, sources.ARCHIVE) == (CIFAR10.base_folder, CIFAR10.filename)
    assert CIFAR10.url in sources.MIRRORS


def test_batches_of_cifar10_are_recognised_by_classes_and_counts(official):
    loaded = load_data(official[0])
    train, test = (torch.arange(10).repeat_interleave(count) for count in (5000, 1000))
    parts = [loaded.train_images, train, loaded.test_images, test]
    for path in (official[0], official[0] / sources.BATCHES, official[0] / sources.ARCHIVE):
        assert sources._name(path, sources.CLASSES, parts) == "CIFAR-10"
        assert sources._name(path, sources.CLASSES, [*parts[:3], test[:-1]]) == "x"
        assert sources._name(path, sources.CLASSES[::-1], parts) == "x"


# --- official files only


PUBLISHED = sources.OFFICIAL_MD5
ATTACKS = [
    b"cposix\nsystem\n(S'touch written'\ntR.",
    b'cbuiltins\neval\n(S\'open("written", "w")\'\ntR.',
    b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.",
    b"cnumpy.f2py.__main__\ndtype\n.",
    b"cnumpy.distutils.core\nndarray\n.",
    b"cnumpy.testing._private.utils\nrunstring\n.",
    pickle.dumps({b"data": Evil("written")}),
    pickle.dumps({b"data": Evil("written"), b"labels": [0]}, protocol=2),
]


@pytest.mark.filterwarnings("ignore")  # numpy would only warn of an object made from an address
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("published", [True, False], ids=["published table", "own table"])
def test_nothing_runs_that_is_not_official(official, monkeypatch, tmp_path, name, published):
    """Not even a module is imported: a file without the right checksum is not unpickled at all."""
    monkeypatch.chdir(tmp_path)
    if published:
        monkeypatch.setattr(sources, "OFFICIAL_MD5", PUBLISHED)
    before, changed = set(sys.modules), {}
    for attack in [pickle_of_an_address(changed), *ATTACKS]:
        (official[0] / sources.BATCHES / name).write_bytes(attack)
        named = "data_batch_1" if published else name  # the first wrong one: there, all seven are
        with pytest.raises(CourseError, match=f"{named} is not the official file; get") as error:
            load_data(official[0])
        assert len(str(error.value).splitlines()) == 1
        assert not changed and not (tmp_path / "written").exists()
    assert not {"numpy.f2py", "numpy.distutils"} & (set(sys.modules) - before)


@pytest.mark.filterwarnings("ignore")  # a file that is not closed
def test_the_attacks_are_real(monkeypatch, tmp_path):
    """Where nothing is checked, they do create the file."""
    monkeypatch.chdir(tmp_path)
    for attack in (ATTACKS[1], *ATTACKS[-2:]):
        pickle.loads(attack)
        (tmp_path / "written").unlink()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("place", [0, 0.5, -1], ids=["first", "middle", "last"])
def test_one_flipped_bit_is_refused(official, name, place):
    file = official[0] / sources.BATCHES / name
    content = bytearray(file.read_bytes())
    content[int(place * len(content)) if place > 0 else place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CourseError, match=f"{name} is not the official file"):
        load_data(official[0])


def test_official_files_under_each_others_names_are_refused(official):
    folder = official[0] / sources.BATCHES
    for old, new in (("data_batch_1", "x"), ("test_batch", "data_batch_1"), ("x", "test_batch")):
        (folder / old).rename(folder / new)
    with pytest.raises(CourseError, match="data_batch_1 is not the official file"):
        load_data(official[0])


def test_other_files_beside_the_official_ones_are_not_read(official, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (official[0] / sources.BATCHES / "data_batch_6").write_bytes(ATTACKS[-1])
    assert len(load_data(official[0]).train_labels) == 100 and not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_batch_2", None),
        ("batches.meta", None),
        ("test_batch", b"\x80\x02}q\x00"),
        ("data_batch_1", b""),
        ("data_batch_1", pickle.dumps([1, 2])),
        ("data_batch_3", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 1]})),
        ("batches.meta", pickle.dumps({b"label_names": None})),
    ],
)
def test_bad_batches(official, name, content):
    file = official[0] / sources.BATCHES / name
    file.unlink() if content is None else file.write_bytes(content)
    reason = "missing" if content is None else "not the official file"
    with pytest.raises(CourseError, match=f"{name} is {reason}; get cifar-10-python"):
        load_data(official[0])


def test_an_official_file_that_cannot_be_read_is_named(official):
    file = official[0] / sources.BATCHES / "data_batch_4"
    file.unlink()
    file.mkdir()
    with pytest.raises(CourseError, match="cannot read .*data_batch_4"):
        load_data(official[0])


# --- folders, names, images


def test_environment_names_the_source(monkeypatch, folder):
    monkeypatch.setenv("NORMCOURSE_DATA", str(folder))
    assert load_data().name == "insects"
    assert load_data("digits").name == "digits"


@pytest.mark.parametrize("name", ["CIFAR-10", "digits", "cifar-10"])
def test_no_folder_passes_for_another_data_set(tmp_path, name):
    assert load_data(make_folder(tmp_path / name)).name == f"{name} (folder)"


def test_what_lies_in_data_must_be_cifar10(tmp_path, monkeypatch):
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"something else")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError, match="data_batch_1 is not the official file"):
        load_data("cifar10")


def test_16_bit_images_keep_their_greys(folder):
    ramp = (np.arange(1024).reshape(32, 32) * 64).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "train" / "ant" / "0.png")
    pixels = load_data(folder).train_images[0, 0].numpy()
    assert np.abs(pixels - ramp / 257).max() <= 1


def test_images_are_turned_upright(folder):
    picture = Image.new("RGB", (32, 32))
    picture.paste("red", (0, 0, 32, 16))
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(folder / "train" / "ant" / "0.jpg", exif=exif)
    (folder / "train" / "ant" / "0.png").unlink()
    red = load_data(folder).train_images[0, 0].float()
    assert red[:16].mean() < 20 and red[16:].mean() > 235


# --- bad input


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: remove(f / "test"), ["no folder 'test'", "{train,test}/<class>"]),
        (
            lambda f: (
                [remove(f / p / "ant") for p in ("train", "test")]
                and [remove(f / p / "bee") for p in ("train", "test")]
            ),
            ["one class, 'cow'"],
        ),
        (lambda f: remove(f / "test" / "bee"), ["same class folders", "only in train: ['bee']"]),
        (
            lambda f: [remove(i) for i in (f / "train" / "cow").iterdir()],
            ["train/cow", "no images"],
        ),
        (
            lambda f: [remove(c) for p in ("train", "test") for c in (f / p).iterdir()],
            ["no images"],
        ),
        (
            lambda f: (f / "train" / "bee" / "3.png").write_bytes(b"not an image"),
            ["3.png", "replace or remove"],
        ),
        (
            lambda f: (f / "train" / "bee" / "3.png").write_bytes(
                (f / "train" / "bee" / "3.png").read_bytes()[:800]
            ),
            ["3.png"],
        ),
        (lambda f: (f / "train" / "bee" / "3.png").write_bytes(b""), ["3.png"]),
    ],
)
def test_bad_folders_say_what_is_wrong(folder, spoil, words, cache):
    spoil(folder)
    with pytest.raises(CourseError) as error:
        load_data(folder)
    assert all(word in str(error.value).replace("\\", "/") for word in words), str(error.value)
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize(
    "source", ["cifar100", "/no/such/folder", "mnist", "~nosuchuser/x", __file__]
)
def test_unknown_source(source):
    with pytest.raises(CourseError, match="cifar10, digits, auto, or the path"):
        load_data(source)


def test_a_source_that_is_not_there_is_named_with_where_it_came_from(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMCOURSE_DATA", "my/images")
    told = r"no data source 'my/images' \(\$NORMCOURSE_DATA\): '.*/my/images' is not there; allowed"
    with pytest.raises(CourseError, match=told):
        load_data()
    with pytest.raises(CourseError, match="no data source 'yours': '.*/yours' is not there; allo"):
        load_data("yours")


@pytest.mark.parametrize("name", ["train/ant", "train/ant/deep"])
def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch, name):
    (folder / "train" / "ant" / "deep").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(folder / name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CourseError, match=f"cannot read .*{name}: Permission denied"):
        load_data(folder)


# --- batches


def test_every_image_once_in_an_epoch_and_the_last_batch_is_short(small):
    seen = [
        (x, y)
        for x, y in batches(
            small.train_images, torch.arange(80), small, 32, torch.Generator().manual_seed(1)
        )
    ]
    assert [len(y) for _, y in seen] == [32, 32, 16]
    order = torch.cat([y for _, y in seen])
    assert torch.equal(order.sort().values, torch.arange(80)) and not torch.equal(
        order, torch.arange(80)
    )
    images = unnormalize(torch.cat([x for x, _ in seen]), small)
    assert torch.equal(
        images, small.train_images[order]
    )  # no augmentation asked for: the very pixels


def test_batches_are_normalized_like_torchvision(small):
    from torchvision.transforms import v2

    expected = v2.Normalize(small.mean, small.std)(small.test_images.float() / 255)
    ours = torch.cat([x for x, _ in batches(small.test_images, small.test_labels, small, 16)])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_each_image_gets_its_own_shift_and_flip():
    """Each equals one of the 2 x 25 crops of numpy's mirrored padding, and all 50 occur."""
    image = torch.randint(
        0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = make_data("x", "x", ("a", "b"), [image, torch.zeros(1, dtype=torch.long)] * 2)
    padded = np.pad(image[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    crops = {
        padded[:, i : i + 32, j : j + 32][..., ::step].tobytes()
        for i in range(5)
        for j in range(5)
        for step in (1, -1)
    }
    many = image.expand(1000, -1, -1, -1)
    x, _ = next(
        batches(
            many,
            torch.zeros(1000),
            data,
            1000,
            torch.Generator().manual_seed(0),
            shift=2,
            flip=True,
        )
    )
    found = [crop.numpy().tobytes() for crop in unnormalize(x, data)]
    assert len(crops) == 50 and set(found) == crops
    assert max(found.count(crop) for crop in crops) < 50  # even: 20 of each expected


def test_same_generator_same_batches(small):
    def epoch(seed):
        stream = batches(
            small.train_images,
            small.train_labels,
            small,
            32,
            torch.Generator().manual_seed(seed),
            2,
            True,
        )
        return torch.cat([x for x, _ in stream])

    assert torch.equal(epoch(3), epoch(3)) and not torch.equal(epoch(3), epoch(4))


def test_validation_split_is_a_tenth_of_the_training_set_and_always_the_same(digits):
    one, two = split_validation(digits), split_validation(digits)
    assert len(one.test_labels) == len(digits.train_labels) // 10
    assert len(one.train_labels) + len(one.test_labels) == len(digits.train_labels)
    assert torch.equal(one.test_images, two.test_images) and one.mean == digits.mean


def test_cifar10_copy_has_the_known_statistics(cifar10):
    assert cifar10.train_images.shape == (50000, 3, 32, 32) and cifar10.classes == sources.CLASSES
    torch.testing.assert_close(
        torch.tensor(cifar10.mean), torch.tensor((0.4914, 0.4822, 0.4465)), atol=2e-3, rtol=0
    )
    assert len(split_validation(cifar10).test_labels) == 5000
    assert load_data().copy == cifar10.copy
