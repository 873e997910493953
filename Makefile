# `make demo` and `make test` do everything on a fresh machine: set-up, download of the model, and the work itself.
# The second time nothing is installed again. After a set-up that broke, the environment is made anew.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test test-oracle lint format fetch bench-memory kernels-compile bench-kernels pictures site serve clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(READY) ## a real model through all three caches, side by side
	@$(BIN)/minipaged demo

test: $(READY) ## all tests; those of the real model are skipped, and say so, if it cannot be fetched
	@$(BIN)/minipaged fetch || echo "(going on without the model)"
	@$(BIN)/python -m pytest

test-oracle: $(VENV)/.oracle ## compare with transformers on the real model (several minutes)
	@$(BIN)/minipaged fetch
	@$(BIN)/python -m pytest -m oracle -s

lint: $(READY) ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## bring the style into line
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

fetch: $(READY) ## bring SmolLM2 to this machine
	@$(BIN)/minipaged fetch

bench-memory: $(READY) ## cost of the allocator's operations from 10^3 to 10^6 blocks
	@$(BIN)/python -m minipaged.memory.bench

kernels-compile: $(READY) ## compile every Triton kernel for four GPUs, with none in the machine: registers, spills, loads
	@$(BIN)/python -m minipaged.kernels.compile --targets sm_80,sm_90,sm_100,gfx942

bench-kernels: $(READY) ## check the kernels and, where there is a GPU, time them beside their peers
	@$(BIN)/python -m minipaged.kernels.bench

pictures: $(READY) ## draw the pictures of the README and the site again
	@$(BIN)/minipaged trace tutorials/traces/two_requests.json --step 8 --svg docs/two_requests.svg > /dev/null

site: $(VENV)/.docs ## build the site into site/
	@$(BIN)/mkdocs build --strict --quiet

serve: $(VENV)/.docs ## the site on http://localhost:8000, rebuilt as you write
	@$(BIN)/mkdocs serve

clean: ## remove the environment and everything built
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The mark is written last. An environment without it was never finished, and is not mended but made anew.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minipaged needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version`: make PYTHON=python3.12 ..."; exit 2; }
	@test -f $(READY) || { echo "making the environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $(READY)
	@echo "installing minipaged and its tools into $(VENV)"
	@$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

$(VENV)/.docs: $(READY)
	@echo "installing what the site needs"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.oracle: $(READY)
	@echo "installing transformers, to compare with"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[oracle]'
	@touch $@
