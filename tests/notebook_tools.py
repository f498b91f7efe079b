"""Take the definitions out of a notebook, so that what a reader sees is what the tests run."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
FUNDAMENTALS = NOTEBOOKS / "00_fundamentals.ipynb"


def code_cells(path: Path) -> list[str]:
    """The sources of the code cells, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def definition_source(path: Path) -> str:
    """The imports, functions and classes of a notebook; every other statement is left out."""
    kept = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef
    found = []
    for cell in code_cells(path):
        for node in ast.parse(cell).body:
            if isinstance(node, kept):
                lines = [d.lineno for d in getattr(node, "decorator_list", [])]
                first = min([node.lineno, *lines])
                found.append("\n".join(cell.splitlines()[first - 1 : node.end_lineno]))
    return "\n\n".join(found) + "\n"


def definitions(
    path: Path = FUNDAMENTALS, replace: tuple[str, str] | None = None
) -> SimpleNamespace:
    """Run the definitions of a notebook; ``replace`` = (old, new) first plants an error.

    Raises AssertionError unless ``old`` stands in the source exactly once: a change of nothing
    proves nothing.
    """
    source = definition_source(path)
    if replace:
        old, new = replace
        count = source.count(old)
        if count != 1 or old == new:
            raise AssertionError(
                f"{old!r} occurs {count} times in {path.name}: the error is not well defined"
            )
        source = source.replace(old, new)
    namespace: dict = {"__name__": path.stem}
    exec(compile(source, path.name, "exec"), namespace)
    return SimpleNamespace(**namespace)
