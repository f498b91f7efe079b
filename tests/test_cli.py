import base64
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_folder, script
from matplotlib import rc_context
from PIL import Image
from test_train import same

import normcourse
from normcourse import CourseError, NormNet, __version__
from normcourse.engine import cli, report, sources
from normcourse.engine import fit as fit_module
from normcourse.engine.cli import main
from normcourse.engine.record import find_records
from normcourse.results import RESULTS, data_folder, experiment, published_records, table


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def train(folder, runs, *more):
    words = ["train", "--data", str(folder), "--runs", str(runs), "--device", "cpu"]
    return main([*words, "--epochs", "1", "--batch-size", "12", *more])


def errors(capsys):
    captured = capsys.readouterr()
    return [line for line in captured.err.splitlines() if "it/s" not in line and line.strip()]


def test_train_prints_the_table_and_leaves_the_pictures(folder, runs, capsys):
    assert train(folder, runs) == 0
    out = capsys.readouterr().out
    for norm in ("Batch Norm", "Layer Norm", "Group Norm, 8 groups"):
        assert re.search(rf"\| NormNet \| {norm} \(batch_size 12\) \| 4\d,\d\d\d \| 1 \|", out), out
    assert "insects" in out and "torch" in out
    kept = runs / "insects"
    for kind in ("*.json", "*.pt", "*-confusion.png", "*-mistakes.png"):
        assert len(list(kept.glob(kind))) == 3, kind
    assert (kept / "report.md").read_text(encoding="utf-8") in out + "\n"
    for picture in kept.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 300
    assert not list(kept.glob("*.tmp")) and not list(kept.glob("*.ckpt"))


def test_every_run_says_what_each_epoch_reached(folder, runs, capsys):
    assert train(folder, runs, "--norm", "bn", "--seed", "0", "1", "--epochs", "2") == 0
    out = capsys.readouterr().out
    shown = re.sub(r"\d+(\.\d)?(?= %| s)", "N", out).splitlines()
    told = ["epoch 1 of 2: test accuracy N %, N s, about N s left"]
    told += ["epoch 2 of 2: test accuracy N %, N s", ""]
    assert shown[1:9] == ["", "normnet bn, seed 0", *told, "normnet bn, seed 1", *told[:2]]
    reached = []
    for record in find_records(runs / "insects").values():
        reached += [f"{epoch['test_accuracy']:.1f}" for epoch in record["history"]]
    assert re.findall(r"accuracy (.*) %", out) == reached


def test_validation_accuracy_is_called_so(folder, runs, capsys):
    assert train(folder, runs, "--norm", "bn", "--validate") == 0
    assert "\nepoch 1 of 1: validation accuracy " in capsys.readouterr().out


def test_a_notebooks_backend_does_no_harm(folder, runs):
    """Nor any that cannot be loaded: the pictures only go into files."""
    words = ["-m", "normcourse", "train", "--data", folder, "--runs", runs, "--epochs", "1"]
    command = [sys.executable, *map(str, words), "--norm", "bn", "--device", "cpu"]
    backend = os.environ | {"MPLBACKEND": "module://nowhere.backend_inline"}
    done = subprocess.run(command, capture_output=True, text=True, env=backend)
    assert (done.returncode, done.stderr) == (0, "") and len(list(runs.rglob("*.png"))) == 4


