# Everything a newcomer needs: `make quickstart`, `make test`. Both work in a fresh clone with Python 3.11+, git, make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-full test-vllm lint clean

quickstart: .venv/run
	$(BIN)/orpo-distill quickstart

test: .venv/dev lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-full: .venv/dev lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not vllm"

# Installs vLLM's CPU build into benchmarks/.venv/vllm first, about 2 GB.
test-vllm: .venv/dev
	$(BIN)/python -m pytest -m vllm tests/samplers/test_vllm.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch's range ends at 2.13.x: newer wheels for Linux bring gigabytes of CUDA libraries that a CPU run does not need.
.venv/run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'torch>=2.13,<2.14'
	$(BIN)/python -m pip install --quiet --editable '.[hf]'
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis
