# Each target does its own set-up: a virtual environment in .venv, made once and refreshed when the
# metadata or the extension's sources change. Tests marked slow run with `make nightly`. JOBS is how
# many processes share the tests: most of them use one core. `make gpu-check` measures the kernels on
# a GPU; with DRY_RUN=1 it says how.
PYTHON ?= python3
VENV ?= .venv
TESTS ?= -m "not slow"
JOBS ?= 2
OUT ?= demo-out

BUILD_FILES := pyproject.toml setup.py CMakeLists.txt dinov2_fast/__init__.py \
               $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
BIN := $(VENV)/bin

.PHONY: build format check test nightly bench gpu-check clean demo

build: $(VENV)/installed-dev

$(VENV)/installed: $(BUILD_FILES)
	@echo "Setting up $(VENV); PyTorch is a large download the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# By name: what is installed satisfies it, so extras come without building the kernels once more.
$(VENV)/installed-%: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'dinov2-fast[$*]'
	touch $@

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -p no:benchmark $(TESTS)

nightly: TESTS =
nightly: test bench

bench: $(VENV)/installed-dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu-check: $(VENV)/installed-dev
	$(BIN)/python -m tools.gpu_check $(if $(DRY_RUN),--dry-run)

demo: $(VENV)/installed-demo
	$(BIN)/dinov2-fast demo --out $(OUT)

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .pytest_cache .ruff_cache
	rm -f dinov2_fast/_native*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
