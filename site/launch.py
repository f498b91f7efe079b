"""Where the course can be had: the address of `git remote`, if it is a public one.

The site asks for it (conf.py), and publishing (experiments/publish.py) writes it into README and
the notebooks. Until there is one, a sentence stands in its place.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "normcourse/__init__.py").read_text())[1]
COLAB = "https://colab.research.google.com"
NOT_YET = "*Not published yet: `make lab` opens this notebook in a copy of the course's folder.*"
BADGE = re.compile(r"\[!\[Open in Colab[^\"\n]*?\)\]\([^)]*\)|\*Not published yet:[^*]*\*")
PACKAGE = re.compile(r'(?<=\\"NORMCOURSE_REPOSITORY\\", \\")[^"\\]*')  # as JSON writes it


def git(*words):
    """What git says, or nothing."""
    run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


def address():
    """The repository's public https address, if `git remote` knows one."""
    remote = git("config", "remote.origin.url").removesuffix(".git")
    return remote if re.fullmatch(r"https://github\.com/[^/@]+/[^/@]+", remote) else ""


def in_colab(repository, name):
    """What opens a notebook in Colab."""
    return f"{COLAB}/github/{repository.removeprefix('https://github.com/')}/blob/main/{name}"


def address_notebook(text, name, repository):
    """A notebook's text with a button for Colab, and what the first cell installs there."""
    picture = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
    badge = f"{picture}({in_colab(repository, f'notebooks/{name}')})" if repository else NOT_YET
    package = f"git+{repository}@v{VERSION}" if repository else ""
    return PACKAGE.sub(package, BADGE.sub(badge, text))


def for_readme(repository):
    """README's words on Colab."""
    if not repository:
        return (
            "**Colab.** The course is not published yet, so Colab cannot fetch it. Until then, use "
            "`make lab`, or\n[upload a wheel to Colab](docs/questions.md#how-do-i-use-it-in-colab)."
        )
    names = sorted(path.name for path in (ROOT / "notebooks").glob("0?_[!s]*.ipynb"))
    links = [f"[{name[1]}]({in_colab(repository, f'notebooks/{name}')})" for name in names]
    opens = f"**Colab** opens the lessons without an installation: {', '.join(links)}."
    return f"{opens} Their first cell fetches the\ncourse, in about a minute."
