"""The layers of notebook 00, taken from it, against torch.nn; its figures and its exercises."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_checks import CHECKS, KINDS, check_equal, pair
from notebook_tools import FUNDAMENTALS, NOTEBOOKS, code_cells, definitions
from PIL import Image

from normcourse import CourseError, cube, plot
from normcourse.norm import AXES, NORMS, grouped, norm_layer, shared_set
from normcourse.plot import COLORS

DEFS = definitions()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_layer_equals_torch(check, kind):
    check(DEFS, kind)


IMAGES = [(1, 4, 3, 3), (5, 4, 1, 2)]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in KINDS for shape in IMAGES]
    + [("LayerNorm", shape) for shape in [(8, 6), (3, 4, 7), (2, 4, 3, 5, 2)]],
)
def test_a_batch_of_one_and_other_ranks(kind, shape):
    """Batch, Instance and Group Norm are written for images; Layer Norm takes any shape."""
    torch.manual_seed(0)
    ours, theirs = (layer.double() for layer in pair(DEFS, kind, shape))
    check_equal(ours, theirs, torch.randn(shape, dtype=torch.float64) + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_formats(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 3)
    check_equal(*pair(DEFS, kind, x.shape), x.to(memory_format=torch.channels_last))
    for view in (torch.randn(4, 6, 3, 5).transpose(2, 3), torch.randn(8, 6, 5, 6)[::2, :, :, ::2]):
        assert not view.is_contiguous()
        check_equal(*pair(DEFS, kind, view.shape), view)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    N=st.integers(1, 5),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(2, 5)),  # two positions: one has no variance
    seed=st.integers(0, 1000),
)
def test_shapes(kind, N, groups, per_group, size, seed):
    torch.manual_seed(seed)
    shape = (N, groups * per_group, *size)
    ours, theirs = (layer.double() for layer in pair(DEFS, kind, shape, groups))
    check_equal(ours, theirs, 3 * torch.randn(shape, dtype=torch.float64) - 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, training):
    torch.manual_seed(0)
    ours, _ = pair(DEFS, kind, (3, 4, 2, 2))
    ours.double().train(training)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        parameters = dict(zip(dict(ours.named_parameters()), values, strict=True))
        return torch.func.functional_call(ours, parameters, (x,))

    assert torch.autograd.gradcheck(forward, (x, *ours.parameters()))
    assert torch.autograd.gradgradcheck(forward, (x, *ours.parameters()))


def test_an_empty_batch_teaches_nothing():
    ours, theirs = pair(DEFS, "BatchNorm", (0, 4, 2, 2))
    check_equal(ours, theirs, torch.empty(0, 4, 2, 2))
    assert ours.running_mean.equal(torch.zeros(4)) and ours.running_var.equal(torch.ones(4))


def test_groups_that_cut_through_channels_are_refused():
    for layer in (DEFS.GroupNorm, torch.nn.GroupNorm):
        with pytest.raises(ValueError, match="4.*6|6.*4"):
            layer(4, 6)
    with pytest.raises(RuntimeError):
        DEFS.GroupNorm(4, 8)(torch.zeros(2, 6, 3, 3))


def test_one_value_per_channel_teaches_nothing():
    """PyTorch refuses it; ours, which is short, only keeps it out of the running averages."""
    ours, theirs = pair(DEFS, "BatchNorm", (1, 4, 1, 1))
    with pytest.raises(ValueError):
        theirs(torch.randn(1, 4, 1, 1))
    ours(torch.randn(1, 4, 1, 1))
    for layer in (ours, theirs):
        assert layer.running_mean.equal(torch.zeros(4)) and layer.running_var.equal(torch.ones(4))
    x = torch.randn(1, 4, 1, 1)  # in evaluation one value is enough
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_cube_sets_are_what_the_layers_average():
    """The drawn set of an entry is where the gradient of our layer's output can be non-zero."""
    torch.manual_seed(0)
    shape, entry = (3, 4, 2, 2), (1, 2, 0, 1)
    layers = {"bn": DEFS.BatchNorm(4), "ln": DEFS.LayerNorm(shape[1:])}
    layers |= {"in": DEFS.InstanceNorm(), "gn": DEFS.GroupNorm(2, 4)}
    assert layers.keys() == AXES.keys()
    for norm, layer in layers.items():
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        layer.double()(x)[entry].backward()
        assert (x.grad.abs() > 1e-9).equal(shared_set(AXES[norm], shape, 2, entry)), norm


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(CourseError, match="num_groups=4 does not divide 6 .*: 1, 2, 3, 6$"):
        grouped(torch.zeros(1, 6, 2, 2), 4)


