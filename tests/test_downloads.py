"""The archive of CIFAR-10 from servers that behave badly, all on this machine; archives and pickles that mean harm."""

import hashlib
import http.server
import io
import pickle
import socket
import sys
import tarfile
import threading
from urllib.parse import unquote

import pytest
from test_data import write_batches

from normcourse import CourseError, load_data
from normcourse import data as data_module

NAME, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    write_batches(root / FOLDER)
    with tarfile.open(root / NAME, "w:gz") as tar:
        tar.add(root / FOLDER, FOLDER)
    return (root / NAME).read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Behaves as the path says; ``server.archive`` is the right file, ``server.stop`` ends all waiting."""

    def do_GET(self):  # noqa: N802
        kind, right = unquote(self.path).strip("/"), self.server.archive
        if kind == "missing":
            return self.send_error(404)
        if kind == "broken":
            return self.send_error(500)
        if kind == "hangs up":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if kind == "silent":
            return self.server.stop.wait(60)
        places = {"moved": "/good", "moved twice": "/moved", "in circles": "/in circles", "moved to the dead": self.server.dead,
                  "moved to nonsense": "http://[nonsense", "moved to a file": "file:///etc/passwd",
                  "moved nowhere": "http://" + "x" * 70 + ".invalid/"}  # fmt: skip
        if kind in places:
            self.send_response(302)
            self.send_header("Location", places[kind])
            return self.end_headers()
        bodies = {"altered": right[:-1] + bytes([right[-1] ^ 1]), "cut": right[: len(right) // 2], "empty": b"",
                  "page": b"<html>Please log in</html>", "stalls": right[:1000]}  # fmt: skip
        body = bodies.get(kind, right)
        lengths = {"cut": len(right), "stalls": len(right), "counts in words": "many", "counts below zero": -5}
        self.send_response(200)
        if kind not in ("endless", "does not count"):
            self.send_header("Content-Length", str(lengths.get(kind, len(body))))
        if kind == "says gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        step = len(body) // 12 + 1 if kind == "slow" else len(body) or 1
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.server.stop.wait(0.25 if kind == "slow" else 0)  # 3 s in all: more than the limit, but it moves
        while kind == "endless" and not self.server.stop.is_set():
            self.wfile.write(bytes(1 << 16))
        if kind == "stalls":
            self.server.stop.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(archive, monkeypatch, tmp_path):
    """Call it with the mirrors to try, in order. The archive stands in for CIFAR-10's; the cache is empty."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *_):  # the client went away
            pass

    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.archive, httpd.stop = archive, threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(data_module, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(data_module, "ARCHIVE_BYTES", len(archive))
    monkeypatch.setattr(data_module, "_name", lambda *_: "CIFAR-10")
    monkeypatch.setattr(data_module, "STALL_SECONDS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = f"http://127.0.0.1:{httpd.server_port}/"
    with socket.socket() as taken:  # nobody listens there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        httpd.dead = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        yield lambda *kinds: monkeypatch.setattr(
            data_module, "MIRRORS", tuple((httpd.dead if kind == "dead" else root) + kind for kind in kinds)
        )
    httpd.stop.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    "kind",
    ["good", "moved", "moved twice", "slow", "does not count", "counts in words", "counts below zero", "says gzip"],
)
def test_the_right_file_arrives_from_the_first_mirror(server, kind, tmp_path):
    server(kind)
    assert len(load_data("cifar10").train_labels) == 100
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    server("missing")
    assert len(load_data("cifar10").train_labels) == 100  # found: not fetched again


BAD = {
    "dead": "refused", "missing": "404", "broken": "500", "hangs up": "", "silent": "timed out", "stalls": "timed out",
    "altered": "wrong SHA-256", "cut": "", "empty": "wrong SHA-256", "page": "wrong SHA-256", "endless": "more than",
    "in circles": "redirects", "moved to the dead": "refused", "moved to nonsense": "",
    "moved to a file": "file:///etc/passwd", "moved nowhere": "",
}  # fmt: skip


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
    assert "Put cifar-10-python.tar.gz into ./data" in tried[-1] and "digits" in tried[-1]
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_auto_falls_back_to_digits_with_a_banner(server, capsys):
    server("missing")
    assert load_data("auto").name == "digits"
    assert "NOT CIFAR-10" in capsys.readouterr().err


def test_auto_takes_cifar10_where_it_can_be_fetched(server):
    server("missing", "good")
    assert load_data("auto").name != "digits"


def test_auto_waits_for_no_slow_server(server, monkeypatch, capsys):
    monkeypatch.setattr(data_module, "STALL_SECONDS", 1)
    monkeypatch.setattr(data_module, "AUTO_ETA", 0)
    server("slow")
    assert load_data("auto").name == "digits"
    assert "too slow" in capsys.readouterr().err


# --- archives and pickles


