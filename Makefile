# `make demo` and `make test` work on a fresh clone: they make .venv themselves, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
MODEL ?= flux-picturebook
# Tiny models gain nothing from threads: one test process a core, one thread each; a file's tests share what it makes.
WORKERS ?= -n auto --dist loadfile
test test-oldest: export OMP_NUM_THREADS ?= 1

export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-oldest lint types docs wheel check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# Two stamps, so that the demo waits for nothing but what it runs on.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dit-probe into $(VENV) (once)"
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.env: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dit-probe with its test, lint and docs tools into $(VENV) (once)"
	$(PIP) install --quiet -c constraints.txt -e ".[test-all,dev,docs]"
	@# It names torchvision, which breaks transformers beside a CPU build of torch, and does without.
	$(PIP) install --quiet --no-deps -c constraints.txt attention-map-diffusers
	touch $(VENV)/.core $@

env: $(VENV)/.env  ## the environment of every other target

demo: $(VENV)/.core  ## a prompt, an image, a store, three kinds of concept map: demo.html; MODEL=sd35-picturebook
	$(BIN)/dit-probe demo --model $(MODEL) --out demo.html $(ARGS)

# Tests in a browser need Chromium (apt install chromium), and are skipped where there is none.
test: $(VENV)/.env  ## the tests and every example of the docstrings and the README; ARGS="-k store"
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

$(VENV)-oldest/.env: pyproject.toml constraints-oldest.txt
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@

test-oldest: $(VENV)-oldest/.env  ## the oracles and the tracing on the oldest diffusers that is supported
	$(VENV)-oldest/bin/python -m pytest $(WORKERS) tests/test_conformance.py tests/test_conformance_guided.py tests/test_tracing.py tests/test_tracing_ends.py tests/test_wrong_use.py tests/test_encoding.py tests/test_verification.py tests/test_unknown_models.py tests/test_refused.py tests/test_robustness_models.py tests/test_robustness_pipelines.py tests/test_robustness_caches.py tests/test_hunyuan.py

lint: $(VENV)/.env  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.env  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.env  ## the site, strictly, with the tutorials executed: a broken link or a finding that fails is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.env  ## the wheel, with a look inside
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(BIN)/python tests/wheel_contents.py dist/*.whl

check: test test-oldest lint types docs wheel  ## everything that CI runs

format: $(VENV)/.env  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## forget everything that was made
	rm -rf $(VENV) $(VENV)-oldest dist site .tutorials demo.html demo.zarr .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
