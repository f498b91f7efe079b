"""Notebook 02: the checks of its exercises, its folded answers, and findings that can fail."""

import copy
import json
import re
from contextlib import nullcontext

import IPython.display
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from notebook_tools import NOTEBOOKS, code_cells
from torch import nn
from torch.nn import functional as F

import normcourse
from normcourse import plot, results
from normcourse.train import build

LESSON = NOTEBOOKS / "02_layer_norm.ipynb"
CELLS = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]


def untrained(settings, data, retrain=None):
    """In place of ``results.trained``: no training, the published record."""
    torch.manual_seed(settings.seed)
    return build(settings, len(data.classes)).eval(), results.published(settings)[1]


def names_after(cells, data):
    """All names after some cells have run: no training, no picture."""
    names = {}
    pyplot.switch_backend("agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normcourse, "load_data", lambda: data)
        patch.setattr(results, "trained", untrained)
        patch.setattr(plot, "show", lambda figure, alt, photo=False: pyplot.close(figure))
        patch.setattr(IPython.display, "display", lambda *_: None)
        for cell in cells:
            exec(compile(cell, "notebook 02", "exec"), names)
    return names


@pytest.fixture(scope="module")
def lesson(digits):
    """All names of the notebook after it has run, on digits, with networks that know nothing."""
    return names_after(code_cells(LESSON), digits)


def core():
    """The code cells a reader runs who leaves out everything marked *Going deeper*."""
    deeper, kept = False, []
    for cell in CELLS:
        heading = re.match(r"#+ .*", "".join(cell["source"]))
        if cell["cell_type"] == "markdown" and heading:
            deeper = "*Going deeper" in heading.group()
        if cell["cell_type"] == "code" and not deeper:
            kept.append("".join(cell["source"]))
    return kept


def test_the_core_needs_nothing_that_goes_deeper(digits):
    assert len(core()) < len(code_cells(LESSON)) - 20
    names_after(core(), digits)


def test_an_experiment_on_the_axes_gets_its_section_once_it_is_recorded():
    recorded = list((results.EXPERIMENTS / "layer_norm_axes").glob("*.json"))
    assert not recorded or "layer_norm_axes" in LESSON.read_text(encoding="utf-8")


# --- findings -------------------------------------------------------------------------------------


def cells_between(first, last):
    """The code cells from the one with this text to the last one with that; none that draws."""
    cells = code_cells(LESSON)
    start = next(k for k, cell in enumerate(cells) if first in cell)
    end = max(k for k, cell in enumerate(cells) if last in cell)
    return [cell for cell in cells[start : end + 1] if "this cell only draws" not in cell]


def changed(records, arm, figure, by, seed=None):
    """Copies of an experiment's records, a figure of an arm higher ``by``; None: it diverged."""
    records = copy.deepcopy(records)
    found = [r for r in records if r["arm"] == arm and seed in (None, r["settings"]["seed"])]
    assert found
    for record in found:
        if by is None:
            record.update(diverged=True, figures={})
        elif record["figures"]:
            record["figures"][figure] += by
    return records


def run(lesson, cells, monkeypatch, name, records, of=()):
    """Run cells again, with these records in place of those that ``results.name(*of)`` returns."""
    names, real = dict(lesson), getattr(results, name)
    monkeypatch.setattr(results, name, lambda *asked: records if asked == of else real(*asked))
    monkeypatch.setattr(plot, "show", lambda figure, alt, photo=False: pyplot.close(figure))
    for cell in cells:
        exec(compile(cell, "notebook 02", "exec"), names)


def tell(lesson, monkeypatch, experiment, records):
    """Run the cells that tell an experiment again, with these records of it."""
    cells = cells_between(*ENDS[experiment])
    run(lesson, cells, monkeypatch, "experiment", records, (experiment,))


SEQUENCES = 'results.experiment("sequences")', "mean_at = {"
TRANSFORMER = 'results.experiment("transformer")', "mean_size = {"
AXES = 'results.experiment("layer_norm_axes")', "axes_apart.values()"
DESIGNS = 'results.experiment("published_designs")', "means = {"
OTHERWISE = [
    ("layer_norm_axes", "per pixel", "test_accuracy", 1),
    ("layer_norm_axes", "per pixel", "test_accuracy", -1),
    ("layer_norm_axes", "per pixel", "train_accuracy", 2),
    ("published_designs", "LN, m = 2, the course's recipe", "test_accuracy", 7),
    ("published_designs", "LN, m = 2, the course's recipe", "test_accuracy", -7),
    ("published_designs", "LN, m = 1, as published", "test_accuracy", 12),
    ("sequences", "Layer Norm, batch 32, rate 0.03", "known", -5),
    ("sequences", "RMSNorm, batch 8, rate 0.03", "longer", -1),
    ("sequences", "Batch Norm, batch 32, rate 0.1", "longer", 4.4),
    ("sequences", "Batch Norm, batch 32, rate 0.1", "longer, precise", -10),
    ("sequences", "Batch Norm, batch 32, rate 0.01", "longer, precise", -10),
    ("sequences", "Batch Norm, batch 32, rate 0.3", "longer, precise", -5),
    ("sequences", "Batch Norm, batch 8, rate 0.03", "known", 15),
    ("sequences", "Batch Norm, batch 8, rate 0.1", "known", 20),
    ("sequences", "Batch Norm, batch 32, rate 0.3", "known", 60),
    ("sequences", "no norm, batch 8, rate 0.03", "known", 11),
    ("sequences", "no norm, learned gain, batch 8, rate 0.03", "known", -11),
    ("sequences", "no norm, learned gain, batch 32, rate 0.1", "known", 40),
    ("sequences", "Layer Norm, batch 32, rate 0.03", "known", -0.02),
    ("sequences", "Layer Norm, batch 32, rate 0.3", "known", -20),
    ("sequences", "Batch Norm, batch 8, rate 0.3", "known", 22),
    ("sequences", "RMSNorm, batch 8, rate 0.3", "known", -0.4),
    ("sequences", "RMSNorm, batch 32, rate 0.3", "known", 0.4),
    ("sequences", "Batch Norm, batch 32, rate 0.3", "known", -5),
    ("sequences", "Batch Norm, batch 32, rate 0.03", "validation loss", -1),
    ("sequences", "Batch Norm, batch 8, rate 0.3", "known", 1),
    ("sequences", "Batch Norm, batch 8, rate 0.03", "known, precise", 2),
    ("sequences", "Batch Norm, batch 32, rate 0.1", "longer, precise", 2),
    ("transformer", "post-norm, rate 0.004", "validation loss", -1.5),
    ("transformer", "post-norm, rate 0.004", "validation loss", None),
    ("transformer", "post-norm with warm-up, rate 0.004", "validation loss", 0.1),
    ("transformer", "post-norm with warm-up, rate 0.002", "validation loss", 0.03),
    ("transformer", "post-norm with warm-up, rate 0.008", "validation loss", 1.7),
    ("transformer", "post-norm with warm-up, rate 0.008", "validation loss", 0.05),
    ("transformer", "post-norm with warm-up, rate 0.016", "validation loss", -0.1),
    ("transformer", "pre-norm, rate 0.004", "validation loss", -0.05),
    ("transformer", "pre-norm, rate 0.008", "validation loss", 0.1),
    ("transformer", "pre-norm, rate 0.016", "validation loss", None),
    ("transformer", "pre-RMSNorm, rate 0.008", "validation loss", 0.1),
    ("transformer", "pre-RMSNorm, rate 0.008", "validation loss", -0.1),
    ("transformer", "none, rate 0.001", "validation loss", -0.5),
    ("transformer", "none, rate 0.004", "validation loss", -1),
    ("transformer", "none, torch's weights, rate 0.002", "validation loss", 0.3),
    ("transformer", "none, torch's weights, rate 0.004", "validation loss", -0.3),
    ("transformer", "none, torch's weights, rate 0.008", "validation loss", -0.2),
    ("transformer", "pre-norm, torch's weights, rate 0.008", "validation loss", -0.1),
    ("transformer", "post-norm, rate 0.001", "gradient 8", 1),
    ("transformer", "pre-norm, rate 0.008", "gradient 8", 1),
    ("transformer", "none, torch's weights, rate 0.008", "gradient 7", -2),
]
ENDS = {"sequences": SEQUENCES, "transformer": TRANSFORMER, "layer_norm_axes": AXES}
ENDS["published_designs"] = DESIGNS


@pytest.mark.parametrize("experiment", ENDS)
def test_the_findings_hold_for_the_records(lesson, monkeypatch, experiment):
    tell(lesson, monkeypatch, experiment, results.experiment(experiment))


@pytest.mark.parametrize("change", OTHERWISE, ids=str)
def test_a_finding_fails_if_the_records_say_otherwise(lesson, monkeypatch, change):
    experiment, *what = change
    records = changed(results.experiment(experiment), *what)
    with pytest.raises(AssertionError):
        tell(lesson, monkeypatch, experiment, records)


def test_the_schedule_is_as_the_lesson_says(experiments):
    import transformer

    def share(warm_up):
        return [transformer.share(step, warm_up) for step in range(transformer.STEPS)]

    assert transformer.STEPS == 600 and transformer.WARM_UP == 100
    assert share(False) == [1 - step / 600 for step in range(600)]
    assert max(share(True)) == pytest.approx(5 / 6, rel=0.01)


@pytest.mark.parametrize("experiment", ENDS)
def test_one_seed_that_says_otherwise_is_enough(lesson, monkeypatch, experiment):
    arm, figure, by = {
        "sequences": ("Batch Norm, batch 32, rate 0.1", "longer", -30),
        "transformer": ("pre-norm, rate 0.008", "validation loss", 0.3),
        "layer_norm_axes": ("per pixel", "test_accuracy", 3),
        "published_designs": ("LN, m = 2, the course's recipe", "test_accuracy", 9),
    }[experiment]
    records = changed(results.experiment(experiment), arm, figure, by, seed=0)
    with pytest.raises(AssertionError):
        tell(lesson, monkeypatch, experiment, records)


def test_a_training_loss_that_falls_in_small_batches_is_seen(lesson, monkeypatch):
    records = copy.deepcopy(results.experiment("sequences"))
    for record in records:
        if record["arm"] == "Batch Norm, batch 8, rate 0.03":
            record["history"][-1]["train_loss"] /= 10
    with pytest.raises(AssertionError):
        tell(lesson, monkeypatch, "sequences", records)


@pytest.mark.parametrize("held", ["precision", "device", "batch_size"])
def test_layers_that_differ_in_more_than_their_axes_are_not_compared(lesson, monkeypatch, held):
    records = copy.deepcopy(results.experiment("layer_norm_axes"))
    place = records[0] if held in records[0] else records[0]["settings"]
    assert held in place
    place[held] = "another"
    with pytest.raises(AssertionError):
        tell(lesson, monkeypatch, "layer_norm_axes", records)


def cell_with(text):
    (cell,) = cells_between(text, text)
    return cell


PRICE = ("final = {}", "ended = {", 'assert against["bn"].clear')


@pytest.mark.parametrize(("net", "norm", "by"), [("normnet", "bn", 5), ("normnet", "gn", -5)])
def test_the_price_fails_if_the_published_runs_say_otherwise(lesson, monkeypatch, net, norm, by):
    records = results.published_records()
    cells = [cell_with("main = []"), *map(cell_with, PRICE)]
    run(lesson, cells, monkeypatch, "published_records", records)
    for record in records.values():
        if (record["settings"]["net"], record["settings"]["norm"]) == (net, norm):
            record["history"][-1]["test_accuracy"] += by
    with pytest.raises(AssertionError):
        run(lesson, cells, monkeypatch, "published_records", records)


def test_a_norm_with_another_rate_is_seen(lesson):
    names = lesson | {"main": copy.deepcopy(lesson["main"])}
    names["main"][0]["settings"]["lr"] = 0.06
    with pytest.raises(AssertionError):
        exec(compile(cell_with('["lr"] for run in main} =='), "notebook 02", "exec"), names)


@pytest.mark.parametrize("gap", [(86, 86.5, 87), (83, 84, 85)])
def test_the_price_against_batch_norm_fails_with_another_interval(lesson, gap):
    of_bn = results.paired({0: 86, 1: 86.4, 2: 86.9}, dict(enumerate(gap)))
    names = lesson | {"against": {"gn": lesson["against"]["gn"], "bn": of_bn}}
    with pytest.raises(AssertionError):
        exec(compile(cell_with('assert against["bn"].clear'), "notebook 02", "exec"), names)


@pytest.mark.parametrize("gn", [None, (87.2, 87.1, 87.2, 87.1, 86.8), (86.7, 86.6, 86.4, 86.7, 87)])
def test_pairs_that_rise_and_fall_in_another_way_are_seen(lesson, gn):
    ended = lesson["ended"] | ({"gn": dict(enumerate(gn))} if gn else {})
    against = {norm: results.paired(ended["ln"], ended[norm]) for norm in ("bn", "gn")}
    names = lesson | {"ended": ended, "against": against}
    exec(compile(cell_with("correlation, unpaired = {}"), "notebook 02", "exec"), names)
    with pytest.raises(AssertionError) if gn else nullcontext():
        exec(compile(cell_with("== [-0.1, 0.6]"), "notebook 02", "exec"), names)


@pytest.mark.parametrize(("part", "by"), [("test", 4), ("train", -4)])
def test_batch_norms_curve_that_says_otherwise_is_seen(lesson, monkeypatch, part, by):
    records = results.published_records()
    cells = [cell_with(text) for text in ("main = []", "seed_0 = {}")]
    run(lesson, cells, monkeypatch, "published_records", records)
    for record in records.values():
        if record["settings"]["norm"] == "bn":
            for epoch in record["history"][:-1]:
                epoch[f"{part}_accuracy"] += by
    with pytest.raises(AssertionError):
        run(lesson, cells, monkeypatch, "published_records", records)


def test_published_runs_on_fewer_test_images_are_seen(lesson):
    names = lesson | {"main": copy.deepcopy(lesson["main"])}
    names["main"][0]["confusion"][0][0] -= 1
    with pytest.raises(AssertionError):
        exec(compile(cell_with('map(sum, run["confusion"])'), "notebook 02", "exec"), names)


def test_mistakes_that_only_one_norm_makes_are_seen(lesson, monkeypatch):
    records = results.published_records()
    cells = [cell_with(text) for text in ("main = []", "counts = {}", "[202, 163, 195]")]
    run(lesson, cells, monkeypatch, "published_records", records)
    for record in records.values():
        if record["settings"]["norm"] == "bn":
            record["confusion"] = [row[::-1] for row in record["confusion"]]
    with pytest.raises(AssertionError):
        run(lesson, cells, monkeypatch, "published_records", records)


def test_a_norm_that_is_slower_with_one_seed_is_seen(lesson, monkeypatch):
    records = results.published_records()
    cells = [cell_with(text) for text in ("main = []", "passed = {}", 'passed["gn"][seed]')]
    run(lesson, cells, monkeypatch, "published_records", records)
    for record in records.values():
        if (record["settings"]["norm"], record["settings"]["seed"]) == ("ln", 1):
            for epoch in record["history"][:10]:
                epoch["test_accuracy"] = 50
    with pytest.raises(AssertionError):
        run(lesson, cells, monkeypatch, "published_records", records)


def test_a_norm_that_learns_faster_than_batch_norm_is_seen(lesson, monkeypatch):
    records = results.published_records()
    for record in records.values():
        if (record["settings"]["norm"], record["settings"]["seed"]) == ("gn", 1):
            for epoch in record["history"][:3]:
                epoch["train_accuracy"] += 10
    cells = [cell_with(text) for text in ("main = []", "passed = {}", 'passed["gn"][seed]')]
    with pytest.raises(AssertionError):
        run(lesson, cells, monkeypatch, "published_records", records)


def test_batch_norm_in_evaluation_that_sees_the_batch_is_noticed(lesson):
    (way,) = (words for words in lesson["comparisons"] if words.startswith("evaluation, one"))
    cell = cell_with("< 1e-2 < of_training")
    exec(compile(cell, "notebook 02", "exec"), dict(lesson))
    names = lesson | {"moved": lesson["moved"] | {("BN", way): 1}}
    with pytest.raises(AssertionError):
        exec(compile(cell, "notebook 02", "exec"), names)


@pytest.mark.parametrize(("unit", "shown"), [("nats", "+0.004 ["), ("points", "+0.00 [")])
def test_nats_have_three_decimals(lesson, capsys, unit, shown):
    difference = results.paired({0: 0.003, 1: 0.004, 2: 0.005}, dict.fromkeys(range(3), 0))
    lesson["compare"]("A", "B", difference, unit)
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("drawn", [[0.7] * 24, [1.3] * 24])
def test_first_gradients_that_agree_in_all_draws_are_seen(lesson, drawn):
    with pytest.raises(AssertionError):
        exec(
            compile(cell_with("for ratio in drawn) <= 18"), "notebook 02", "exec"),
            lesson | {"drawn": drawn},
        )


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((1, 2, 3), "not clear"),
        ((1, 1.1, 0.9), "clear: A is better"),
        ((-1, -1.1, -1.2), "clear: B is better"),
    ],
)
def test_the_winner_of_a_clear_difference_is_named(lesson, ends, said):
    difference = results.paired(dict(enumerate(ends)), dict.fromkeys(range(3), 0))
    assert lesson["winner"]("A", "B", difference) == said


