"""What the notebooks on CIFAR-10 share: their first cell, a trained network with its record, a look at data and norms.

``python -m normcourse.lessons`` writes the repository's address (first cell and Colab badge) into the notebooks.
"""

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normcourse.data import CourseError, Data, batches, write_file
from normcourse.model import build
from normcourse.norm import NORMS
from normcourse.plot import COLORS, bare, panels, unnormalise
from normcourse.report import RESULTS, data_folder, find_records
from normcourse.train import Record, Settings, fit, run_name

REPOSITORY = "https://github.com/OWNER/normcourse"  # the address stands here and nowhere else; not public yet
FIRST_CELL = f"""\
# Finds the course beside this notebook, or in Colab installs it and leaves torch as it is.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = os.environ.get("NORMCOURSE_REPOSITORY", "git+{REPOSITORY}")
if Path("..", "normcourse", "__init__.py").exists():
    sys.path.insert(0, str(Path("..").resolve()))
elif importlib.util.find_spec("normcourse") is None:
    if "google.colab" in sys.modules or "NORMCOURSE_REPOSITORY" in os.environ:
        for what in (["--no-deps", ADDRESS], ["torchinfo", "scikit-learn", "tqdm", "requests"]):
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *what])
        importlib.invalidate_caches()
    if importlib.util.find_spec("normcourse") is None:
        raise ModuleNotFoundError(f"the course is not here; in a terminal: pip install {{ADDRESS}}")
"""


def badge(notebook: str) -> str:
    """The Markdown of the button that opens a notebook of the repository in Colab."""
    address = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({address}/blob/main/notebooks/{notebook})"


def address_notebook(path: Path) -> None:
    """Write the badge and the first cell of REPOSITORY into a notebook that already has both."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    title, first = notebook["cells"][:2]
    title["source"] = [f"{badge(path.name)}\n" if "colab-badge" in line else line for line in title["source"]]
    first["source"] = FIRST_CELL.strip().splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


# --- a trained network -------------------------------------------------------------------------------------------


def published(settings: Settings) -> tuple[Path, Record] | tuple[None, None]:
    """The published weights and record of a run with these settings, on whatever copy of CIFAR-10 it was trained."""
    for path, record in find_records(RESULTS).items():
        if record["settings"] == asdict(settings) and path.with_suffix(".pt").exists():
            return path.with_suffix(".pt"), record
    return None, None


def trained(settings: Settings, data: Data, retrain: bool = False, runs: str | Path = "runs") -> tuple[nn.Module, Record]:
    """The network that ``settings`` name, trained, and the record of a training; prints where both come from.

    They are the published ones. With ``retrain``, or where none are published, it is trained now, into ``runs``: a run
    that was stopped goes on there, a finished one is read. On other images than CIFAR-10 the record is the published
    one, and the network learns a sample of the images for some seconds.
    """
    weights, record = (None, None) if retrain else published(settings)
    if weights is None or record is None:
        place = data_folder(runs, data.name)
        record, weights = fit(settings, data, place), place / f"{run_name(settings, data)}.pt"
    elif data.name != "CIFAR-10":
        print(f"{data.name}, not CIFAR-10: curves and tables show the published run, images a network trained just now")
        return _trained_briefly(settings, data), record
    made_on = f"{record['data']} ({record['copy']})"
    print(f"trained for {settings.epochs} epochs on {made_on}; here is {data.name} ({data.copy})")
    return _load(settings, data, weights), record


def _trained_briefly(settings: Settings, data: Data) -> nn.Module:
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:1500]
    few = data._replace(train_images=data.train_images[order], train_labels=data.train_labels[order])
    short = replace(settings, epochs=3, batch_size=64, lr=settings.lr * 0.7, flip=False)
    with tempfile.TemporaryDirectory() as folder:
        fit(short, few, folder)
        return _load(settings, data, Path(folder) / f"{run_name(short, few)}.pt")


def _load(settings: Settings, data: Data, weights: Path) -> nn.Module:
    chosen = (settings.num_groups, settings.multiplier, settings.dropout)
    model = build(settings.net, settings.norm, len(data.classes), *chosen)
    if not weights.exists():
        raise CourseError(f"{weights}, the weights, is missing; delete {weights.stem}.json to train this run again")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


# --- inside the norm ---------------------------------------------------------------------------------------------


def activations(model: nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into the norm of each named block and what comes out, (N, C, H, W) each, as x (N, 3, H, W) passes.

    In training mode, and on a copy: the model and its running statistics stay as they are.
    """
    model, found = copy.deepcopy(model).train(), {}
    for name in layers:
        model.get_submodule(f"{name}.norm").register_forward_hook(
            lambda _, x, y, name=name: found.update({name: (x[0].clone(), y.clone())})
        )
    with torch.no_grad():
        model(x)
    return found


