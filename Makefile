# `make demo` and `make test` need nothing but Python and make: both build the environment in .venv that they run in.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

# make demo DATA=file.h5ad PERTURBATION_KEY=... CONTROL=... [CONTEXT_KEY=...] [HOLDOUT=...] [SCALE=counts|log1p]
DEMO_ARGS := $(if $(DATA),--data "$(DATA)") \
	$(if $(PERTURBATION_KEY),--perturbation-key "$(PERTURBATION_KEY)") \
	$(if $(CONTROL),--control "$(CONTROL)") \
	$(if $(CONTEXT_KEY),--context-key "$(CONTEXT_KEY)") \
	$(if $(HOLDOUT),--holdout "$(HOLDOUT)") \
	$(if $(SCALE),--scale "$(SCALE)")

# make test TESTS="tests/pp -k split"; one thread in each process, since many of both only wait for each other
TESTS ?=

.PHONY: help demo journeys test tutorials lint format docs clean

help:
	@echo "make demo    run the main job on simulated cells, or on DATA=file.h5ad PERTURBATION_KEY=... CONTROL=..."
	@echo "make test    run the tests"
	@echo "make journeys  run the code that the landing page and the page on screens show"
	@echo "make tutorials  run the notebooks, and compare what they give with what is stored"
	@echo "make lint    check style and types; make format puts style right"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make clean   remove the environment and everything that was built"

demo: $(STAMPS)/package
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: $(STAMPS)/package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(TESTS)

journeys: $(STAMPS)/package
	$(BIN)/python scripts/journeys.py

tutorials: $(STAMPS)/doc
	OMP_NUM_THREADS=1 $(BIN)/python scripts/tutorials.py

lint: $(STAMPS)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMPS)/doc
	$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs docs/_build/html
	$(BIN)/python scripts/check_links.py docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

clean:
	rm -rf $(VENV) build dist docs/_build docs/generated demo_output

# A stamp is written when its step is done, so that a repeated command finds nothing to install.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("virtualcell needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	bash scripts/install_torch.sh $(BIN)/python
	touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml
	@echo "Installing virtualcell and what it needs (a minute or two, once)."
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(STAMPS)/doc: $(STAMPS)/package
	$(BIN)/python -m pip install --quiet --editable '.[doc]'
	touch $@

$(STAMPS)/lint: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet mypy ruff
	touch $@