def test_a_border_under_one_norm_only_is_seen(lesson):
    names = dict(lesson, on_cifar10=True, RETRAIN=None, share={"LN": (11, 27), "BN": (11, 28)})
    cell = cell_with("in share.values()")
    exec(compile(cell, "notebook 02", "exec"), names)
    names["share"]["BN"] = 25, 28
    with pytest.raises(AssertionError):
        exec(compile(cell, "notebook 02", "exec"), names)


# --- exercises ------------------------------------------------------------------------------------

CHECKS = [cell for cell in code_cells(LESSON) if re.search(r'^ *print\(f?"exercise ', cell, re.M)]


@pytest.fixture
def say(lesson, capsys):
    """A function that gives an exercise some answers, and returns what its check says."""

    def answer(exercise, **answers):
        capsys.readouterr()
        exec(compile(CHECKS[exercise - 1], f"exercise {exercise}", "exec"), lesson | answers)
        return capsys.readouterr().out

    return answer


def solution(exercise):
    """The code of a folded solution."""
    texts = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    folded = [text for text in texts if text.startswith("<details><summary>Solution</summary>")]
    return re.search(r"```python\n(.*?)```", folded[exercise - 1], re.S).group(1)


def test_check_cells_are_short_and_the_answers_are_folded():
    assert len(CHECKS) == 5
    for cell in CHECKS:
        assert len(cell.splitlines()) <= 2
    for cell in CELLS:
        if "It holds the answers" in "".join(cell["source"]):
            assert cell["metadata"]["jupyter"] == {"source_hidden": True}


