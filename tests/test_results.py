"""The published figures: page, records, weights and lr search agree with what is run."""

import importlib
import itertools
import json
import re
import shutil
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import script
from matplotlib import pyplot
from scipy import stats

from normcourse import CourseError, Settings, count_parameters, default_settings, evaluate, plot
from normcourse.engine.record import find_records
from normcourse.model import DESIGNS
from normcourse.norm import NORMS
from normcourse.results import (
    NETS,
    RESULTS,
    by_seed,
    command,
    data_folder,
    experiment,
    groups,
    label,
    mean_std,
    paired,
    published_records,
    table,
)
from normcourse.train import LEARNING_RATES, build

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = published_records()


def of_net(net):
    """The published records of a family of networks."""
    return [record for record in PUBLISHED.values() if record["settings"]["net"] == net]


def test_published_records_are_whole_and_in_the_order_of_the_table():
    assert list(PUBLISHED.items()) == list(find_records(RESULTS).items())


def test_a_table_has_a_row_for_each_network_and_the_columns_asked_for():
    ours = of_net("normnet")
    whole, part = table(ours).splitlines(), table(ours, ["norm", "seeds"]).splitlines()
    assert len(whole) == len(part) == 2 + len(groups(ours))
    assert part[:2] == ["| norm | seeds |", "|---|--:|"] and part[2].startswith("| Batch Norm | ")
    assert whole[0].startswith("| network | norm | parameters | epochs | lr | seeds | train")
    assert whole[2].split(" | ")[1] == part[2].split(" | ")[0].strip("| ")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_records_keep_the_rules(path):
    record = PUBLISHED[path]
    settings = record["settings"]
    assert (
        record["data"] == "CIFAR-10"
        and record["images"] == [50_000, 10_000]
        and not settings["validate"]
    )
    assert len(record["history"]) == settings["epochs"] <= 20
    assert record["command"] == command(settings)
    right = sum(row[k] for k, row in enumerate(record["confusion"]))
    assert record["history"][-1]["test_accuracy"] == pytest.approx(
        right / 100
    )  # the final epoch's, of 10,000 images
    net = build(Settings(**settings), len(record["classes"]))
    assert count_parameters(net) == record["parameters"]


def test_all_three_norms_are_published_above_70_percent_with_fewer_than_50000_parameters():
    ours = of_net("normnet")
    assert {"bn", "ln", "gn"} <= {r["settings"]["norm"] for r in ours}
    assert all(r["parameters"] < 50_000 and r["history"][-1]["test_accuracy"] > 70 for r in ours)


def test_each_network_has_weights():
    kept = [path for path in PUBLISHED if path.with_suffix(".pt").exists()]
    assert len(kept) == len(groups(list(PUBLISHED.values())))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_weights_reproduce_the_recorded_accuracy(path, cifar10):
    record = PUBLISHED[path]
    if not path.with_suffix(".pt").exists():
        pytest.skip("only one seed of each network has its weights published")
    if cifar10.copy != record["copy"]:
        pytest.skip(f"recorded on another copy of CIFAR-10: {record['copy']}")
    net = build(Settings(**record["settings"]), len(record["classes"]))
    net.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True))
    _, predicted = evaluate(net, cifar10.test_images, cifar10.test_labels, cifar10)
    accuracy = 100 * (predicted == cifar10.test_labels).float().mean().item()
    assert accuracy == pytest.approx(record["history"][-1]["test_accuracy"], abs=0.1)


def test_default_learning_rates_are_the_best_of_the_recorded_search():
    searched: dict[str, dict[float, float]] = {}
    for file in (ROOT / "experiments" / "lr_search").glob("*.json"):
        record = json.loads(file.read_text())
        assert record["settings"]["validate"] and "test_accuracy" not in record["history"][-1]
        found = searched.setdefault(record["settings"]["norm"], {})
        found[record["settings"]["lr"]] = record["history"][-1]["val_accuracy"]
    assert set(searched) == set(LEARNING_RATES)
    for norm, accuracy in searched.items():
        best = script("lr_search").choose(accuracy)
        assert LEARNING_RATES[norm] == best and min(accuracy) < best < max(accuracy), norm


