# The menu. Every job sets itself up: Python ≥ 3.11 and a package index are all it needs.
SHELL := bash
CONFIG ?=
ARGS ?=
# First of these that is new enough; name another with PYTHON=…
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# cpu | cuda12 | cuda13 | tpu: which locked packages. Found out when absent.
ACCEL ?= $(shell if [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then echo tpu; \
	elif v=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n1) \
	&& [ -n "$$v" ]; then [ $${v%%.*} -ge 580 ] && echo cuda13 || echo cuda12; else echo cpu; fi)
LOCK := $(if $(filter cpu,$(ACCEL)),requirements.lock,locks/$(ACCEL).lock)
BIN := .venv/bin
READY := .venv/.ready-$(ACCEL)
# Hashing and network time go to the job, not to looking for newer versions of pip.
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# mkdocs-material announces its successor at each build.
export NO_MKDOCS_2_WARNING = 1

.PHONY: help setup precompute train demo docs check format test test-all mistreat stress reference integrations package fuzz golden bench lock clean
help: ## this menu
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv from the lock files (ACCEL=cpu|cuda12|cuda13|tpu, PYTHON=…)

precompute: $(READY) ## run the teacher once and seal a cache (CONFIG=file.toml ARGS="--flag value")
	@$(BIN)/decant precompute $(CONFIG) $(ARGS)

train: $(READY) ## train a student from the cache (CONFIG=file.toml ARGS="--flag value")
	@$(BIN)/decant train $(CONFIG) $(ARGS)

demo: precompute train ## both, then the student judged and a page of what it learned
	@$(BIN)/decant evaluate
	@$(BIN)/decant report

docs: $(READY) ## build the pages of docs/ into build/docs
	$(BIN)/mkdocs build --strict
	@echo "docs: open build/docs/index.html; for its search, $(BIN)/python -m http.server -d build/docs"

check: $(READY) ## linters, formatting, types, links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict

format: $(READY) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
test: $(READY) ## the tests of every change, in under 40 minutes on two cores; none needs torch
	$(PYTEST) -m "not slow and not mistreat and not reference and not integrations and not package" $(ARGS)

test-all: $(READY) ## these and the slow ones, which repeat their promises at full length
	$(PYTEST) -m "not mistreat and not reference and not integrations and not package" $(ARGS)

mistreat: $(READY) ## thousands of flips, cuts, swaps and deletions in the files of a cache and of a run
	$(PYTEST) -m mistreat -s $(ARGS)

stress: $(READY) ## all commands at once on one cache, with random kills (ARGS="--seconds 300 --actors 4")
	$(BIN)/python -m tests.stress $(ARGS)

reference: .venv/.reference ## comparison with Hugging Face transformers (installs torch and transformers)
	$(BIN)/python -m pytest -m reference -s $(ARGS)

integrations: .venv/.integrations ## logs to Weights & Biases and MLflow, the real libraries, offline (installs them)
	$(BIN)/python -m pytest -m integrations $(ARGS)

package: $(READY) ## build the sdist that workers install, and try it in environments of its own
	$(BIN)/python -m pytest -m package $(ARGS)

fuzz: .venv/.fuzz ## readers of foreign files against hostile ones, by coverage (ARGS="gguf 300": one target, seconds)
	$(BIN)/python -m tests.fuzzing $(ARGS)

.venv/.fuzz: $(READY)
	$(BIN)/python -m pip install -q $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["fuzz"])')
	@touch $@

golden: .venv/.reference ## make the families' golden files anew, by Hugging Face transformers
	$(BIN)/python tests/golden/families/make.py $(ARGS)

.venv/.integrations: $(READY)
	$(BIN)/python -c 'import tomllib; e = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*e["wandb"][1:], *e["mlflow"][1:], sep="\n")' > .venv/integrations.txt
	$(BIN)/python -m pip install -q -r .venv/integrations.txt
	@touch $@

.venv/.reference: $(READY)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["reference"], sep="\n")' > .venv/reference.txt
	$(BIN)/python -m pip install -q -r .venv/reference.txt
	@touch $@

bench: precompute ## what we claim about speed, as tables (codecs.py and forward.py say what else they need)
	for b in capture head training; do $(BIN)/python -m benchmarks.$$b || exit 1; done

lock: $(READY) ## resolve the lock files anew
	$(BIN)/uv pip compile $(COMPILE) --extra dev --upgrade -o requirements.lock
	for a in cuda12 cuda13 tpu; do \
		$(BIN)/uv pip compile $(COMPILE) --extra dev --extra $$a -c requirements.lock -o locks/$$a.lock; done
COMPILE := pyproject.toml -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

clean: ## remove .venv (caches and runs stay)
	rm -rf .venv

# The stamp is written last, so an interrupted setup is repeated. uv installs in seconds what takes
# pip minutes; where it cannot (an index that only pip is configured for), pip does the same.
$(READY): $(LOCK) locks/embedded-teacher.lock
	@test -n "$(PYTHON)" || { echo "no Python ≥ 3.11 found; install one or set PYTHON=…" >&2; exit 1; }
	@echo "setup: .venv for $(ACCEL) from $(LOCK)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@grep -A99 '^uv==' $(LOCK) | awk 'NR == 1 || /^ +--hash/ {print; next} {exit}' > .venv/uv.lock
	@$(BIN)/python -m pip install -q --require-hashes -r .venv/uv.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r $(LOCK) \
		|| $(BIN)/python -m pip install -q --require-hashes -r $(LOCK)
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r locks/embedded-teacher.lock \
		|| $(BIN)/python -m pip install -q --no-deps --require-hashes -r locks/embedded-teacher.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e . \
		|| $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@rm -f .venv/.ready-*; touch $@
