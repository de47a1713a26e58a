# make demo    create .venv, install, run the main job (recipe demo, minutes)
# make test    create .venv with what the tests need, build the docs, run them all
# make docs    build docs/ into site/
# make clean   remove what the two made; runs/ stays
#
# PYTHON=python3.12            another interpreter, 3.11 or newer
# PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                              torch without GPU libraries where the default index has only the GPU build
# JOBS=4                       test processes

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/compress-lm run demo

# one thread per process: tiny models gain nothing from more, and JOBS of them share the cores
test: .venv/installed-dev lint docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every link and anchor is checked; a warning is an error
docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the stamps: installing again only when what is installed has changed
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing into .venv: minutes the first time'
	$(PIP) -e '.[gguf]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing into .venv: minutes the first time'
	$(PIP) -e '.[dev]'
	touch $@ .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
