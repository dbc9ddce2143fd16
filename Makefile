# Everything on a fresh machine: `make demo` runs the main job, `make test` the tests. Both set up what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs/demo

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint format clean help

demo: $(VENV)/.installed  ## the three stages and closed loop in the simulator; report in outputs/demo
	$(BIN)/lapa demo --output $(OUTPUT) $(ARGS)

test: $(VENV)/.installed  ## the default tests, a process per core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed  ## the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed .mypy_tree/lapa  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.mypy_tree $(BIN)/mypy -p lapa

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_tree build dist *.egg-info

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed (Debian: apt-get install python3 python3-venv)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "The venv module is missing (Debian: apt-get install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# mypy does not follow the editable install's folder mapping; a tree of links shows it the package as installed.
.mypy_tree/lapa: setup.py
	@rm -rf .mypy_tree && mkdir -p .mypy_tree/lapa
	@for file in lapa/*.py lapa/py.typed; do ln -s ../../$$file .mypy_tree/lapa/; done
	@for folder in configuration processing modeling_lapa data training evaluation serving conversion hub_cards; do \
		ln -s ../../$$folder .mypy_tree/lapa/$$folder; done