def test_report_reads_what_train_left(folder, runs, capsys):
    train(folder, runs, "--norm", "bn")
    train(folder, runs, "--norm", "bn", "--seed", "1")
    capsys.readouterr()
    assert main(["report", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| NormNet")]
    records = find_records(runs / "insects").values()
    accuracies = [record["history"][-1]["test_accuracy"] for record in records]
    assert len(rows) == 1 and "| 2 |" in rows[0] and "±" in rows[0]
    assert f"{sum(accuracies) / 2:.2f} ± " in rows[0]


def test_data_sets_never_mix(folder, tmp_path, runs, capsys):
    train(folder, runs, "--norm", "bn")
    train(make_folder(tmp_path / "birds", classes=("owl", "tit"), seed=1), runs, "--norm", "bn")
    capsys.readouterr()
    main(["report", "--runs", str(runs)])
    out = capsys.readouterr().out
    assert out.count("| NormNet | Batch Norm (batch_size 12) |") == 2
    assert out.index("## birds") < out.index("## insects")
    assert sorted(p.name for p in runs.iterdir()) == ["birds", "insects"]


def test_reference_designs_train_by_the_same_command(folder, runs, capsys):
    assert train(folder, runs, "--net", "reference", "--norm", "bn", "ln") == 0
    assert train(folder, runs, "--net", "reference", "--norm", "gn", "--multiplier", "1") == 0
    out = capsys.readouterr().out
    assert "73,5" in out and "(over the limit)" in out  # two or three classes: fewer than 73,770


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["train", "--norm", "bnn"], ["'bnn'", "bn", "ln", "gn", "in", "none"]),
        (["train", "--net", "vgg"], ["'vgg'", "normnet", "reference"]),
        (["train", "--data", "cifar"], ["'cifar'", "cifar10, digits, auto"]),
        (["train", "--device", "tpu"], ["'tpu'", "auto, cpu"]),
        (["train", "--epochs", "0"], ["epochs is 0", "1 to 20"]),
        (["train", "--epochs", "21"], ["epochs is 21", "--more-epochs"]),
        (["train", "--epochs", "two"], ["--epochs", "'two'"]),
        (["train", "--lr", "-1"], ["lr is -1", "above 0"]),
        (["train", "--lr", "nan"], ["lr is nan"]),
        (["train", "--batch-size", "0"], ["batch_size is 0", "1 or more"]),
        (["train", "--norm", "gn", "--num-groups", "7"], ["num_groups=7", "1, 2, 4, 8"]),
        (["train", "--norm"], ["--norm"]),
        (["train", "--nrom", "bn"], ["--nrom"]),
        (["train", "--net", "reference", "--norm", "in"], ["'in'", "bn 1"]),
        ([], ["train,report"]),
        (["fit"], ["'fit'", "train", "report"]),
        (["report", "--runs", "nowhere"], ["no records in", "nowhere', which is no folder"]),
        (["report", "--runs", "."], ["no records in", "normcourse train --runs ."]),
        (["train", "--data", "./x"], ["'./x'", "/x' is not there"]),
        (["train", "--data", __file__], ["test_cli.py' is no folder"]),
    ],
)
def test_bad_options_end_in_one_line_and_status_2(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(options)
    except SystemExit as exit_:
        status = exit_.code
    lines = errors(capsys)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.iterdir())


def test_a_record_cut_short_stops_the_report(folder, runs, capsys):
    train(folder, runs, "--norm", "bn")
    record = next(runs.rglob("*.json"))
    record.write_text(record.read_text()[:300])
    capsys.readouterr()
    assert main(["report", "--runs", str(runs)]) == 2
    assert record.name in errors(capsys)[-1]


def test_no_room_on_the_disk(folder, runs, capsys, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, block):
            if self.tell() + len(block) > 20_000:
                raise OSError(28, "No space left on device")
            return super().write(block)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, _: save(state, FullDisk()))
    assert train(folder, runs, "--norm", "bn") == 2
    assert re.search(
        r"cannot write .*\.ckpt: No space left on device; make room", errors(capsys)[-1]
    )
    assert not [p for p in runs.rglob("*") if p.is_file()]