FIGURES = {
    "cube": cube.draw_cubes,
    "explorer": lambda: cube.draw_entry("gn", N=3, C=6, G=2, n=1, c=4, h=0, w=1),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figure_is_drawn(draw, tmp_path):
    plt.switch_backend("agg")
    figure = draw()
    figure.savefig(tmp_path / "figure.png", dpi=150)
    plt.close(figure)
    height, width = plt.imread(tmp_path / "figure.png").shape[:2]
    assert width == 1275 and 300 < height < 1300  # 8.5 inches at 150 dpi


def test_images_of_the_readme_stand_in_the_notebook():
    """A picture of the README is the picture of the cell that carries its name as a tag."""
    names = []
    for cell in json.loads(FUNDAMENTALS.read_text(encoding="utf-8"))["cells"]:
        for tag in cell["metadata"].get("tags", []):
            if tag.startswith("image-"):
                names.append(tag.removeprefix("image-"))
                output, _ = cell["outputs"]  # and its description
                picture = io.BytesIO(base64.b64decode(output["data"]["image/png"]))
                width, height = Image.open(picture).size
                assert width == 850 and 200 < height < 870  # 8.5 inches at 100 dpi
    assert sorted(names) == ["cube", "explorer", "four_ways", "toy_batch"]
    for name in names:
        assert (NOTEBOOKS.parent / "images" / f"{name}.png").exists()


def test_the_explorer_is_the_file_beside_the_module():
    script = (Path(cube.__file__).parent / "explorer.mjs").read_text(encoding="utf-8")
    assert cube.explore()._esm == script and "export default" in script


def test_the_explorer_names_and_colours_the_norms_as_the_figures_do():
    script = cube.explore()._esm
    for norm in AXES:
        assert f'{norm}: {{ name: "{NORMS[norm]}", color: "{COLORS[norm]}"' in script


# Wu & He 2018, section 4.1: ImageNet error in %, with this number of images per GPU
PUBLISHED = {
    "bn": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
    "gn": {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1},
}


def test_the_published_errors_are_those_of_the_paper(lesson):
    for norm, expected in PUBLISHED.items():
        drawn = zip(lesson["images_per_gpu"], lesson["error"][norm], strict=True)
        assert dict(drawn) == expected


# --- the exercises --------------------------------------------------------------------------------

SOLUTIONS = NOTEBOOKS / "00_solutions.ipynb"


def check_cells(path):
    """The cells that check an answer, in order."""
    return [cell for cell in code_cells(path) if re.search(r"^ *check(_name)?\(", cell, re.M)]


@pytest.fixture(scope="module")
def lesson():
    """All names of notebook 00, after it has run; nothing is drawn."""
    plt.switch_backend("agg")
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "show", lambda figure, alt: plt.close(figure))
        patch.setattr(cube, "explore", lambda: None)
        for cell in code_cells(FUNDAMENTALS):
            exec(compile(cell, "notebook 00", "exec"), names)
    return names


@pytest.fixture
def say(lesson, capsys):
    """A function that gives an exercise some answers, and returns what its check says."""

    def run(exercise, **answers):
        capsys.readouterr()
        cell = check_cells(FUNDAMENTALS)[exercise - 1]
        exec(compile(cell, f"exercise {exercise}", "exec"), lesson | answers)
        return capsys.readouterr().out

    return run


NO_NUMBERS = ["4.12", b"4", {}, {1}, [None], ["x"], object(), print, 1j, float("nan")]
NO_NUMBERS += [[1.0, 2.0], [[1.0], [2.0, 3.0]], [], (), True, np.array(["x"]), np.zeros(3), -1]
FUNCTIONS = {3: "layer_norm_per_pixel", 4: "masked_batch_norm", 5: "group_norm_by_layer_norm"}


def test_the_practice_batch_tells_the_norms_apart(lesson):
    found = list(lesson["torch_norms"](lesson["practice"], 3).values())
    for k, one in enumerate(found):
        for other in found[:k]:
            assert (one - other).abs().max() > 0.5