def test_the_best_rate_is_taken_unless_the_middle_one_is_as_good():
    choose = script("lr_search").choose
    assert choose({0.015: 78.4, 0.03: 78.3, 0.06: 70}) == 0.03
    assert choose({0.015: 78.9, 0.03: 78.3, 0.06: 70}) == 0.015 and choose({0.015: 70}) == 0.015


def test_the_page_of_experiments_shows_the_record_of_what_was_tried():
    folder = ROOT / "experiments"
    rows = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    record = json.loads((folder / "levers.json").read_text(encoding="utf-8"))
    trials = [trial for kind in ("trials", "later", "mirrored") for trial in record[kind]]
    assert len(trials) == len([row for row in rows if re.match(r"\| (bn|ln|gn) \|", row)])
    for trial in trials:
        accuracies, what = trial["val_accuracy"], f"| {trial['norm']} | {trial['what']} |"
        shown = {f"{accuracies[-1]:.1f}", f"{accuracies[-1]:.2f}"}
        candidates = [re.split(r" *\| *", row) for row in rows if row.startswith(what)]
        assert any(shown & set(cells) for cells in candidates), trial


def whole_seeds(name):
    """The records of those seeds that judge and whose arms are all recorded."""
    module, records = importlib.import_module(name), experiment(name)
    judging = {*module.SEEDS, *getattr(module, "NEW_SEEDS", ())}
    there = Counter(record["settings"]["seed"] for record in records)
    planned = Counter(trial.seed for trial in module.trials())
    whole = {seed for seed in judging if there[seed] == planned[seed]}
    return [record for record in records if record["settings"]["seed"] in whole]


def differences(records):
    """All paired differences of arms, or of an arm's figures, as a page has them."""
    arms = {record["arm"]: None for record in records}
    figures = {figure: None for record in records for figure in record["figures"]}
    values = {}
    for arm, figure in itertools.product(arms, figures):
        of_arm = [r for r in records if figure in r["figures"]]
        values[arm, figure] = by_seed(of_arm, arm, figure)
    shown = set()
    for one, other in itertools.permutations(values, 2):
        alike = one[0] == other[0] or one[1] == other[1]
        if alike and values[one].keys() & values[other].keys():
            shown.add(str(paired(values[one], values[other])).partition(" (")[0])
    return shown


def means(records):
    """The mean over seeds of every figure of every arm, as a page shows it."""
    reached = {}
    for record in records:
        for figure, value in record["figures"].items():
            reached.setdefault((record["arm"], figure), []).append(value)
    return {f"{statistics.mean(values):.1f}" for values in reached.values()}


@pytest.mark.usefixtures("experiments")
def test_the_page_of_experiments_shows_figures_of_their_records():
    page = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    for section in page.split("\n### ")[1:]:
        names = re.findall(r"\[(\w+)\.py\]", section.partition("Protocol: ")[2])
        if not names:
            continue
        records, text = sum(map(whole_seeds, names), []), section.replace("\n", " ")
        intervals = re.findall(r"[+-]\d+\.\d\d \[[^\]]+\]", text)
        percents = re.findall(r"(\d+\.\d) %", text)
        assert intervals and set(intervals) <= differences(records), names
        assert set(percents) <= means(records), names


def test_the_readme_says_what_few_images_to_a_mean_cost():
    """Rounded; the four numbers are typed there."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    said = page.partition("**Few images to a mean.**")[2].partition("![")[0]
    names = ("k = 8", "k = 4", "k = 2", "k = 128", "k = 2, frozen at the end")
    records = experiment("shared_statistics")
    k8, k4, k2, k128, frozen = (by_seed(records, name, "running") for name in names)
    changes = [paired(k128, k8), paired(k128, k4), paired(k128, k2), paired(frozen, k2)]
    assert re.findall(r"\d\.\d", said) == [f"{change.mean:.1f}" for change in changes]
    assert all(change.clear for change in changes)


def test_every_norm_has_a_name_for_the_reader():
    names = {norm: label(vars(default_settings(norm=norm))) for norm in NORMS}
    assert (
        names["gn"] == "Group Norm, 8 groups"
        and names["none"] == "no norm"
        and len(set(names.values())) == 5
    )
    assert label(vars(default_settings("reference", "bn", l1=0.0))) == "Batch Norm (l1 0.0)"


def one_of_each(net):
    """A record of each network; those of the designs have NormNet's figures."""
    if net == "normnet":
        return [same[0] for same in groups(of_net(net))]
    each = [default_settings(net, norm, multiplier=m) for norm, m in DESIGNS]
    return [of_net("normnet")[0] | {"settings": vars(settings)} for settings in each]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("draw", [plot.curves, plot.per_class])
