"""The site: README's pages and the lessons, as they are committed. Built by `make site`.

The pages stay what GitHub and Jupyter show; what a site needs beyond that is done here.
"""

import datetime
import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

from docutils import nodes
from myst_nb.core.render import NbElementRenderer
from sphinx import addnodes

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = SimpleNamespace(**runpy.run_path(str(ROOT / "site" / "launch.py")))

# --- what and how ---------------------------------------------------------------------------------

REPOSITORY = LAUNCH.address()
PAGES = {
    "The lessons": ["notebooks/*.ipynb", "site/explorer.md"],
    "More": ["docs/*.md", "experiments/README.md", "benchmarks/README.md", "[!R]*.md"],
}


def chapters():
    """The list of pages, which README does not need on GitHub."""
    text = ""
    for caption, patterns in PAGES.items():
        found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in found]
        lines = "\n".join(names)
        text += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"
    return text


DATE = LAUNCH.git("log", "-1", "--format=%cs") or datetime.date.today()
project = "normcourse"
author = "the normcourse authors"
root_doc = "README"
include_patterns = ["README.md", *PAGES["The lessons"], *PAGES["More"]]
exclude_patterns = [".*", "build", "runs", "data"]  # not even looked into
extensions = ["myst_nb", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # no widget is saved, so no script of another site is needed
nb_render_markdown_format = "myst"  # so that tables which a cell shows are tables
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "sphinx_book_theme"
html_title = "normcourse"
html_static_path = ["static", "../normcourse/explorer.mjs"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_copy_source = html_show_copyright = False
html_theme_options = {
    "home_page_in_toc": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "extra_footer": f"normcourse {LAUNCH.VERSION}, {DATE}",
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
else:
    html_theme_options["announcement"] = (
        "This course is not published yet. Its notebooks run from a copy of its folder: make lab"
    )


# --- what the pages need --------------------------------------------------------------------------


def prepare(app, docname, source):
    """README gets the list of pages; the button for Colab goes, which the theme has, too."""
    text = LAUNCH.BADGE.sub("", source[0])
    if docname == root_doc:
        text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text) + chapters()
    source[0] = adapt_notebook(text) if text.startswith("{") else text


def adapt_notebook(text):
    """Show the explorer, live."""
    notebook = json.loads(text)
    cells = []
    for cell in notebook["cells"]:
        cells.append(cell)
        if "".join(cell["source"]) == "cube.explore()":
            block = (ROOT / "site/explorer.md").read_text().partition("```")
            live = {"cell_type": "markdown", "id": "live-explorer", "metadata": {}}
            cells.append(live | {"source": "".join(block[1:])})
    return json.dumps(notebook | {"cells": cells})


def describe_images(render):
    """The description that plot.show keeps beside a figure becomes the image's alt text."""

    def render_image(self, data):
        images = render(self, data)
        images[0]["alt"] = data.output_metadata.get(data.mime_type, {}).get("alt", "")
        return images

    return render_image


NbElementRenderer.render_image = describe_images(NbElementRenderer.render_image)


def link_code(app, doctree):
    """Code and folders are shown by the repository; until it is public, files are downloads."""
    here = Path(doctree["source"]).parent
    links = [*doctree.findall(addnodes.pending_xref), *doctree.findall(addnodes.download_reference)]
    for node in links:
        path = (here / node["reftarget"]).resolve()
        code = isinstance(node, addnodes.download_reference)
        if REPOSITORY and (code or path.is_dir()):
            place = f"{REPOSITORY}/blob/main/{path.relative_to(ROOT).as_posix()}"
            node.replace_self(nodes.reference("", "", *node.children, refuri=place))
        elif path.is_dir():
            node.replace_self(node.children)


def open_with_readme(app, error):
    """A site's address without a page shows the README."""
    if not error and app.builder.name == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app):
    app.connect("source-read", prepare)
    app.connect("doctree-read", link_code)
    app.connect("build-finished", open_with_readme)
