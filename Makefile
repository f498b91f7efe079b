# make train: set up and train (options: make train ARGS="--norm bn --epochs 2")
# make test: set up and test (with the oldest packages: make test PYTHON=python3.10 PIP="-c constraints-oldest.txt")
# make lab: open the notebooks     make clean: remove what these made
# make site: build the site in build/site     make test-site: build and check it; needs chromium
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(BIN)/python
SITE_RUN := $(subst $(VENV),.venv-site,$(RUN))
ARGS ?=
PIP ?=
PROCESSES := -n auto --maxprocesses 4 --dist loadfile

.PHONY: train test lab site test-site clean
train: $(VENV)/installed
	$(RUN) -m normcourse train $(ARGS)

# Each process has a core to itself.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(BIN)/lint-imports
	$(RUN) -m mypy normcourse
	$(RUN) -m pytest tests $(PROCESSES) --cov=normcourse --cov-report=term-missing
	$(RUN) -m pytest $(PROCESSES) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg notebooks

lab: $(VENV)/installed
	$(RUN) -m jupyter lab notebooks

site: .venv-site/installed
	rm -rf build/site
	$(SITE_RUN) -m sphinx -q -E -W --keep-going -c site -d build/doctrees . build/site

test-site: $(VENV)/installed site
	$(RUN) -m nbconvert --log-level ERROR --to html --output-dir build/nbconvert notebooks/0?_*.ipynb
	$(RUN) site/tests/choices.py > build/choices.json
	$(SITE_RUN) -m pytest -q -p no:cacheprovider site/tests

.venv-site/installed: site/requirements.txt
	$(PYTHON) -m venv .venv-site
	$(SITE_RUN) -m pip install --quiet --disable-pip-version-check -r site/requirements.txt
	@echo ok > $@

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch and the rest into $(VENV): some minutes, several GB, once"
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt $(PIP) -e .
	@echo ok > $@

clean:
	rm -rf $(VENV) .venv-site build *.egg-info .pytest_cache .coverage .ruff_cache .mypy_cache .import_linter_cache .hypothesis