@pytest.mark.parametrize("exercise", range(1, 6))
def test_an_exercise_is_open_at_first_and_its_solution_solves_it(lesson, say, exercise):
    lines = say(exercise).splitlines()
    assert lines and all(line.endswith(": open") for line in lines)
    names = dict(lesson)
    exec(solution(exercise), names)
    new = {name: value for name, value in names.items() if lesson.get(name) is not value}
    lines = say(exercise, **new).splitlines()
    assert lines and all(line.endswith(": solved") for line in lines)


NO_NUMBERS = ["1", b"1", {}, {1}, [None], ["x"], object(), print, 1j, float("nan"), [], True]
NO_NUMBERS += [[[1.0], [2.0, 3.0]], np.array(["x"]), np.zeros(3), torch.zeros(2, 2), -1]
NUMBERS = {1: ("answer_1", "right_1"), 5: ("answer_5", "right_5")}
FORMS = [lambda y: y, torch.Tensor.double, torch.Tensor.numpy, torch.Tensor.tolist]
FORMS += [lambda y: y.float().clone().requires_grad_()]


@pytest.mark.parametrize("exercise", NUMBERS)
def test_numbers_are_checked(lesson, say, exercise):
    name, right = NUMBERS[exercise]
    for form in FORMS:
        assert "solved" in say(exercise, **{name: form(lesson[right])})
    for answer in NO_NUMBERS:
        assert "not yet" in say(exercise, **{name: answer}), answer
    for what, other in lesson[f"OTHERS_{exercise}"].items():
        assert say(exercise, **{name: other}) == f"exercise {exercise}: not yet: this is {what}\n"


