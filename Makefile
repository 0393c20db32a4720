# Each target does all set-up a fresh machine needs: its own .venv, the pinned packages, then the work.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
IMAGES ?=
ARGS ?=

.PHONY: quickstart test faults plans docs lint install clean

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

install: $(VENV)/.installed

# make quickstart [IMAGES=folder] [ARGS="--budget=0.2"]
quickstart: install
	$(BIN)/python launch/quickstart.py $(if $(IMAGES),--images=$(IMAGES)) $(ARGS)

# a worker that crashes is not replaced: with --dist loadfile the tests would wait for the new one for ever
test: install
	$(BIN)/python -m pytest -q -m "not slow and not faults" -n auto --dist loadfile --max-worker-restart=0 $(ARGS)

# kills, corrupts and fills for real: runs/faults/summary.json and the table in docs/reliability.md
faults: install
	$(BIN)/python -m pytest -q -m faults -n 3 --dist loadfile --max-worker-restart=0 tests/faults $(ARGS)

# every report of docs/plans, predicted from programs compiled for TPUs that are not there: hours on two cores, resumable
plans: install
	$(BIN)/python -m pip install --quiet --editable '.[tpu]'
	$(BIN)/python benchmarks/plans.py $(ARGS)

# the API reference, from docstrings: open docs/_build/index.html
docs: install
	$(BIN)/python docs/build_api.py

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