def test_no_memory_on_the_gpu_is_one_line(folder, runs, capsys, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(cli, "fit", full)
    assert train(folder, runs) == 2
    assert errors(capsys) == ["error: CUDA out of memory. Tried to allocate 2.00 MiB."]


def test_no_terminal_and_no_error_output(folder, runs, monkeypatch):
    """As in pythonw, in a service, or after 2>&-."""
    monkeypatch.setattr(sys, "stderr", None)
    assert train(folder, runs, "--norm", "bn") == 0
    sys.stderr.close()


def test_a_readers_matplotlibrc_stops_no_picture(folder, runs):
    odd = {"text.usetex": True, "font.family": "no such font", "savefig.format": "pdf"}
    with rc_context(odd):
        assert train(folder, runs, "--net", "reference", "--norm", "bn") == 0
    assert len(list(runs.rglob("*.png"))) == 4


def test_runs_of_a_home_folder_are_reported(folder, tmp_path, monkeypatch):
    """As --runs=~/runs, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert train(folder, "~/runs", "--net", "reference", "--norm", "bn") == 0
    assert main(["report", "--runs", "~/runs"]) == 0
    assert (tmp_path / "runs" / "insects" / "report.md").exists()


def test_the_course_is_imported_where_there_is_no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])  # as in Python within another program
    importlib.reload(normcourse)


def test_runs_that_is_a_file(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("normcourse.engine.fit.run_epoch", None)  # found out before any training
    (tmp_path / "taken").write_text("x")
    assert train(folder, tmp_path / "taken") == 2
    last = errors(capsys)[-1]
    assert "cannot write" in last and "taken" in last and "name another folder" in last


def test_odd_names_do_no_harm(tmp_path, runs, capsys):
    for name, classes in (
        ("a$b_$", ("x$y$", "z_{")),
        ("café", ("α", "β")),
        ("cafe", ("a", "b")),
        ("Cafè", ("a", "b")),
    ):
        assert (
            train(make_folder(tmp_path / name, classes=classes, count=2), runs, "--norm", "bn") == 0
        )
    assert len(list(runs.iterdir())) == 4
    capsys.readouterr()


def test_renamed_classes_are_another_data_set(folder, runs, capsys):
    train(folder, runs, "--norm", "bn")
    for part in ("train", "test"):
        (folder / part / "bee").rename(folder / part / "bug")
    train(folder, runs, "--norm", "bn")
    records = find_records(runs / "insects").values()
    assert sorted("bug" in record["classes"] for record in records) == [False, True]
    capsys.readouterr()


def test_ctrl_c_says_how_to_go_on(folder, runs, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    for module, name in ((cli, "fit"), (cli, "load_data"), (fit_module, "run_epoch")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            assert train(folder, runs) == 130
        told = "interrupted; the same command goes on after the last finished epoch"
        assert errors(capsys) == [told]


def test_a_class_that_is_added_later_makes_another_copy_with_pictures_of_its_own(folder, runs):
    train(folder, runs, "--norm", "bn")
    for part in ("train", "test"):
        shutil.copytree(folder / part / "ant", folder / part / "dog")
    assert train(folder, runs, "--norm", "bn") == 0
    kept = runs / "insects"
    copies = [record["copy"].split()[-1] for record in find_records(kept).values()]
    assert len(set(copies)) == 2
    for copy in copies:
        assert (kept / f"curves-normnet-{copy}.png").exists()
        assert (kept / f"per-class-normnet-{copy}.png").exists()


def test_a_report_loads_no_other_data_than_that_of_its_runs(monkeypatch):
    monkeypatch.delenv("NORMCOURSE_DATA", raising=False)
    monkeypatch.setattr(report, "load_data", lambda source: pytest.fail(f"loaded {source}"))
    monkeypatch.setattr(report, "find_cifar10", lambda: "data/cifar-10-batches-py")
    assert report.find_images("insects") is None


@pytest.mark.parametrize("start", [["-m", "normcourse"], ["normcourse"]])
def test_ctrl_c_during_the_imports_is_no_traceback(start, tmp_path):
    waits = "import sys, time\nprint('importing', flush=True)\ntime.sleep(100)\n"
    (tmp_path / "torch.py").write_text(waits)
    (tmp_path / "normcourse").write_text("import normcourse.engine.cli\n")  # as pip writes it
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    places = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}}
    process = subprocess.Popen([sys.executable, *start], **pipes, **places)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_thirteen_classes_need_another_network(tmp_path, runs, capsys):
    classes = [f"class{n}" for n in range(13)]
    many = make_folder(tmp_path / "many", classes=classes, count=2)
    assert train(many, runs, "--norm", "bn") == 2
    (line,) = errors(capsys)
    assert "13 classes make 50,045 parameters" in line and "use fewer, or the net 'ref" in line
    assert train(many, runs, "--norm", "bn", "--net", "reference") == 0
    NormNet("bn", 12)  # the limit that --help names
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "(NormNet: at most 12 classes)" in " ".join(capsys.readouterr().out.split())


def test_runs_and_data_are_found_from_any_folder_of_a_checkout(tmp_path, monkeypatch, capsys):
    root = tmp_path / "course"
    for folder in ("normcourse", "notebooks/deep", "data"):
        (root / folder).mkdir(parents=True)
    (root / "normcourse" / "norm.py").touch()
    (root / "data" / sources.ARCHIVE).touch()
    make_folder(root / "insects")
    monkeypatch.delenv("NORMCOURSE_DATA", raising=False)
    for place in (root, root / "notebooks", root / "notebooks" / "deep"):
        monkeypatch.chdir(place)
        assert sources.find_cifar10() == root / "data" / sources.ARCHIVE
        assert data_folder(None, "insects") == root / "runs" / "insects"
    words = ["train", "--data", str(root / "insects"), "--norm", "bn", "--epochs", "1"]
    assert main([*words, "--device", "cpu"]) == 0
    assert [path.name for path in root.glob("runs/*")] == ["insects"]
    assert not list((root / "notebooks").rglob("runs"))
    assert main(["report"]) == 0 and str(root / "runs" / "insects") in capsys.readouterr().out


def test_outside_a_checkout_runs_and_data_are_those_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / sources.BATCHES).mkdir(parents=True)
    assert sources.find_cifar10() == tmp_path / "data" / sources.BATCHES
    assert data_folder(None, "x") == tmp_path / "runs" / "x"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_training_goes_on_to_the_same_record(folder, tmp_path):
    def start(runs):
        words = ["train", "--data", folder, "--runs", runs, "--norm", "ln", "--epochs", "6"]
        words += ["--batch-size", "4", "--dropout", "0.1"]
        command = [sys.executable, "-m", "normcourse", *map(str, words)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(300) == 0
    process = start(tmp_path / "cut")
    deadline = time.monotonic() + 120
    while not epochs_kept(tmp_path / "cut") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert epochs_kept(tmp_path / "cut") and not list(tmp_path.glob("cut/*/*.json"))
    assert start(tmp_path / "cut").wait(300) == 0
    whole, cut = next(tmp_path.glob("whole/*/*.json")), next(tmp_path.glob("cut/*/*.json"))
    assert same(json.loads(whole.read_text()), json.loads(cut.read_text()))


def epochs_kept(runs):
    """How many finished epochs there are in a checkpoint of these runs; in the first one 0."""
    checkpoints = list(runs.glob("*/*.ckpt"))
    return max((len(torch.load(c, weights_only=True)["history"]) for c in checkpoints), default=0)


def test_help_names_every_option(capsys):
    for words in (["--help"], ["train", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 0
    out = capsys.readouterr().out
    names = "norm data epochs seed lr momentum weight-decay batch-size publish"
    assert all(f"--{name}" in out for name in names.split())


# --- publish --------------------------------------------------------------------------------------


PUBLISH = script("publish")


def notebook(*outputs):
    """A notebook with a badge, a first cell and a picture to be published."""
    title = {"cell_type": "markdown", "metadata": {}, "source": ["# One\n", PUBLISH.LAUNCH.NOT_YET]}
    line = 'ADDRESS = os.environ.get("NORMCOURSE_REPOSITORY", "")'
    first = {"cell_type": "code", "metadata": {}, "source": [line], "outputs": []}
    tags = {"tags": ["image-normnet-bn-mistakes"]}
    shown = {"cell_type": "code", "metadata": tags, "source": ["draw()"], "outputs": list(outputs)}
    return json.dumps({"cells": [title, first, shown]})


def output(picture):
    """What a cell shows that displays a picture."""
    data = {"image/png": base64.b64encode(picture).decode(), "text/plain": ["Ten mistakes"]}
    metadata = {"image/png": {"alt": "Ten mistakes"}}
    return {"output_type": "display_data", "data": data, "metadata": metadata}


def marked(name):
    """A part of a page that publishing writes."""
    return f"{PUBLISH.START.format(name)}\noutdated\n{PUBLISH.END.format(name)}"


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    for folder in ("images", "notebooks", "normcourse/results"):
        (root / folder).mkdir(parents=True)
    page = f"# Title\n\n{marked('results')}\n\nafter\n"
    (root / "README.md").write_text(page, encoding="utf-8")
    (root / "images" / "outdated.png").touch()
    (root / "notebooks" / "01_one.ipynb").write_text(notebook(output(b"pixels")), encoding="utf-8")
    return root


def contents(root):
    """Every file below a folder."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_only_cifar10_is_published(folder, runs, checkout):
    train(folder, runs, "--norm", "bn")
    before = contents(checkout)
    with pytest.raises(CourseError, match="no final CIFAR-10 run"):
        PUBLISH.publish(runs, root=checkout)
    assert contents(checkout) == before


@pytest.mark.parametrize(
    "change",
    [
        {"data": "digits"},
        {"images": [45_000, 5_000]},
        {"settings": {"validate": True, "epochs": 20}},
        {"settings": {"validate": False, "epochs": 21}},
    ],
)
def test_a_run_that_breaks_a_rule_is_not_final(change):
    settings = {"validate": False, "epochs": 20}
    record = {"data": "CIFAR-10", "images": [50_000, 10_000], "settings": settings}
    assert PUBLISH.is_final(record) and not PUBLISH.is_final(record | change)


def test_publish_writes_readme_images_records_and_weights(folder, runs, checkout, monkeypatch):
    monkeypatch.setattr(PUBLISH, "is_final", lambda _: True)  # as if these few images were all
    train(folder, runs, "--norm", "bn", "ln")
    train(folder, runs, "--norm", "bn", "--seed", "1")
    PUBLISH.publish(runs, root=checkout)
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title") and text.endswith("after\n") and "outdated" not in text
    assert table(list(find_records(runs / "insects").values()), PUBLISH.RESULTS) in text
    (picture,) = (checkout / "images").iterdir()  # the outdated one is gone
    assert picture.name == "normnet-bn-mistakes.png" and picture.read_bytes() == b"pixels"
    kept = checkout / "normcourse" / "results"
    assert len(list(kept.glob("*.json"))) == 3
    assert len(list(kept.glob("*.pt"))) == 2  # weights of one seed
    for path in kept.iterdir():
        assert path.read_bytes() == (runs / "insects" / path.name).read_bytes()
    before = contents(checkout)
    PUBLISH.publish(runs, root=checkout)
    assert contents(checkout) == before
    PUBLISH.publish(kept, root=checkout)  # onto itself
    assert contents(checkout) == before


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_publishing_changes_nothing_else_of_a_page(ends, checkout):
    """Neither the ends of its lines nor bytes that are not UTF-8; nor does a record's text."""
    records = [dict(record) for record in published_records().values()]
    for record in records:
        record["device"] = record["system"] = PUBLISH.END.format("results")
    page = checkout / "README.md"
    around = [f"caf\xe9{ends}{ends}".encode("latin-1"), f"{ends}after{ends}".encode()]
    page.write_bytes(marked("results").replace("\n", ends).encode().join(around))
    for _ in range(2):
        PUBLISH.write_page(page, PUBLISH.parts(records), {})
        content = page.read_bytes()
        assert content.startswith(around[0]) and content.endswith(around[1])
        assert content.count(b"\n") == content.count(ends.encode())
        assert table(records[:1], PUBLISH.RESULTS).splitlines()[0].encode() in content


def test_publishing_some_runs_keeps_the_others(folder, runs, checkout, monkeypatch):
    monkeypatch.setattr(PUBLISH, "is_final", lambda _: True)
    for norm in ("bn", "ln"):
        train(folder, runs / norm, "--norm", norm)
        PUBLISH.publish(runs / norm, root=checkout)
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert "| Batch Norm (batch_size 12) |" in text and "| Layer Norm (batch_size 12) |" in text
    assert len(list((checkout / "normcourse" / "results").glob("*.json"))) == 2


def test_publish_writes_the_address_into_the_notebooks(checkout):
    path = checkout / "notebooks" / "01_one.ipynb"
    before, launch = path.read_text(encoding="utf-8"), PUBLISH.LAUNCH
    after = launch.address_notebook(before, path.name, "https://github.com/somebody/course")
    title, first, shown = json.loads(after)["cells"]
    assert title["source"][1].startswith("[![Open in Colab](https://colab.research.google.com/")
    assert title["source"][1].endswith("/github/somebody/course/blob/main/notebooks/01_one.ipynb)")
    assert f'"git+https://github.com/somebody/course@v{__version__}"' in first["source"][0]
    assert launch.address_notebook(after, path.name, "") == before


def test_publish_writes_the_pages_that_have_marks_and_no_others(checkout):
    docs = checkout / "docs"
    docs.mkdir()
    (docs / "numbers.md").write_text(f"before\n\n{marked('normnet')}\n\nafter\n")
    (docs / "other.md").write_text("other\n")
    text = (checkout / "README.md").read_text() + f"\n{marked('designs')}\n"
    (checkout / "README.md").write_text(text)
    PUBLISH.publish(RESULTS, root=checkout)
    records = published_records().values()
    page, readme = (docs / "numbers.md").read_text(), (checkout / "README.md").read_text()
    assert table(list(records), PUBLISH.MORE) in page
    assert PUBLISH.designs(experiment("published_designs")) in readme
    assert "outdated" not in page + readme and page.startswith("before\n") and "\nafter\n" in page
    assert (docs / "other.md").read_text() == "other\n"


def test_a_part_without_records_stays_as_it_was(checkout):
    ours = [r for r in published_records().values() if r["settings"]["norm"] == "bn"]
    ours = [r for r in ours if r["settings"]["net"] == "normnet"]
    page = checkout / "README.md"
    page.write_text(f"{marked('summary')}\n{marked('results')}\n")
    PUBLISH.write_page(page, PUBLISH.parts(ours), {})
    text = page.read_text()
    assert marked("summary") in text
    assert marked("results") not in text and table(ours, PUBLISH.RESULTS) in text


def test_pictures_of_a_page_get_the_descriptions_of_the_notebooks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[![old](../images/a.png)](a.ipynb) ![own](images/b.png) ![x](other/a.png)\n")
    PUBLISH.write_page(page, {}, {"a.png": r"a new\one"})
    link = r"[![a new\one](../images/a.png)](a.ipynb)"
    assert page.read_text() == f"{link} ![own](images/b.png) ![x](other/a.png)\n"


def test_a_mark_within_a_part_does_not_cut_the_page(checkout):
    page = checkout / "README.md"
    for _ in range(2):
        part = f"a record that says {PUBLISH.END.format('results')}"
        PUBLISH.write_page(page, {"results": part}, {})
        assert page.read_text().endswith("\n\nafter\n") and page.read_text().count("a record") == 1


def test_a_notebook_that_was_not_executed_is_not_published(checkout):
    (checkout / "notebooks" / "01_one.ipynb").write_text(notebook(), encoding="utf-8")
    with pytest.raises(CourseError, match="image-normnet-bn-mistakes shows no picture.*; execute"):
        PUBLISH.take_pictures(checkout / "notebooks", checkout / "images")
    assert [path.name for path in (checkout / "images").iterdir()] == ["outdated.png"]


def test_publish_needs_a_checkout(runs, tmp_path):
    with pytest.raises(CourseError, match="not a checkout.*; publish from a checkout"):
        PUBLISH.publish(runs, root=tmp_path)


def test_publish_outside_a_checkout_names_what_is_missing(runs, tmp_path, capsys, monkeypatch):
    installed = tmp_path / "site" / "normcourse" / "engine" / "cli.py"
    monkeypatch.setattr(cli, "__file__", str(installed))
    assert main(["report", "--publish", "--runs", str(runs)]) == 2
    last = errors(capsys)[-1]
    assert "experiments/publish.py is not there" in last and "publish from a checkout" in last


def test_the_command_publishes_by_the_script_of_the_checkout(runs, capsys):
    assert main(["report", "--publish", "--runs", str(runs)]) == 2
    assert "no final CIFAR-10 run" in errors(capsys)[-1]