def test_numbers_may_be_rounded_as_the_exercise_says(lesson, say):
    for answer in ([1.34, 1], (1.34, 1.0), np.array([1.34, 1.0])):
        assert "solved" in say(1, answer_1=answer)
    for answer in ([1.3, 1], [1.34, 1.3], [1.34], [1, 1.34], 1.34):
        assert "not yet" in say(1, answer_1=answer)
    rounded = [round(number, 1) for number in lesson["right_5"].tolist()]
    assert "solved" in say(5, answer_5=rounded)
    for number in (0, 1):
        off = list(rounded)
        off[number] += 0.2
        assert "not yet" in say(5, answer_5=off)


FUNCTIONS = {
    2: ("layer_norm_per_channel", "group_norm_per_channel"),
    4: ("pre_rms_norm", "right_4"),
}


@pytest.mark.parametrize("exercise", FUNCTIONS)
def test_a_function_is_checked(lesson, say, exercise):
    name, right = FUNCTIONS[exercise]

    def returns(change):
        return say(exercise, **{name: lambda *given: change(lesson[right](*given))})

    for form in FORMS:
        assert "solved" in returns(lambda y, form=form: form(y.detach()))
    for answer in NO_NUMBERS:
        assert "not yet" in returns(lambda _, answer=answer: answer), answer
    for k, change in enumerate((torch.neg, lambda y: y[0], lambda y: y + 0.05, torch.zeros_like)):
        assert "not yet" in returns(change), k
    for what, other in lesson[f"OTHERS_{exercise}"].items():
        assert f"not yet: this is {what}\n" in say(exercise, **{name: other})


