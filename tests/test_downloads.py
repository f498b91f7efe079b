"""The archive of CIFAR-10 from servers that behave badly; archives that mean harm."""

import hashlib
import http.server
import io
import math
import pickle
import socket
import tarfile
import threading
import time
from urllib.parse import unquote

import pytest
import torch
from conftest import Evil, checksums, pickle_of_an_address, write_batches

from normcourse import CourseError, load_data
from normcourse.engine import sources

NAME, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The archive that stands in for CIFAR-10's, the checksums of its files, and their images."""
    root = tmp_path_factory.mktemp("archive")
    images, _ = write_batches(root / FOLDER)
    with tarfile.open(root / NAME, "w:gz") as tar:
        tar.add(root / FOLDER, FOLDER)
    return (root / NAME).read_bytes(), checksums(root / FOLDER), images


@pytest.fixture
def archive(made):
    return made[0]


class Handler(http.server.BaseHTTPRequestHandler):
    """Does as the path says; ``server.archive`` is the right file, ``server.stop`` ends waits."""

    def do_GET(self):  # noqa: N802
        kind, right = unquote(self.path).strip("/"), self.server.archive
        if kind in ("missing", "broken"):
            return self.send_error(404 if kind == "missing" else 500)
        if kind == "hangs up":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if kind == "silent":
            return self.server.stop.wait(60)
        places = {
            "moved": "/good",
            "moved twice": "/moved",
            "in circles": "/in circles",
            "moved to the dead": self.server.dead,
            "moved to nonsense": "http://[nonsense",
            "moved to a file": "file:///etc/passwd",
            "moved nowhere": "http://" + "x" * 70 + ".invalid/",
        }
        if kind in places:
            self.send_response(302)
            self.send_header("Location", places[kind])
            return self.end_headers()
        bodies = {
            "altered": right[:-1] + bytes([right[-1] ^ 1]),
            "cut": right[: len(right) // 2],
            "empty": b"",
            "page": b"<html>Please log in</html>",
            "stalls": right[:1000],
            "trickles": b"",
        }
        body = bodies.get(kind, right)
        lengths = {
            "cut": len(right),
            "stalls": len(right),
            "trickles": len(right),
            "counts in words": "many",
            "counts below zero": -5,
        }
        self.send_response(200)
        if kind not in ("endless", "does not count"):
            self.send_header("Content-Length", str(lengths.get(kind, len(body))))
        if kind == "says gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        step = len(body) // 12 + 1 if kind == "slow" else len(body) or 1
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            # 3 s in all: more than the limit, but it moves
            self.server.stop.wait(0.25 if kind == "slow" else 0)
        pause, more = {"endless": (0, bytes(1 << 16)), "trickles": (0.05, b"x")}.get(kind, (0, b""))
        while more and not self.server.stop.wait(pause):
            self.wfile.write(more)
        if kind == "stalls":
            self.server.stop.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(made, monkeypatch, tmp_path):
    """Call it with the mirrors to try, in order. The archive is our own; the cache is empty."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *_):  # the client went away
            pass

    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.archive, httpd.stop = made[0], threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(sources, "ARCHIVE_SHA256", hashlib.sha256(made[0]).hexdigest())
    monkeypatch.setattr(sources, "ARCHIVE_BYTES", len(made[0]))
    monkeypatch.setattr(sources, "OFFICIAL_MD5", made[1])
    monkeypatch.setattr(sources, "_name", lambda *_: "CIFAR-10")
    monkeypatch.setattr(sources, "STALL_SECONDS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = f"http://127.0.0.1:{httpd.server_port}/"
    with socket.socket() as taken:  # nobody listens there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        httpd.dead = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        yield lambda *kinds: monkeypatch.setattr(
            sources,
            "MIRRORS",
            tuple((httpd.dead if kind == "dead" else root) + kind for kind in kinds),
        )
    httpd.stop.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    "kind",
    [
        "good",
        "moved",
        "moved twice",
        "slow",
        "does not count",
        "counts in words",
        "counts below zero",
        "says gzip",
    ],
)
def test_the_right_file_arrives_from_the_first_mirror(server, kind, tmp_path):
    server(kind)
    assert len(load_data("cifar10").train_labels) == 100
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    server("missing")
    assert len(load_data("cifar10").train_labels) == 100  # found: not fetched again


BAD = {
    "dead": "refused",
    "missing": "404",
    "broken": "500",
    "hangs up": "",
    "silent": "timed out",
    "stalls": "timed out",
    "altered": "wrong SHA-256",
    "cut": "",
    "empty": "wrong SHA-256",
    "page": "wrong SHA-256",
    "endless": "more than",
    "in circles": "redirects",
    "moved to the dead": "refused",
    "moved to nonsense": "",
    "moved to a file": "file:///etc/passwd",
    "moved nowhere": "",
}


@pytest.mark.parametrize("kind", BAD)
def test_the_right_file_arrives_from_the_next_mirror(server, kind, tmp_path):
    server(kind, "good")
    assert len(load_data("cifar10").train_labels) == 100
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_download_that_fails_lists_what_was_tried(server, tmp_path):
    server(*BAD)
    with pytest.raises(CourseError) as error:
        load_data("cifar10")
    tried = str(error.value).split("tried: ")[1].split("; ")
    assert len(tried) == len(BAD)
    for line, (kind, reason) in zip(tried, BAD.items(), strict=True):
        assert line.startswith("http://127.0.0.1:") and f"/{kind} (" in line, line
        assert reason in line.split("(", 1)[1] and f"/{kind} ()" not in line, line
    assert f"Put {NAME} into {tmp_path / 'data'}" in tried[-1] and "digits" in tried[-1]
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_auto_falls_back_to_digits_with_a_banner(server, capsys):
    server("missing")
    assert load_data("auto").name == "digits"
    assert "NOT CIFAR-10" in capsys.readouterr().err


def test_auto_takes_cifar10_where_it_can_be_fetched(server):
    server("missing", "good")
    assert load_data("auto").name != "digits"


def test_auto_waits_for_no_slow_server(server, monkeypatch, capsys):
    monkeypatch.setattr(sources, "HURRY_SECONDS", 1)
    monkeypatch.setattr(sources, "HURRY_RATE", math.inf)
    server("slow")
    assert load_data("auto").name == "digits"
    assert "too slow" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["trickles", "silent", "stalls"])
def test_auto_gives_every_mirror_the_same_seconds(server, monkeypatch, capsys, kind):
    """Whatever it does meanwhile; what was begun for it is cleared away."""
    load_data("digits")  # which takes a second the first time
    monkeypatch.setattr(sources, "STALL_SECONDS", 20)
    monkeypatch.setattr(sources, "HURRY_SECONDS", 1)
    monkeypatch.setattr(sources, "HURRY_RATE", 1e6)
    server(kind, kind, kind)
    started = time.monotonic()
    assert load_data("auto").name == "digits" and time.monotonic() - started < 5
    assert capsys.readouterr().err.count("too slow: ") == 3
    assert not list(sources.cache_folder().glob("*"))


def test_all_mirrors_together_take_half_a_minute():
    assert len(sources.MIRRORS) * sources.HURRY_SECONDS < 30


def test_auto_waits_for_no_look_up_of_a_name(server, monkeypatch, capsys):
    """Nor for a host's many addresses: requests has no limit for them."""
    monkeypatch.setattr(sources.requests, "get", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(sources, "HURRY_SECONDS", 0.1)
    server("good", "good")
    started = time.monotonic()
    assert load_data("auto").name == "digits" and time.monotonic() - started < 4
    assert capsys.readouterr().err.count("/good (too slow: 0 bytes in 0 s; --data cifar10 ") == 2


# --- archives


def put_archive(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / NAME).write_bytes(content)
    return tmp_path / "data" / NAME


def changed(archive, name, change):
    """The archive, with another content of one member; none where ``change`` gives None."""
    old, new = tarfile.open(fileobj=io.BytesIO(archive)), io.BytesIO()
    with old, tarfile.open(fileobj=new, mode="w:gz") as tar:
        for each in old:
            body = old.extractfile(each).read() if each.isfile() else b""
            if each.name == f"{FOLDER}/{name}":
                body = change(body)
            if body is not None:
                each.size = len(body)
                tar.addfile(each, io.BytesIO(body))
    return new.getvalue()


def test_an_archive_in_data_is_found_and_read_where_it_is(server, made, tmp_path):
    server("missing")
    path = put_archive(tmp_path, made[0])
    for source in ("auto", "cifar10", path, path.parent):
        data = load_data(source)
        assert torch.equal(torch.cat([data.train_images, data.test_images]), made[2])
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert [file.suffix for file in kept] == [".pt"]  # decoded once, and never unpacked


def test_what_an_earlier_version_unpacked_is_still_used(server, tmp_path):
    server("missing")
    write_batches(tmp_path / "cache" / "normcourse" / FOLDER)
    assert len(load_data("cifar10").train_labels) == 100


@pytest.mark.filterwarnings("ignore")  # numpy would only warn of an object made from an address
@pytest.mark.parametrize("name", ["batches.meta", "data_batch_2", "test_batch"])
def test_no_pickle_in_an_archive_runs_code(server, archive, tmp_path, name):
    server("missing")
    flags = {}
    path = put_archive(tmp_path, b"")
    for attack in (pickle_of_an_address(flags), pickle.dumps({b"data": Evil("written")})):
        path.write_bytes(changed(archive, name, lambda _, attack=attack: attack))
        for source in ("cifar10", path):
            with pytest.raises(CourseError, match=f"{name} is not the official file") as error:
                load_data(source)
            assert len(str(error.value).splitlines()) == 1
            assert not flags and not (tmp_path / "written").exists()


DAMAGE = {
    "half": lambda a: a[: len(a) // 2],
    "no end": lambda a: a[:-5000],
    "nothing": lambda a: b"",
    "a page": lambda a: b"<html>Please log in</html>",
    "a byte in the middle": lambda a: a[: len(a) // 2] + b"\0\1\2" + a[len(a) // 2 + 3 :],
    "a bit of a file": lambda a: changed(a, "data_batch_5", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    "a short file": lambda a: changed(a, "data_batch_1", lambda b: b[:-1]),
    "a file less": lambda a: changed(a, "data_batch_4", lambda b: None),
    "no names": lambda a: changed(a, "batches.meta", lambda b: None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_nothing_of_an_altered_archive_is_unpickled(server, archive, tmp_path, monkeypatch, kind):
    server("missing")
    path = put_archive(tmp_path, DAMAGE[kind](archive))
    monkeypatch.setattr(
        pickle, "loads", lambda *_, **__: pytest.fail("unpickled before all was checked")
    )
    with pytest.raises(CourseError, match=f"{NAME}.*; get {NAME} again$") as error:
        load_data("cifar10")
    message = str(error.value)
    assert str(path) in message and len(message.splitlines()) == 1
    named = {
        "a bit of a file": "data_batch_5",
        "a short file": "data_batch_1",
        "a file less": "data_batch_4",
        "no names": "batches.meta",
    }
    if kind != "a byte in the middle":  # what it spoils depends on how well the files are packed
        assert named.get(kind, "cannot read") in message
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def member(name, kind=tarfile.REGTYPE, target=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    "members",
    [
        [member("../escaped")],
        [member("../../escaped")],
        [member(f"{FOLDER}/../../escaped")],
        [member("{outside}/escaped")],
        [member(f"{FOLDER}/link", tarfile.SYMTYPE, "{outside}"), member(f"{FOLDER}/link/escaped")],
        [member(f"{FOLDER}/link", tarfile.SYMTYPE, "../../.."), member(f"{FOLDER}/link/escaped")],
        [member(f"{FOLDER}/data_batch_1", tarfile.SYMTYPE, "{outside}/secret")],
        [
            member(f"{FOLDER}/data_batch_1", tarfile.LNKTYPE, "{outside}/secret"),
            member(f"{FOLDER}/data_batch_1"),
        ],
        [member(f"{FOLDER}/data_batch_1", tarfile.LNKTYPE, "../../../outside/secret")],
        [member(f"{FOLDER}/data_batch_1", tarfile.FIFOTYPE)],
        [member(f"{FOLDER}/data_batch_1", tarfile.CHRTYPE)],
        [member(FOLDER, tarfile.SYMTYPE, "{outside}")],
    ],
    ids=lambda members: " ".join(f"{m.name} {m.linkname}".strip() for m in members),
)
def test_no_member_is_written_anywhere(server, tmp_path, members):
    server("missing")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("as it was")
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w:gz") as tar:
        for each in [member(FOLDER, tarfile.DIRTYPE), *members]:
            each = each.replace(name=each.name.format(outside=tmp_path / "outside"), deep=True)
            each.linkname = each.linkname.format(outside=tmp_path / "outside")
            tar.addfile(each, io.BytesIO(b"evil") if each.isfile() else None)
    put_archive(tmp_path, content.getvalue())
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CourseError):
        load_data("cifar10")
    assert (tmp_path / "outside" / "secret").read_text() == "as it was"
    assert set(tmp_path.rglob("*")) == before  # nothing is written at all
