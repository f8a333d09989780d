# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both start with `make env`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= hasten-demo

.PHONY: env demo test lint docs clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hasten needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[optimize,openvino,demo,dev,docs]'
	touch $@

demo: env
	$(BIN)/hasten demo --out $(OUT)

test: env lint docs
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pydoclint --quiet src

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
