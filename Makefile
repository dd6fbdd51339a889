# Everything that a newcomer or CI calls. `make demo` and `make test` set up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

QUICK := not slow and not gpu and not chart and not browser
TOOLS := .tools/.installed
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: images setup demo test test-all test-chart test-browser test-gpu test-gpus lint proto bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/system-packages.sh
	bash scripts/system-packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing torch and the rest into $(VENV): some minutes, 2 GB"
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[engine,mooncake,ray,test]'
	$(BIN)/python -c 'from baton.kernels import cpu; cpu.load()'
	touch $(STAMP)

demo: setup
	$(BIN)/python examples/demo.py

# Two files at a time; then, one by one, what has times to keep.
test: setup lint
	$(BIN)/python -m pytest -m '$(QUICK) and not alone' --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m '$(QUICK) and alone'

test-all: setup lint $(TOOLS)
	bash scripts/system-packages.sh browser
	$(BIN)/python -m pytest -m 'not gpu'

test-chart: setup $(TOOLS)
	$(BIN)/python -m pytest tests/chart -m 'not slow'
	.tools/venv/bin/hadolint deploy/images/*.Dockerfile

test-browser: setup
	bash scripts/system-packages.sh browser
	$(BIN)/python -m pytest -m browser

$(TOOLS): scripts/chart-tools.sh
	bash scripts/chart-tools.sh

# Pushed as well, if REGISTRY is given.
images:
	for name in router worker-cpu worker-cuda kvstore; do \
	    docker build --file deploy/images/$$name.Dockerfile --tag $(if $(REGISTRY),$(REGISTRY)/)baton-$$name:$(VERSION) . || exit 1; \
	    $(if $(REGISTRY),docker push $(REGISTRY)/baton-$$name:$(VERSION) || exit 1;) \
	done

test-gpu:
	$(PYTHON) -m pytest tests/kernels -m 'not gpus'

# On a machine with two GPUs.
test-gpus:
	$(PYTHON) -m pytest tests/kernels -m gpus

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	bash scripts/protos.sh --check
	$(BIN)/python scripts/chart_schema.py --check
	$(BIN)/python scripts/dashboards.py --check

proto: setup
	bash scripts/protos.sh

bench: setup
	$(BIN)/python benchmarks/serving.py

clean:
	rm -rf $(VENV) .tools .pytest_cache .ruff_cache .hypothesis .import_linter_cache
