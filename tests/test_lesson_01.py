"""Notebook 01: exercises that check themselves, folded answers, findings a record can refute."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from notebook_tools import NOTEBOOKS
from torch import nn

from normcourse import default_settings, plot, results

LESSON = NOTEBOOKS / "01_batch_norm.ipynb"
CELLS = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def code_after(heading, until):
    """The code cells from one heading to another; none that draws."""
    texts = [source(cell) if cell["cell_type"] == "markdown" else "" for cell in CELLS]
    (start,) = [k for k, text in enumerate(texts) if text.startswith(heading)]
    (end,) = [k for k, text in enumerate(texts) if text.startswith(until)]
    cells = [source(cell) for cell in CELLS[start:end] if cell["cell_type"] == "code"]
    return [cell for cell in cells if "plot.show" not in cell]


IMPORTS = next(source(cell) for cell in CELLS if source(cell).startswith("import copy"))


def run(cells, **names):
    """All names after the imports and these cells."""
    names |= {"on_cifar10": True, "as_published": True, "settings": default_settings(norm="bn")}
    for cell in [IMPORTS, *cells]:
        exec(compile(cell, "notebook 01", "exec"), names)
    return names


# --- folding --------------------------------------------------------------------------------------


def test_what_is_folded_is_opened_and_closed():
    for cell in CELLS:
        if cell["cell_type"] == "markdown":
            assert source(cell).count("<details>") == source(cell).count("\n</details>")


def test_published_runs_are_drawn_beside_a_run_on_their_own_images_alone(monkeypatch):
    (cell,) = [source(each) for each in CELLS if "\nrecords = [record]" in source(each)]
    monkeypatch.setattr(plot, "show", lambda figure, alt: pyplot.close(figure))
    _, ours = results.published(default_settings(norm="bn"))
    for record, drawn in ((ours, 3), (ours | {"data": "own"}, 1), (ours | {"copy": "own"}, 1)):
        assert len(run([cell], record=record)["records"]) == drawn


# --- the exercises --------------------------------------------------------------------------------

EXERCISES = []  # each exercise stands at the end of its section
for each in CELLS:
    if re.search(r"(right|answer)_\d|# your code", source(each)) and each["cell_type"] == "code":
        EXERCISES.append(source(each))
FUNCTIONS = {2: "freeze", 4: "bias_of_folded", 5: "variance_of_both"}
NUMBERS = {1: 128, 3: 6.61}


@pytest.fixture(scope="module")
def lesson():
    return run(EXERCISES)


def check_cell(exercise):
    (cell,) = [cell for cell in EXERCISES if f'print("exercise {exercise}:"' in cell]
    return cell


@pytest.fixture
def say(lesson, capsys):
    """A function that gives an exercise an answer, and returns what its check says."""

    def answer(exercise, given):
        capsys.readouterr()
        name = FUNCTIONS.get(exercise, f"answer_{exercise}")
        exec(compile(check_cell(exercise), "check", "exec"), lesson | {name: given})
        return capsys.readouterr().out.removeprefix(f"exercise {exercise}: ").strip()

    return answer


def test_the_checks_are_short_and_what_they_know_is_folded():
    for exercise in range(1, 6):
        assert len(check_cell(exercise).splitlines()) <= 2
    for cell in CELLS:
        knows = re.search(r"^(def )?(right|others)_\d", source(cell), re.M)
        if cell["cell_type"] == "code" and knows:
            assert source(cell).startswith("# skip: this cell only checks")


def test_without_an_answer_an_exercise_is_open(say, lesson):
    for exercise, name in FUNCTIONS.items():
        assert say(exercise, lesson[name]) == "open"
    for exercise in NUMBERS:
        assert say(exercise, None) == "open"


def test_the_solutions_solve(say):
    text = "\n".join(source(cell) for cell in CELLS if cell["cell_type"] == "markdown")
    found = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, {"nn": nn}, found)
    for exercise, name in FUNCTIONS.items():
        assert say(exercise, found[name]) == "solved"


@pytest.mark.parametrize("exercise", NUMBERS)
def test_a_number_is_accepted_in_any_form(say, exercise):
    right = NUMBERS[exercise]
    for form in (float, np.float32, np.array, torch.tensor, lambda x: torch.tensor(x).double()):
        assert say(exercise, form(right)) == "solved"


NO_NUMBERS = ["128", b"4", {}, {1}, [None], ["x"], object(), print, 1j, float("nan"), [1.0, 2.0]]
NO_NUMBERS += [[[1.0], [2.0, 3.0]], [], (), True, np.array(["x"]), np.zeros(3), -1, nn.ReLU(), nn]


@pytest.mark.parametrize("exercise", [*NUMBERS, *FUNCTIONS])
def test_anything_else_is_refused_without_a_traceback(say, exercise):
    for answer in NO_NUMBERS:
        given = answer if exercise in NUMBERS else lambda *_, answer=answer: answer
        assert say(exercise, given).startswith("not yet: "), answer


def test_wrong_numbers_are_refused_by_name(say):
    for wrong, name in ((64, "one image"), (152, "number of means"), (9728, "Layer Norm")):
        assert name in say(1, wrong)
    assert "not yet: off by" in say(1, 127)
    assert "precise statistics" in say(3, 70 / 3) and "Keras" in say(3, 37.89)
    assert "last batch" in say(3, 40) and "starts at 0" in say(3, 13.9)
    assert "not yet: off by" in say(3, 6.5)


def batch_norms(change):
    """A freeze that changes every Batch Norm."""

    def freeze(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)
        return model

    return freeze


def children_alone(model):
    for module in model.children():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def a_copy(model):
    return batch_norms(lambda norm: norm.eval().requires_grad_(False))(copy.deepcopy(model))


def test_exercise_2(say):
    assert say(2, a_copy) == "solved"
    assert "nothing is frozen" in say(2, lambda model: model)
    assert "γ and β still learn" in say(2, batch_norms(nn.Module.eval))
    assert "statistics move" in say(2, batch_norms(lambda norm: norm.requires_grad_(False)))
    assert "convolutions must learn" in say(2, lambda model: model.requires_grad_(False).eval())
    assert "with a block in a block" in say(2, children_alone)
    assert "not yet" in say(2, lambda model: nn.Sequential())

    def momentum_0(norm):
        norm.requires_grad_(False).momentum = 0.0

    assert "the batch still normalizes" in say(2, batch_norms(momentum_0))


@pytest.mark.parametrize("change", [nn.Module.eval, lambda model: model.requires_grad_(False)])
def test_exercise_2_names_a_network_that_is_not_returned(say, change):
    def freeze(model):
        change(model)

    assert "you returned None" in say(2, freeze)


def test_an_exercise_stands_at_the_end_of_its_section():
    texts = [source(cell) for cell in CELLS if cell["cell_type"] == "markdown"]
    found, section = {}, ""
    for text in texts:
        if heading := re.match(r"## (\d+|\w+)", text):
            section = heading[1]
        if exercise := re.match(r"\*\*Exercise (\d)\.", text):
            found[exercise[1]] = section
    assert found == {"1": "1", "2": "8", "3": "10", "4": "11", "5": "12"}


FORMS = [lambda y: y, torch.Tensor.double, torch.Tensor.numpy, torch.Tensor.tolist]
FORMS += [lambda y: y.clone().requires_grad_()]
CHANGES = [lambda y: 1.05 * y, lambda y: y + 0.05, lambda y: -y, torch.zeros_like, lambda y: y[:2]]
CHANGES += [lambda y: y[None], str, lambda y: y * torch.nan, lambda y: y.flip(0)]


@pytest.mark.parametrize("exercise", [4, 5])
def test_a_tensor_is_accepted_in_any_form_but_not_another_one(say, lesson, exercise):
    right = lesson[f"right_{exercise}"]
    for form in FORMS:
        assert say(exercise, lambda *given, form=form: form(right(*given))) == "solved"
    for k, change in enumerate(CHANGES):
        said = say(exercise, lambda *given, change=change: change(right(*given)))
        assert said.startswith("not yet: "), k


@pytest.mark.parametrize("exercise", [4, 5])
def test_every_wrong_function_is_named(say, lesson, exercise):
    others = lesson[f"others_{exercise}"]
    assert len(others) >= 4
    for name, other in others.items():
        assert say(exercise, other) == f"not yet: this is {name}"


def test_an_answer_for_the_first_batch_alone_is_refused(say, lesson):
    centre = lesson["others_4"]["the centre of each filter alone"]
    right = lesson["right_4"]
    said = say(4, lambda *given: (right if given[2].shape[2] == 3 else lambda *_: 0)(*given))
    assert "right on the first batch; with filters of 1 x 1" in said
    assert "not yet" in say(4, centre)


# --- what the records say -------------------------------------------------------------------------

RATES = code_after("### 9.3", "### 9.4")
READS = "# skip: this cell only reads the records"
LAG = RATES + code_after("### 14.6", "## 15")
DESIGNS = code_after("## 13", "## 14")
FEW = code_after("## 10 ", "### 10.1")
FEW = FEW[next(k for k, cell in enumerate(FEW) if cell.startswith(READS)) :]
FEW += code_after("### 14.4", "### 14.5")


@pytest.fixture
def tell(monkeypatch):
    """Runs the cells that tell a finding, with the records changed in place."""

    def tell(cells, experiment, change):
        records = copy.deepcopy(results.experiment(experiment))
        changed = {experiment: change(records) or records}
        monkeypatch.setattr(results, "experiment", lambda name: changed.get(name) or read(name))
        run(cells)

    read = results.experiment
    yield tell
    assert read is not results.experiment


def setting(arm, figure, value, seeds=range(9)):
    """A change of the records: a figure of an arm."""

    def change(records):
        chosen = [r for r in records if r["arm"] == arm and r["settings"]["seed"] in seeds]
        assert chosen
        for record in chosen:
            record["figures"][figure] = value

    return change


def diverging(arm, history=()):
    def change(records):
        for record in records:
            if record["arm"] == arm:
                record.update(diverged=True, figures={}, history=list(history))

    return change


ACCURACY, FIVE = "val_accuracy", "{}, five epochs, rate 0.01"
RATES_REFUTED = {
    "BN not clearly better at 0.01": setting("Batch Norm, rate 0.01", ACCURACY, 42.5),
    "BN clearly better at 0.003": setting("no norm, rate 0.003", ACCURACY, 30.0),
    "BN worse at 0.001": setting("Batch Norm, rate 0.001", ACCURACY, 20.0),
    "BN clearly better in five epochs at 0.01": setting(FIVE.format("no norm"), ACCURACY, 50.0),
    "the rate is worth little to BN": setting(FIVE.format("Batch Norm"), ACCURACY, 75.0),
    "BN best elsewhere": setting("Batch Norm, rate 0.1", ACCURACY, 50.0),
    "BN does not train at 1": setting("Batch Norm, rate 1", ACCURACY, 12.0, [0]),
    "BN diverges at 1": diverging("Batch Norm, rate 1"),
    "no norm best at 0.003": setting("no norm, rate 0.003", ACCURACY, 60.0),
    "all diverge at 0.03": diverging("no norm, rate 0.03"),
    "a later divergence": diverging("no norm, rate 1", [{}]),
    "BN far ahead, each at its best": setting("no norm, rate 0.01", ACCURACY, 36.0),
    "default weights learn": setting("no norm, rate 0.01, default initialization", ACCURACY, 30.0),
    "the control learns": setting("no norm, rate 1e-06", ACCURACY, 30.0),
    "a warm-up does not help": diverging("no norm, five epochs, rate 0.1"),
    "the lead at 0.01 is known": setting(FIVE.format("no norm"), ACCURACY, 61.4),
    "no norm is as good": setting("no norm, five epochs, rate 0.1", ACCURACY, 78.5),
    "no norm is far behind": setting("no norm, five epochs, rate 0.1", ACCURACY, 62.0),
    "a record is missing": lambda records: records[1:],
}


def after_epoch(arm, epoch, figure, points):
    """A change of the records: a figure of an arm after an epoch."""

    def change(records):
        for record in records:
            if record["arm"] == arm:
                record["history"][epoch - 1][figure] += points

    return change


PRECISE = "precise_accuracy"
LAG_REFUTED = {
    "nothing gained after epoch 1": after_epoch("Batch Norm", 1, PRECISE, -5),
    "little gained after epoch 2": after_epoch("Batch Norm", 2, PRECISE, -5),
    "points gained at the end": after_epoch("Batch Norm", 20, PRECISE, 1),
    "a point lost at the end": after_epoch("Batch Norm", 20, PRECISE, -1),
    "precise statistics fall, too": after_epoch("Batch Norm", 10, PRECISE, -6),
    "Group Norm leads early": after_epoch("Group Norm", 5, "test_accuracy", 3),
    "Group Norm trails early": after_epoch("Group Norm", 2, "test_accuracy", -9),
    "no norm is as good as Batch Norm": setting("no norm", "test_accuracy", 87.1),
    "He's weights help": setting("no norm, He", "test_accuracy", 86.9),
}


def disagreeing(records):
    """The cost of k = 2 has another sign in each seed."""
    for record in records:
        if record["arm"] == "k = 2":
            record["figures"]["running"] += (0, 5, -5)[record["settings"]["seed"]]


FEW_REFUTED = {
    "nothing is lost": setting("k = 2", "running", 86.0),
    "one point is lost": setting("k = 2", "running", 84.9),
    "more is lost than by Wu & He": setting("k = 2", "running", 74.0),
    "frozen statistics win back nothing": setting("k = 2, frozen at the end", "running", 83.0),
    "frozen statistics win back 1.5": setting("k = 2, frozen at the end", "running", 84.5),
    "with precise statistics k = 2 loses little": setting("k = 128", "precise", 84.5),
    "precise statistics win back all": setting("k = 2", "precise", 85.8),
    "frozen ones fit any statistics": setting("k = 2, frozen at the end", "precise", 85.3),
    "precise statistics help the frozen": setting("k = 2, frozen at the end", "precise", 84.8),
    "8 lose nothing": setting("k = 8", "running", 86.2),
    "4 lose less than 8": setting("k = 4", "running", 85.8),
    "32 gain": setting("k = 32", "running", 87.0),
    "without noise 32 gain nothing": setting("k = 32", "batch", 86.2),
    "32 lose, too": setting("k = 32", "running", 83.0),
    "the noise regularizes": setting("k = 2", "train", 90.0),
    "seeds disagree": disagreeing,
    "the modes do not matter": setting("k = 2", "batch", 85.4),
    "without noise k = 2 gains": setting("k = 2", "batch", 82.0),
    "without noise k = 8 does not gain": setting("k = 8", "batch", 85.2),
    "as good as Group Norm": setting("Group Norm", "running", 83.2),
}


DESIGNS_REFUTED = {
    "as good as reported": setting("LN, m = 2, as published", "test_accuracy", 75.9),
    "far below the report": setting("GN, m = 2, as published", "test_accuracy", 65.0),
    "another end than their code's": setting("BN, m = 1, as published", "test_accuracy", 71.8),
    "our recipe is worth little": setting("LN, m = 2, the course's recipe", "test_accuracy", 75.0),
    "a seed below 70 %": setting("BN, m = 1, the course's recipe", "test_accuracy", 69.9, [1]),
}


# what tells an experiment, its name, and the outcomes that its text excludes
TOLD = [
    (RATES, "larger_rates", RATES_REFUTED),
    (LAG, "main_table", LAG_REFUTED),
    (FEW, "shared_statistics", FEW_REFUTED),
    (DESIGNS, "published_designs", DESIGNS_REFUTED),
]
ALTERED = {
    f"{name}: {outcome}": (cells, name, change)
    for cells, name, refuted in TOLD
    for outcome, change in refuted.items()
}


@pytest.mark.parametrize(("cells", "name"), [told[:2] for told in TOLD])
def test_an_experiment_is_told_as_recorded(tell, cells, name):
    tell(cells, name, lambda records: None)


@pytest.mark.parametrize(("cells", "name", "change"), ALTERED.values(), ids=ALTERED)
def test_another_outcome_would_refute_the_text(tell, cells, name, change):
    with pytest.raises(AssertionError):
        tell(cells, name, change)


def test_no_rate_of_the_search_beat_the_middle_one_by_half_a_point():
    reached = {}
    for path in (NOTEBOOKS.parent / "experiments" / "lr_search").glob("normnet-*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = record["settings"]
        assert (settings["epochs"], settings["seed"], settings["validate"]) == (3, 0, True)
        by_rate = reached.setdefault(settings["norm"], {})
        by_rate[settings["lr"]] = record["history"][-1]["val_accuracy"]
    for norm in ("bn", "ln", "gn"):
        assert reached[norm].keys() == {0.015, 0.03, 0.06}
        assert max(reached[norm].values()) < reached[norm][0.03] + 0.5


def test_no_receptive_fields_and_no_optimizer_are_taught():
    code = "\n".join(source(cell) for cell in CELLS if cell["cell_type"] == "code")
    assert "receptive_fields" not in code and "Muon" not in code