def histograms(stages: dict[str, dict[str, tuple[Tensor, Tensor]]], norm: str) -> Any:
    """Histograms of ``activations``: a row for each stage of the training, a column for each layer; grey is before."""
    rows, columns = len(stages), max(map(len, stages.values()))
    with panels(rows, columns, (10, 2.4 * rows + 0.4), squeeze=False) as (figure, axes):
        for row, (stage, layers) in zip(axes, stages.items(), strict=True):
            row[0].set_ylabel(stage)
            for axis, (name, pair) in zip(row, layers.items(), strict=True):
                limit = 2.5 * max(values.std().item() for values in pair)
                places = torch.linspace(-limit, limit, 100)
                before, after = (torch.histc(values, 100, -limit, limit) for values in pair)
                axis.fill_between(places, before / before.max(), color="0.75")
                axis.plot(places, after / after.max(), color=COLORS[norm])
                axis.set(title=name, yticks=[])
        figure.supxlabel(f"grey: into the norm, coloured: out of it ({NORMS[norm]})")
    return figure


# --- the images --------------------------------------------------------------------------------------------------


def sample_grid(data: Data) -> Any:
    """Eight training images of each class, drawn at random: a row for each class."""
    random, rows = torch.Generator().manual_seed(0), []
    for label in range(len(data.classes)):
        ours = (data.train_labels == label).nonzero().flatten()
        rows.append(data.train_images[ours[torch.randint(len(ours), (8,), generator=random)]])
    return _show_rows(rows, 6.5, 0.6, yticks=[34 * k + 16 for k in range(len(rows))], yticklabels=data.classes)


def augmentations(data: Data, settings: Settings, images: int = 3, columns: int = 8) -> Any:
    """Training images as stored (left) and as a training sees them in different epochs: moved, and mirrored or not."""
    random, rows = torch.Generator().manual_seed(0), []
    for image in data.train_images[torch.randperm(len(data.train_labels), generator=random)[:images]]:
        same, labels = image.repeat(columns, 1, 1, 1), torch.zeros(columns)
        x, _ = next(batches(same, labels, data, columns, random, settings.shift, settings.flip))
        rows.append(torch.cat([image[None], unnormalise(x, data)]))
    figure = _show_rows(rows, 8.5, 1, yticks=[])
    figure.axes[0].axvline(32.5, color="black", lw=3)
    return figure


def _show_rows(rows: list[Tensor], width: float, row_height: float, **ticks: Any) -> Any:
    """Draw rows of images, each (columns, 3, 32, 32), with a white gap after each image: 34 pixels to the next."""
    padded = F.pad(torch.stack(rows), (0, 2, 0, 2), value=255)  # (R, K, 3, 34, 34)
    with panels(size=(width, row_height * len(rows))) as (figure, axis):
        axis.imshow(padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())  # (R * 34, K * 34, 3)
        axis.set(xticks=[], **ticks)
        bare(axis)
    return figure


if __name__ == "__main__":
    for path in sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("0?_[!s]*.ipynb")):
        address_notebook(path)