def test_solutions_face_the_checks_of_the_exercises():
    """Each check stands word for word in the solutions, and says solved there."""
    for line in ("practice = ", "PRACTICE = ", "def unknown(", "def check(", "EXERCISES = {"):
        (cell,) = [cell for cell in code_cells(FUNDAMENTALS) if line in cell]
        assert cell in code_cells(SOLUTIONS)
    checks = check_cells(FUNDAMENTALS)
    assert len(checks) == 5 and check_cells(SOLUTIONS) == checks
    text = SOLUTIONS.read_text(encoding="utf-8")
    for exercise in ("1 A", "1 B", "1 C", "1 D", "2", "3", "4", "5"):
        assert f"exercise {exercise}: solved" in text


@pytest.mark.parametrize("exercise", FUNCTIONS)
def test_a_function_of_anything_is_checked(say, exercise):
    def answering(answer):
        return say(exercise, **{FUNCTIONS[exercise]: lambda *_: answer})

    assert "open" in answering(None)
    for answer in NO_NUMBERS:
        assert "not yet" in answering(answer), answer


def masked(x, mask):
    y = torch.zeros_like(x)
    y[mask] = torch.nn.BatchNorm1d(x.shape[2])(x[mask]).detach()
    return y


RIGHT = {  # by torch.nn
    3: lambda x: torch.nn.LayerNorm(x.shape[1])(x.movedim(1, 3)).movedim(3, 1).detach(),
    4: masked,
    5: lambda x, G: torch.nn.GroupNorm(G, x.shape[1])(x).detach(),
}


def answering(say, exercise, change):
    """What the check says of the right function with its output changed."""
    right = RIGHT[exercise]
    return say(exercise, **{FUNCTIONS[exercise]: lambda *given: change(right(*given))})


FORMS = [lambda y: y, torch.Tensor.double, torch.Tensor.numpy, torch.Tensor.tolist]
FORMS += [lambda y: y.clone().requires_grad_()]
CHANGES = [
    lambda y: y.int(),
    lambda y: y[0],
    lambda y: y.flatten(),
    lambda y: y[None],
    lambda y: y.transpose(1, 2),
    lambda y: y.flip(1),
    lambda y: -y,
    lambda y: 1.05 * y,
    lambda y: y + 0.05,
    torch.zeros_like,
    lambda y: y * torch.nan,
    lambda y: [y, y],
    lambda y: y > 0,
    lambda y: (y, None),
    str,
]


@pytest.mark.parametrize("exercise", FUNCTIONS)
def test_the_right_tensor_is_accepted_in_any_form(say, exercise):
    for form in FORMS:
        assert f"exercise {exercise}: solved" in answering(say, exercise, form)
    for k, change in enumerate(CHANGES):
        assert "not yet" in answering(say, exercise, change), k


@pytest.mark.parametrize("exercise", FUNCTIONS)
def test_a_function_may_work_in_place_but_not_cheat(say, lesson, exercise):
    """The check hands out copies: what happens to them changes no later answer."""
    before = lesson["practice"].clone()

    def in_place(x, *more):
        return x.copy_(RIGHT[exercise](x, *more))

    name = FUNCTIONS[exercise]
    assert "solved" in say(exercise, **{name: in_place})
    assert "not yet" in say(exercise, **{name: lambda x, *_: x.zero_()})
    assert lesson["practice"].equal(before) and lesson["PRACTICE"].equal(before)
    assert say(1, **SOLVED).count("solved") == 4


@pytest.mark.parametrize("exercise", FUNCTIONS)
def test_an_answer_for_the_first_batch_alone_is_refused(say, lesson, exercise):
    given = next(iter(lesson["EXERCISES"][exercise][2].values()))
    y = RIGHT[exercise](*given)
    said = say(exercise, **{FUNCTIONS[exercise]: lambda *_: y.clone()})
    assert "not yet: right on the first batch; with" in said


def over(axes, correction=0, view=None, eps=1e-5):
    """A norm of x by the mean and the variance over axes, perhaps of a view in groups."""

    def norm(x, *_):
        z = x.reshape(len(x), view, -1, *x.shape[2:]) if view else x
        var, mean = torch.var_mean(z, axes, correction=correction, keepdim=True)
        return ((z - mean) / (var + eps).sqrt()).reshape(x.shape)

    return norm


