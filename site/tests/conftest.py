"""A browser and the built site, served as a page on the web would be."""

import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site"
MISSING = "test-site needs a browser: apt-get install chromium, or install Chrome"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="session")
def address():
    handler = functools.partial(Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def jupyter(tmp_path):
    """JupyterLab as the course installs it, with a notebook that shows the explorer."""
    cell = {"cell_type": "code", "id": "explorer", "execution_count": None, "outputs": []}
    source = "from normcourse import cube\ncube.explore()"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cells = [cell | {"metadata": {}, "source": source}]
    notebook = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "explorer.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--IdentityProvider.token="]
    options += [f"--port={port}", f"--ServerApp.root_dir={tmp_path}"]
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "RUNTIME")}
    python = ROOT / ".venv" / "bin" / "python"
    environment = os.environ | folders | {"PYTHONPATH": str(ROOT)}
    command = [python, "-m", "jupyter", "lab", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **quiet) as server:
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()  # asked to end, it may wait for a page; without it its kernels end


def wait_for(port, seconds=90):
    """Until a server answers at a port."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"no server at port {port} after {seconds} seconds")


@pytest.fixture(scope="session")
def browser():
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program = next(filter(None, found), None)
    if program is None:
        pytest.exit(MISSING, returncode=1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def look(browser, address):
    """Opens a page of the site: look("README.html", width, color_scheme="dark")."""
    contexts = []

    def look(page=None, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        opened = context.new_page()
        if page:
            opened.goto(f"{address}/{page}")
        return opened

    yield look
    for context in contexts:
        context.close()
