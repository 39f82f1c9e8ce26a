# The commands to remember: make setup | run | serve | test | lint | bench
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= Why is the sky blue?
MODEL ?= smollm2:135m
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup run serve test lint bench sanitize clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The stamps carry the Python version: another PYTHON makes the environment anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = $(VENV)/.installed-$(VERSION)
TESTED = $(VENV)/.tested-$(VERSION)

# Once, with what is wanted: every install builds the project in an environment of its own, which costs half a minute.
define install
	@test -e $(INSTALLED) || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(1)'
	@echo "Compiling the CPU kernels ..."
	@$(BIN)/python -c "from tars_jax import kernels; print(kernels.unavailable_reason() or f'using {kernels.isa()}')"
	@touch $(INSTALLED)
endef

$(INSTALLED): pyproject.toml
	@echo "Setting up $(VENV) with Python $(VERSION) (a minute or two) ..."
	$(call install,)

$(TESTED): pyproject.toml
	@echo "Setting up $(VENV) with Python $(VERSION), and what the tests and the linter need ..."
	$(call install,[dev])
	@touch $@

setup: $(INSTALLED) ## Create .venv and install the project

run: setup ## Answer PROMPT="..." with MODEL=smollm2:135m, in the terminal
	@$(BIN)/tars run $(MODEL) "$(PROMPT)"

serve: setup ## Start the server on 127.0.0.1:11434
	@$(BIN)/tars serve

# In the order of the files, not by their number of tests: the few long ones of tests/integration must not come last.
test: $(TESTED) ## Run all tests (pulls the default model, about 93 MB, once)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(TESTED) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## Measure prefill, decode, start-up and memory
	@$(BIN)/tars bench --model $(MODEL)

# Leaks are not looked for: the interpreter and XLA keep memory until the process ends.
SANITIZED = TARS_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
PRELOADED = LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0

sanitize: $(TESTED) ## Run the kernel tests under the address and undefined-behaviour sanitizers (some minutes)
	@$(SANITIZED) $(BIN)/python -c "from tars_jax.kernels import build; print(build.ensure())"
	@$(SANITIZED) $(PRELOADED) $(BIN)/python -m pytest -q tests/test_kernels.py

clean: ## Remove everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