OTHER_NORMS = {
    "BN": over((0, 2, 3)),
    "LN": over((1, 2, 3)),
    "IN": over((2, 3)),
    "GN(2)": over((2, 3, 4), view=2),
}
WRONG = {
    3: OTHER_NORMS | {"GN(3)": over((2, 3, 4), view=3), "unbiased": over(1, 1)},
    4: {"with padding": over((0, 1)), "LN": over(2), "IN": over(1)},
    5: OTHER_NORMS | {"per pixel": over(1), "unbiased": over((2, 3, 4), 1, 3)},
}
WRONG[3] |= {"the batch": over(0), "everything": over((0, 1, 2, 3))}
WRONG[3] |= {"not divided": lambda x: x - x.mean(1, keepdim=True)}
WRONG[3] |= {"no eps": over(1, eps=0), "another eps": over(1, eps=1e-3)}


def eps_outside(x):
    var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    return (x - mean) / (var.sqrt() + 1e-5)


def masked_by(change, correction=0, eps=1e-5):
    """Exercise 4 with an error in it."""

    def norm(x, mask):
        y = torch.zeros_like(x)
        y[mask] = over(0, correction, eps=eps)(x[mask])
        return change(y, x, mask)

    return norm


def zeros_taken_for_padding(x, mask):
    return masked(x, x.ne(0).any(2))


WRONG[3]["eps outside the root"] = eps_outside
WRONG[5]["three groups"] = lambda x, G: torch.nn.functional.group_norm(x, 3 if len(x) > 1 else 1)
WRONG[5]["no eps"] = lambda x, G: torch.nn.functional.group_norm(x, G, eps=1e-12)
WRONG[4] |= {
    "the input at padding": masked_by(lambda y, x, mask: torch.where(mask.unsqueeze(2), y, x)),
    "zeros taken for padding": zeros_taken_for_padding,
    "unbiased": masked_by(lambda y, *_: y, correction=1),
    "no eps": masked_by(lambda y, *_: y, eps=0),
}


@pytest.mark.parametrize(
    ("exercise", "name"), [(exercise, name) for exercise in WRONG for name in WRONG[exercise]]
)
def test_another_norm_is_refused(say, exercise, name):
    assert "not yet" in say(exercise, **{FUNCTIONS[exercise]: WRONG[exercise][name]})


def test_a_check_names_what_is_wrong(say):
    assert say(3, layer_norm_per_pixel=OTHER_NORMS["LN"]) == "exercise 3: not yet: this is LN\n"
    assert "factor of 0.91" in say(3, layer_norm_per_pixel=WRONG[3]["unbiased"])
    assert "the shape is (2, 4, 5), not (2, 6, 4, 5)" in say(
        3, layer_norm_per_pixel=lambda x: x.mean(1)
    )
    assert "a str, not" in say(3, layer_norm_per_pixel=str)
    assert "off by up to" in say(3, layer_norm_per_pixel=lambda x: x)
    assert "off by up to" in say(3, layer_norm_per_pixel=lambda x: -RIGHT[3](x))  # no factor of -1
    assert "tiny variance: off by" in say(3, layer_norm_per_pixel=WRONG[3]["no eps"])

    def dealt(x, G):  # every third channel is a group
        by_hand = x.view(len(x), -1, G, *x.shape[2:]).transpose(1, 2)
        return over((2, 3, 4))(by_hand).transpose(1, 2).reshape(x.shape)

    assert "GN of other groups" in say(5, group_norm_by_layer_norm=dealt)
    assert "BN with the padding" in say(4, masked_batch_norm=WRONG[4]["with padding"])
    assert "factor" in say(4, masked_batch_norm=WRONG[4]["unbiased"])


@pytest.mark.parametrize("answer", [4.12, torch.tensor(4.12), np.float32(4.1221), np.array(4.12)])
def test_exercise_2_accepts(say, answer):
    assert "solved" in say(2, answer_2=answer)


def test_exercise_2_refuses(say):
    for answer in [*NO_NUMBERS, 4.1, 4.13, 4.14, 4, 1.22, 4.35, 3.62, [4.12], torch.tensor([4.12])]:
        assert "not yet" in say(2, answer_2=answer), answer
    assert "training mode" in say(2, answer_2=(5 - 3) / (8 / 3) ** 0.5)
    assert "biased variance" in say(2, answer_2=4.7 / (0.9 + 0.1 * 8 / 3) ** 0.5)
    assert "open" in say(2, answer_2=None)
    assert "factor" not in say(2, answer_2=4.7 / 1.3)


