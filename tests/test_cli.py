import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_folder
from PIL import Image
from test_train import same

from normcourse import cli
from normcourse import data as data_module
from normcourse import report as report_module
from normcourse.cli import main
from normcourse.report import END, START, publish, read_records


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def train(folder, runs, *more):
    return main(
        [
            "train",
            "--data",
            str(folder),
            "--runs",
            str(runs),
            "--epochs",
            "1",
            "--batch-size",
            "12",
            "--device",
            "cpu",
            *more,
        ]
    )


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
    assert (
        len(list(kept.glob("*.json"))) == len(list(kept.glob("*.pt"))) == len(list(kept.glob("*-confusion.png"))) == 3
    )
    assert (
        len(list(kept.glob("*-mistakes.png"))) == 3 and (kept / "report.md").read_text(encoding="utf-8") in out + "\n"
    )
    for picture in kept.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 300
    assert not list(kept.glob("*.tmp")) and not list(kept.glob("*.ckpt"))


def test_report_reads_what_train_left(folder, runs, capsys):
    train(folder, runs, "--norm", "bn")
    train(folder, runs, "--norm", "bn", "--seed", "1")
    capsys.readouterr()
    assert main(["report", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| NormNet")]
    accuracies = [r["history"][-1]["test_accuracy"] for r in read_records(runs).values()]
    assert len(rows) == 1 and "| 2 |" in rows[0] and "±" in rows[0]
    assert f"{sum(accuracies) / 2:.2f} ± " in rows[0]


def test_data_sets_never_mix(folder, tmp_path, runs, capsys):
    train(folder, runs, "--norm", "bn")
    train(make_folder(tmp_path / "birds", classes=("owl", "tit"), seed=1), runs, "--norm", "bn")
    capsys.readouterr()
    main(["report", "--runs", str(runs)])
    out = capsys.readouterr().out
    assert out.count("| NormNet | Batch Norm (batch_size 12) |") == 2 and out.index("## birds") < out.index(
        "## insects"
    )
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
        (["report", "--runs", "nowhere"], ["no records in nowhere", "train first"]),
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
    assert re.search(r"cannot write .*\.ckpt: No space left on device; make room", errors(capsys)[-1])
    assert not [p for p in runs.rglob("*") if p.is_file()]


def test_runs_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    assert train(folder, tmp_path / "taken") == 2
    last = errors(capsys)[-1]
    assert "--runs" in last and "give a folder that can be written" in last


def test_odd_names_do_no_harm(tmp_path, runs, capsys):
    for name, classes in (("a$b_$", ("x$y$", "z_{")), ("café", ("α", "β")), ("cafe", ("a", "b")), ("Cafè", ("a", "b"))):
        assert train(make_folder(tmp_path / name, classes=classes, count=2), runs, "--norm", "bn") == 0
    assert len(list(runs.iterdir())) == 4
    capsys.readouterr()


def test_renamed_classes_are_another_data_set(folder, runs, capsys):
    train(folder, runs, "--norm", "bn")
    for part in ("train", "test"):
        (folder / part / "bee").rename(folder / part / "bug")
    train(folder, runs, "--norm", "bn")
    assert sorted("bug" in r["classes"] for r in read_records(runs).values()) == [False, True]
    capsys.readouterr()


def test_ctrl_c_says_how_to_go_on(folder, runs, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit", interrupt)
    assert train(folder, runs) == 130
    assert "the same command goes on" in errors(capsys)[-1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_training_goes_on_to_the_same_record(folder, tmp_path):
    def start(runs):
        words = [
            "train",
            "--data",
            folder,
            "--runs",
            runs,
            "--norm",
            "ln",
            "--epochs",
            "6",
            "--batch-size",
            "4",
            "--dropout",
            "0.1",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "normcourse", *map(str, words)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait(300) == 0
    process = start(tmp_path / "cut")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cut/*/*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("cut/*/*.ckpt")) and not list(tmp_path.glob("cut/*/*.json"))
    assert start(tmp_path / "cut").wait(300) == 0
    whole, cut = (json.loads(next(tmp_path.glob(f"{f}/*/*.json")).read_text()) for f in ("whole", "cut"))
    assert same(whole, cut)


def test_help_names_every_option(capsys):
    for words in (["--help"], ["train", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(
        f"--{o}" in out
        for o in ("norm", "data", "epochs", "seed", "lr", "momentum", "weight-decay", "batch-size", "publish")
    )


# --- publish


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "README.md").write_text(
        f"# Title\n\n{START}\noutdated\n{END}\n\nafter\n", encoding="utf-8"
    )
    return tmp_path / "checkout"


def test_only_cifar10_is_published(folder, runs, checkout):
    train(folder, runs, "--norm", "bn")
    before = (checkout / "README.md").read_text(encoding="utf-8")
    with pytest.raises(data_module.CourseError, match="no final CIFAR-10 run"):
        publish(runs, root=checkout)
    assert (checkout / "README.md").read_text(encoding="utf-8") == before and not (checkout / "images").exists()


def test_publish_writes_readme_images_records_and_weights(folder, runs, checkout, monkeypatch):
    monkeypatch.setattr(data_module, "_name", lambda *_: "CIFAR-10")
    monkeypatch.setattr(report_module, "_publishable", lambda _: True)  # as if these few images were all
    train(folder, runs, "--norm", "bn", "ln")
    train(folder, runs, "--norm", "bn", "--seed", "1")
    monkeypatch.setattr(report_module, "find_cifar10", lambda: None)
    publish(runs, str(folder), root=checkout)
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title") and text.endswith("after\n") and "outdated" not in text
    for alt, name in re.findall(r"!\[(.*)\]\((.*)\)", text):
        assert alt and (checkout / name).is_file()
    assert (checkout / "images" / "normnet-bn-mistakes.png").exists()
    kept = checkout / "normcourse" / "results"
    assert len(list(kept.glob("*.json"))) == 3 and len(list(kept.glob("*.pt"))) == 2  # weights of one seed
    again = text
    publish(runs, str(folder), root=checkout)
    assert (checkout / "README.md").read_text(encoding="utf-8") == again


def test_publish_needs_a_checkout(folder, runs, tmp_path):
    with pytest.raises(data_module.CourseError, match="not a checkout"):
        publish(runs, root=tmp_path)