def rms(x, axis=-1, eps=1e-5):
    return x / (x.square().mean(axis, keepdim=True) + eps).sqrt()


def affine(x_hat, gamma, beta):
    return x_hat * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)


def over(axes, correction=0, eps=1e-5):
    """A norm by the mean and variance over axes, with gamma and beta per channel."""

    def norm(x, gamma, beta):
        var, mean = torch.var_mean(x, axes, correction=correction, keepdim=True)
        return affine((x - mean) / (var + eps).sqrt(), gamma, beta)

    return norm


WRONG = {
    2: {
        "unbiased": over((1, 2, 3), correction=1),
        "no eps": over((1, 2, 3), eps=0),
        "over the pixels": over((2, 3)),
        "over the channels": over(1),
        "over everything": over((0, 1, 2, 3)),
        "two groups": lambda x, g, b: F.group_norm(x, 2, g, b),
        "gamma and beta exchanged": lambda x, g, b: F.group_norm(x, 1, b, g),
    },
    4: {
        "no eps": lambda x, f, g: x + f(g * rms(x, eps=0)),
        "eps outside": lambda x, f, g: x + f(g * x / (x.square().mean(-1, True).sqrt() + 1e-5)),
        "the mean of the whole batch": lambda x, f, g: x + f(g * rms(x, (0, 1, 2))),
        "the sum of squares": lambda x, f, g: x + f(g * F.normalize(x, dim=-1)),
        "the sublayer twice": lambda x, f, g: x + f(f(g * rms(x))),
        "the input": lambda x, f, g: x,
    },
}


