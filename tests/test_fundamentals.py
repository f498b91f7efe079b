"""The layers of notebook 00, taken from it, against torch.nn; its figures and its exercises."""

import ast
import base64
import io
import json

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_checks import CHECKS, KINDS, check_equal, pair
from notebook_tools import FUNDAMENTALS, NOTEBOOKS, code_cells, definitions
from PIL import Image

from normcourse import CourseError, cube, plot
from normcourse.norm import AXES, grouped, shared_set

DEFS = definitions()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_layer_equals_torch(check, kind):
    check(DEFS, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 4, 3, 5, 2), (1, 4, 3, 3), (5, 4, 1, 2)], ids=str)
def test_other_ranks_and_a_batch_of_one(kind, shape):
    torch.manual_seed(0)
    ours, theirs = (layer.double() for layer in pair(DEFS, kind, shape))
    check_equal(ours, theirs, torch.randn(shape, dtype=torch.float64) + 1)


@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm", "GroupNorm"])
def test_features_without_positions(kind):
    torch.manual_seed(0)
    check_equal(*pair(DEFS, kind, (8, 6)), torch.randn(8, 6) + 1)


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


def test_batch_norm_refuses_one_value_per_channel():
    ours, theirs = pair(DEFS, "BatchNorm", (1, 4))
    for layer in (ours, theirs):
        with pytest.raises(ValueError):
            layer(torch.randn(1, 4))
        assert layer.running_mean.equal(torch.zeros(4)) and layer.running_var.equal(torch.ones(4))
    x = torch.randn(1, 4)
    torch.testing.assert_close(
        ours.eval()(x), theirs.eval()(x)
    )  # in evaluation one value is enough


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
                (output,) = cell["outputs"]
                picture = io.BytesIO(base64.b64decode(output["data"]["image/png"]))
                width, height = Image.open(picture).size
                assert width == 850 and 200 < height < 870  # 8.5 inches at 100 dpi
    assert sorted(names) == ["cube", "explorer", "four_ways", "toy_batch"]
    for name in names:
        assert (NOTEBOOKS.parent / "images" / f"{name}.png").exists()


def test_explorer_follows_its_sliders(monkeypatch):
    """Whatever the sliders say, also halfway through a change of shape, the figure exists."""
    drawn, shown = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(plot, "show", lambda figure, alt: plt.close(figure))
    draw_entry = cube.draw_entry
    monkeypatch.setattr(cube, "draw_entry", lambda *args: drawn.append(args) or draw_entry(*args))
    cube.explore()
    norm, shape, at, _ = shown[0].children
    N, C, G = shape.children
    n, c, _, _ = at.children
    assert drawn[-1] == ("bn", 3, 6, 2, 0, 0, 0, 0)
    G.value, c.value, n.value = 3, 5, 2
    C.value, N.value, norm.value = 4, 1, "gn"
    assert drawn[-1] == ("gn", 1, 4, 2, 0, 3, 0, 0)
    assert G.options == (1, 2, 4)  # 3 groups cannot be: 2 is the next below


def test_solutions_face_the_checks_of_the_exercises():
    """Each checking cell stands word for word in the solutions, and says solved there."""
    checks = []
    for cell in code_cells(FUNDAMENTALS):
        if "\ncheck(" in cell or cell.startswith("def check("):
            checks.append(cell)
    solutions = code_cells(NOTEBOOKS / "00_solutions.ipynb")
    assert len(checks) >= 6
    assert [cell for cell in solutions if cell in checks] == checks
    text = (NOTEBOOKS / "00_solutions.ipynb").read_text(encoding="utf-8")
    for number in range(1, len(checks)):
        assert f"exercise {number}: solved" in text


def test_exercise_check_tells_right_from_wrong(capsys):
    expected = torch.tensor([1.0, 2.0])
    for answer in (None, [1.0, 3.0], [1.0], [1.0, 2.0]):
        DEFS.check(1, answer, expected)
    verdicts = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["open", "not yet", "not yet", "solved"]


def test_layers_are_short():
    """From scratch in a handful of lines: that is what the notebook promises."""
    for cell in code_cells(FUNDAMENTALS):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, node.name