SOLVED = {"norm_a": "LN", "norm_b": "BN", "norm_c": "GN", "norm_d": "IN"}


def test_exercise_1(say):
    assert say(1, **SOLVED).count("solved") == 4
    assert say(1).count("open") == 4
    for name, norm in SOLVED.items():
        for guess in {"BN", "LN", "IN", "GN"} - {norm}:
            said = say(1, **SOLVED | {name: guess})
            experiment = "change sample 1" if "BN" in (guess, norm) else "change channel 0"
            assert said.count("solved") == 3 and said.count(f"not {guess}: {experiment}") == 1
        for guess in ("", "bn2", 7, print, ["LN"], {}, torch.ones(2), np.ones(2)):
            said = say(1, **SOLVED | {name: guess})
            assert said.count("solved") == 3 and said.count("not yet") == 1


def test_a_norm_may_be_named_in_any_way(say):
    for guess in ("ln", "Layer Norm", "LN ", "LayerNorm", "layer norm"):
        assert say(1, **SOLVED | {"norm_a": guess}).count("solved") == 4
    for guess in ("bn", "Batch Norm", "batchnorm"):
        assert say(1, **SOLVED | {"norm_b": guess}).count("solved") == 4


def test_the_answers_stand_in_a_folded_cell():
    """No check cell shows the answer: it calls, and the cell that knows the answers is folded."""
    for cell in check_cells(FUNDAMENTALS):
        assert "F." not in cell and "nn." not in cell and len(cell.splitlines()) <= 2
    for path in (FUNDAMENTALS, SOLUTIONS):
        for cell in code_cells(path):
            if any(line in cell for line in ("EXERCISES = {", "def unknown(", "def right_2(")):
                assert cell.startswith("# skip")


def test_layers_are_short():
    """From scratch in a handful of lines: that is what the notebook promises."""
    for cell in code_cells(FUNDAMENTALS):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, node.name


CHECK = "# skip: this cell only checks"
OWN_NAMES = ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp


def bound(node):
    """The names that a cell binds for the cells after it."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names.add(child.name)
        elif isinstance(child, ast.alias):
            names.add((child.asname or child.name).split(".")[0])
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        if not isinstance(child, (*OWN_NAMES, ast.GeneratorExp)):
            names |= bound(child)
    return names - {"_"}


def test_bound_names():
    code = "import a.b as c, d.e\nf, (g, *h) = [i for i in j]\nfor k in l:\n    m = 1\n"
    code += (
        "def n(o):\n    p = 1\nclass q:\n    r = 1\nwith s as t:\n    u += (v := 1)\n_ = x.y = 1"
    )
    assert bound(ast.parse(code)) == set("cdfghkmnqtuv")


def test_a_cell_that_only_checks_leaves_the_readers_names_alone():
    """So any cell can run again after it and say the same."""
    cells = code_cells(FUNDAMENTALS)
    checks = [cell for cell in cells if cell.startswith(CHECK)]
    others = set().union(*(bound(ast.parse(cell)) for cell in cells if cell not in checks))
    assert len(checks) > 10
    for cell in checks:
        assert not bound(ast.parse(cell)) & others, cell


# --- claims of the text that need more than one run -----------------------------------------------


def scaled(convs, factor):
    for conv in convs:
        conv.weight.data *= factor
    return convs


def growth(lengths):
    return (lengths[0] / lengths[19]) ** (1 / 19)


@pytest.mark.parametrize("seed", range(4))
def test_section_1_with_other_random_numbers(lesson, seed):
    batch, convs = lesson["twenty_convs"](seed)
    outputs_of, difference = lesson["outputs_of"], lesson["difference"]
    outputs = outputs_of(batch, convs, "none")
    assert difference(outputs[19]) < 1e-8 and lesson["gradient_lengths"](outputs)[0] < 1e-8
    plain = outputs_of(batch, convs, "bn")
    assert difference(plain[19]) > 0.4
    found = [growth(lesson["gradient_lengths"](plain))]
    for factor in (6**0.5, 10 / 6**0.5):  # the weights times 2.45, then times 10
        outputs = outputs_of(batch, scaled(convs, factor), "bn")
        torch.testing.assert_close(outputs[19], plain[19], atol=0.01, rtol=0)
        found.append(growth(lesson["gradient_lengths"](outputs)))
    assert 1.15 < min(found) < max(found) < 1.21 and max(found) - min(found) < 0.02


def test_without_relu_the_gradient_does_not_grow(lesson):
    for seed in range(4):
        x, convs = lesson["twenty_convs"](seed)
        outputs = []
        for conv in convs:
            x = torch.nn.BatchNorm2d(16).double()(conv(x))
            outputs.append(x)
        assert abs(growth(lesson["gradient_lengths"](outputs)) - 1) < 0.03


def linear_outputs(samples, width, seed):
    torch.manual_seed(seed)
    x, outputs = torch.randn(samples, width), []
    for _ in range(20):
        x = torch.nn.BatchNorm1d(width)(torch.nn.Linear(width, width)(x))
        outputs.append(x)
    return outputs


def test_with_few_values_batch_norm_alone_makes_the_gradient_grow(lesson):
    def found(samples, width):
        every = [linear_outputs(samples, width, seed) for seed in range(6)]
        return np.mean([growth(lesson["gradient_lengths"](outputs)) for outputs in every])

    assert all(1.3 < found(4, width) < 1.4 for width in (500, 1000))
    assert abs(found(64, 256) - 1) < 0.03


def test_the_zeros_at_the_edges_shrink_the_size(lesson):
    for seed in range(8):
        sizes = []
        for mode in ("zeros", "circular"):  # without zeros at the edges
            batch, convs = lesson["twenty_convs"](seed)
            for conv in scaled(convs, 6**0.5):
                conv.padding_mode = mode
                torch.nn.init.zeros_(conv.bias)
            sizes.append(lesson["rms"](lesson["outputs_of"](batch, convs, "none")[19]))
        assert 0.95 < (sizes[0] / sizes[1]) ** (1 / 20) < 0.995


def test_the_gradient_in_wide_layers():
    half = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).relu()
    assert abs(half.square().mean() - 1 / 2) < 0.01 and abs(half.var() - 0.34) < 0.01
    assert abs(half.mean() - (2 * torch.pi) ** -0.5) < 0.01
    variance = 1 / 2 - 1 / (2 * torch.pi)
    assert round(variance**0.5, 2) == 0.58
    ratio = (torch.pi / (torch.pi - 1)) ** 0.5
    assert abs((0.5 / variance) ** 0.5 - ratio) < 1e-9 and round(ratio, 2) == 1.21


def test_the_larger_weights_are_those_of_he(lesson):
    _, convs = lesson["twenty_convs"]()
    for conv in convs:
        assert abs(conv.weight.std() * 6**0.5 / (2 / (16 * 9)) ** 0.5 - 1) < 0.05


SHARES = {"bn": (0.67, 0.70), "in": (0.65, 0.70), "gn": (0.53, 0.61)}
SHARES |= {"ln": (0.15, 0.32), "none": (0.13, 0.32)}
MEANS = {"bn": (0, 0), "in": (0, 0), "gn": (0.13, 0.25), "ln": (0.55, 0.62), "none": (0.54, 0.67)}


def assert_range(values, expected):
    for found, said in zip((min(values), max(values)), expected, strict=True):
        assert abs(found - said) < 0.01, (values, expected)


@pytest.mark.parametrize("norm", SHARES)
def test_section_10_6_over_eight_seeds(lesson, norm):
    share, sizes, growths, means = [], [], [], []
    for seed in range(8):
        batch, convs = lesson["twenty_convs"](seed)
        outputs = lesson["outputs_of"](batch, scaled(convs, 6**0.5), norm)
        sizes.append(lesson["rms"](outputs[19]))
        share.append(lesson["difference"](outputs[19]) / sizes[-1])
        growths.append(growth(lesson["gradient_lengths"](outputs)))
        before = norm_layer(norm, 16).double()(convs[19](outputs[18]))
        means.append(before.mean((0, 2, 3)).square().mean() / before.square().mean())
    assert_range(share, SHARES[norm])
    assert_range(means, MEANS[norm])
    assert norm not in ("ln", "none") or min(means) > 0.5
    if norm == "none":
        assert_range(sizes, (0.13, 1.59))
        assert_range(growths, (0.95, 1.12))


@pytest.mark.parametrize("norm", SHARES)
def test_zero_biases_hardly_change_the_shares(lesson, norm):
    for seed in range(8):
        shares = []
        for zero in (False, True):
            batch, convs = lesson["twenty_convs"](seed)
            for conv in convs if zero else ():
                torch.nn.init.zeros_(conv.bias)
            last = lesson["outputs_of"](batch, scaled(convs, 6**0.5), norm)[19]
            shares.append(lesson["difference"](last) / lesson["rms"](last))
        assert abs(shares[0] - shares[1]) < 0.04


def test_layer_norm_of_centred_channels_over_eight_seeds(lesson):
    keeps = []
    for seed in range(8):
        batch, convs = lesson["twenty_convs"](seed)
        y = lesson["last_of_centred"](batch, scaled(convs, 6**0.5))
        keeps.append(lesson["difference"](y) / lesson["rms"](y))
    assert_range(keeps, (0.64, 0.70))


def test_the_networks_of_section_1_run_again_give_the_same(lesson):
    """After all the cells below: the same weights, and the same target for both."""
    (cell,) = [cell for cell in code_cells(FUNDAMENTALS) if "gradient[norm] = " in cell]
    again = dict(lesson)
    exec(compile(cell, "notebook 00", "exec"), again)
    assert again["gradient"] is not lesson["gradient"]
    assert again["gradient"] == lesson["gradient"]
    assert again["differences"] == lesson["differences"]


def best_error(x_hat, x):
    """The largest error of the best scale and shift, x_hat to x: (K, M), one of each per column."""
    worst = []
    for column, aim in zip(x_hat.T, x.T, strict=True):
        features = torch.stack([column, torch.ones_like(column)], 1)  # (K, 2)
        best = torch.linalg.lstsq(features, aim[:, None]).solution
        worst.append((features @ best - aim[:, None]).abs().max())
    return max(worst)


def contrasting_images(dtype=torch.float64):
    torch.manual_seed(0)
    contrast = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    return (contrast * torch.randn(3, 6, 5, 5) + contrast.flip(0)).to(dtype)


def test_who_can_undo_what(lesson):
    images = contrasting_images()
    for norm in (lesson["GroupNorm"](2, 6), lesson["GroupNorm"](1, 6), lesson["InstanceNorm"]()):
        y = norm.double().eval()(images).detach()
        for n, possible in ((1, True), (2, False)):  # one gamma and beta per channel
            by_channel = [each[:n].transpose(0, 1).flatten(1).T for each in (y, images)]
            assert (best_error(*by_channel) < 1e-6) == possible
    y = lesson["LayerNorm"]([6, 5, 5]).double()(images).detach()
    assert best_error(y[:2].flatten(1), images[:2].flatten(1)) < 1e-6  # per entry
    assert best_error(y.flatten(1), images.flatten(1)) > 0.1


def test_who_forgets_what(lesson):
    x = contrasting_images(torch.float32)
    norms = [lesson["BatchNorm"](6), lesson["LayerNorm"]([6, 5, 5]), lesson["GroupNorm"](2, 6)]
    for norm in [*norms, lesson["InstanceNorm"]()]:
        torch.testing.assert_close(norm(-2 * x), -norm(x), atol=1e-4, rtol=0)
    tracking = torch.nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    for fixed in (lesson["BatchNorm"](6).eval(), tracking.eval()):
        assert min((fixed(changed) - fixed(x)).abs().max() for changed in (2 * x, x + 1)) > 0.9


def test_accumulation_of_unlike_parts(lesson):
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x * torch.arange(1.0, 9.0).view(8, 1, 1, 1)  # the last image has 8 times the contrast
    gap = lesson["gap"]
    assert gap(torch.nn.BatchNorm2d(8), x, [4, 4]) > 0.5
    for norm in NORMS:
        layer = norm_layer(norm, 8, num_groups=2)
        assert gap(layer, x, [6, 2]) > 0.1
        assert (gap(layer, x, [6, 2], weighted=True) < 1e-4) == (norm != "bn")


@pytest.mark.skipif(not hasattr(torch.nn, "RMSNorm"), reason="PyTorch has it from 2.4 on")
def test_rms_norm_is_that_of_torch(lesson):
    theirs = torch.nn.RMSNorm(4, eps=1e-5)  # its default eps is the smallest float
    torch.nn.init.normal_(theirs.weight)
    for x in (torch.randn(3, 4), torch.randn(2, 5, 4)):
        torch.testing.assert_close(lesson["rms_norm"](x, theirs.weight), theirs(x))
    assert sum(p.numel() for p in theirs.parameters()) == 4