@pytest.mark.parametrize(
    ("exercise", "what"), [(exercise, what) for exercise in WRONG for what in WRONG[exercise]]
)
def test_another_function_is_refused(say, exercise, what):
    assert "not yet" in say(exercise, **{FUNCTIONS[exercise][0]: WRONG[exercise][what]})


def test_the_layers_of_torch_solve_the_exercises(say):
    def by_module(x, gamma, beta):
        layer = nn.GroupNorm(1, len(gamma))
        layer.load_state_dict({"weight": gamma, "bias": beta})
        return layer(x)

    assert "solved" in say(2, layer_norm_per_channel=by_module)
    if hasattr(F, "rms_norm"):  # since torch 2.4

        def by_function(x, sublayer, gamma):
            return x + sublayer(F.rms_norm(x, gamma.shape, gamma, 1e-5))

        assert "solved" in say(4, pre_rms_norm=by_function)


WORDS = {"undone_a": "both", "undone_b": "BN", "undone_c": "LN", "undone_d": "neither"}


def test_words_are_checked(say):
    assert say(3, **WORDS).count("solved") == 4
    assert (
        say(3, **{name: f" {word.upper()} " for name, word in WORDS.items()}).count("solved") == 4
    )
    for name, right in WORDS.items():
        for word in {"both", "BN", "LN", "neither"} - {right}:
            said = say(3, **WORDS | {name: word})
            assert said.count("solved") == 3 and said.count("not yet: try it") == 1
        for word in ("", "GN", 7, print, ["LN"], {}, torch.ones(2), np.ones(2), float("nan")):
            said = say(3, **WORDS | {name: word})
            assert said.count("solved") == 3 and said.count("not yet: answer with") == 1