def test_the_legend_of_a_picture_is_not_cut(draw, net):
    figure = draw(one_of_each(net))
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1 and 0 <= legend.y0
    pyplot.close(figure)


def test_the_names_of_a_hundred_classes_do_not_cover_each_other():
    names = [f"class{k}" for k in range(100)]
    record = of_net("normnet")[0] | {"classes": names, "confusion": [[1] * 100] * 100}
    figure = plot.per_class([record])
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == names[::5]
    boxes = [label.get_window_extent() for label in labels]
    assert all(one.x1 < two.x0 + 0.6 * two.width for one, two in itertools.pairwise(boxes))
    pyplot.close(figure)


def test_paired_differences_are_those_of_scipys_paired_t_test():
    a, b = {0: 81.0, 1: 84.5, 2: 83.0}, {0: 78.0, 1: 80.1, 2: 79.5}
    found = paired(a, b)
    theirs = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.mean == pytest.approx(3.6333, abs=1e-3) and found.seeds == 3 and found.clear
    assert str(found) == f"+3.63 [{theirs.low:+.2f}, {theirs.high:+.2f}] (clear)"


def test_a_difference_is_clear_when_its_interval_leaves_out_zero():
    assert paired({0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.0}).clear
    assert not paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0}).clear
    assert paired({0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.1}).clear


def test_hidden_files_beside_the_records_are_not_read(tmp_path, monkeypatch):
    """On some disks macOS puts a file ._NAME beside each NAME."""
    record = next(iter(PUBLISHED))
    shutil.copy(record, tmp_path)
    (tmp_path / f"._{record.name}").write_bytes(b"\0\5\x16\7\xff")
    monkeypatch.setattr("normcourse.results.RESULTS", tmp_path)
    assert len(published_records()) == len(find_records(tmp_path)) == 1
    assert len(experiment(tmp_path.name, tmp_path.parent)) == 1


def test_the_folder_of_any_data_set_can_be_made(tmp_path, monkeypatch):
    """Of a name of 85 characters, which are 255 bytes; ~ is the home."""
    data_folder(tmp_path, "名" * 85).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert data_folder("~/runs", "digits") == tmp_path / "runs" / "digits"


def test_seeds_are_paired_and_one_seed_has_no_interval():
    a, b = {2: 5.0, 0: 1.0, 7: 100.0}, {0: 0.0, 2: 4.0, 9: -100.0}
    assert paired(a, b)[:3] == (1.0, 1.0, 1.0)
    one = paired({0: 70.0}, {0: 79.0})
    assert str(one) == "-9.00 (one seed: no interval)" and not one.clear
    with pytest.raises(CourseError, match="no seed in both"):
        paired({0: 1.0}, {1: 1.0})


def test_an_experiment_is_read_by_arm_and_seed(tmp_path):
    for seed, figures in ((0, {"accuracy": 80.0}), (1, {})):
        record = {"arm": "k = 2", "settings": {"seed": seed}, "figures": figures}
        path = tmp_path / "toy" / f"k-2-seed{seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record | {"diverged": not figures}))
    records = experiment("toy", tmp_path)
    assert by_seed(records, "k = 2", "accuracy") == {0: 80.0}  # seed 1 diverged
    assert by_seed(records, "another", "accuracy") == {}
    with pytest.raises(CourseError, match="no experiment 'other'.*; there are: toy"):
        experiment("other", tmp_path)


def test_mean_and_deviation():
    assert mean_std([80.0, 82.0]) == "81.00 ± 1.41" and mean_std([80.0]) == "80.00"