def put_archive(tmp_path, content, monkeypatch=None):
    """Put the archive into ./data; with monkeypatch, its hash passes for CIFAR-10's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / NAME).write_bytes(content)
    if monkeypatch:
        monkeypatch.setattr(data_module, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path / "data" / NAME


def test_an_archive_or_folder_in_data_is_found(server, archive, tmp_path):
    server("missing")
    path = put_archive(tmp_path, archive)
    assert len(load_data("auto").train_labels) == 100
    assert len(load_data(path).train_labels) == 100


class Evil:
    """Its pickle creates the file ``written`` in the working directory."""

    def __reduce__(self):
        return (open, ("written", "w"))


def evil_archive(archive):
    """The archive, with code in one of its pickles."""
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as tar,
        tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as new,
    ):
        for member in tar:
            if member.isfile():
                body = (
                    pickle.dumps({b"data": Evil()})
                    if member.name.endswith("batch_2")
                    else tar.extractfile(member).read()
                )
                member.size = len(body)
                new.addfile(member, io.BytesIO(body))
    return out.getvalue()


@pytest.mark.parametrize("change", [lambda a: a[: len(a) // 2], lambda a: a[:-1] + b"x", lambda a: b"", evil_archive])
def test_an_altered_archive_is_never_opened(server, archive, tmp_path, monkeypatch, change):
    server("missing")
    put_archive(tmp_path, change(archive))
    for module, name in ((tarfile, "open"), (data_module, "_unpickle")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("opened before its hash was known"))
    with pytest.raises(CourseError, match="cut short or altered"):
        load_data("cifar10")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] and not (tmp_path / "written").exists()


def test_even_with_the_right_hash_no_pickle_runs_code(server, archive, tmp_path, monkeypatch):
    put_archive(tmp_path, evil_archive(archive), monkeypatch)
    with pytest.raises(CourseError, match="data_batch_2.*no CIFAR-10 file does"):
        load_data("cifar10")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cposix\nsystem\n(S'touch written'\ntR.", b"cbuiltins\neval\n(S'open(\"written\", \"w\")'\ntR.", b"cbuiltins\nopen\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.", b"cnumpy.f2py.__main__\ndtype\n.", b"cnumpy.distutils.core\nndarray\n.",
        b"cnumpy\nload\n.", b"ctorch\nload\n.", b"cnumpy.testing._private.utils\nrunstring\n.",
    ],
)  # fmt: skip
def test_a_pickle_gets_nothing_but_arrays(opcodes, tmp_path, monkeypatch):
    """The import of a module runs code, too: even that does not happen."""
    write_batches(tmp_path / FOLDER)
    (tmp_path / FOLDER / "data_batch_3").write_bytes(opcodes)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    with pytest.raises(CourseError, match="data_batch_3.*no CIFAR-10 file does"):
        load_data(tmp_path)
    assert not (tmp_path / "written").exists()
    assert not {"numpy.f2py", "numpy.distutils"} & (set(sys.modules) - before)


def member(name, kind=tarfile.REGTYPE, target=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.skipif(
    not hasattr(tarfile, "data_filter"), reason="this Python has no safe way to unpack; the hash decides"
)
@pytest.mark.parametrize(
    "members",
    [
        [member("../escaped")], [member("../../escaped")], [member(f"{FOLDER}/../../escaped")], [member("{outside}/escaped")],
        [member(f"{FOLDER}/link", tarfile.SYMTYPE, "{outside}"), member(f"{FOLDER}/link/escaped")],
        [member(f"{FOLDER}/link", tarfile.SYMTYPE, "../../.."), member(f"{FOLDER}/link/escaped")],
        [member(f"{FOLDER}/data_batch_1", tarfile.SYMTYPE, "{outside}/secret")],
        [member(f"{FOLDER}/data_batch_1", tarfile.LNKTYPE, "{outside}/secret"), member(f"{FOLDER}/data_batch_1")],
        [member(f"{FOLDER}/data_batch_1", tarfile.LNKTYPE, "../../../outside/secret")],
        [member(f"{FOLDER}/data_batch_1", tarfile.FIFOTYPE)], [member(f"{FOLDER}/data_batch_1", tarfile.CHRTYPE)],
        [member(FOLDER, tarfile.SYMTYPE, "{outside}")],
    ],
    ids=lambda members: " ".join(f"{m.name} {m.linkname}".strip() for m in members),
)  # fmt: skip
def test_no_member_gets_out_of_the_folder(server, monkeypatch, tmp_path, members):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("as it was")
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w:gz") as tar:
        for each in [member(FOLDER, tarfile.DIRTYPE), *members]:
            each = each.replace(name=each.name.format(outside=tmp_path / "outside"), deep=True)
            each.linkname = each.linkname.format(outside=tmp_path / "outside")
            tar.addfile(each, io.BytesIO(b"evil") if each.isfile() else None)
    put_archive(tmp_path, content.getvalue(), monkeypatch)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CourseError):
        load_data("cifar10")
    assert (tmp_path / "outside" / "secret").read_text() == "as it was"
    cache = tmp_path / "cache"
    written = {path for path in set(tmp_path.rglob("*")) - before if cache not in path.parents and path != cache}
    assert not written and not list(tmp_path.rglob("escaped")), written
    assert not [path for path in cache.rglob("*") if path.is_symlink() or path.suffix == ".tmp"]
