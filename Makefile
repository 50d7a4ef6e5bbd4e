# The commands of this project. Each does the set-up that it needs, so a fresh clone starts with any of them.
#
#   make demo     two Blender processes render, a DataLoader receives: examples/datagen/minimal.py
#   make test     all tests, in two processes; a selection, in one: make test ARGS="-n 0 tests/blendtorch_shm -k ring"
#   make lint     ruff and mypy
#   make bench    the benchmarks, a quarter of an hour; a selection: make bench ARGS="-k 480"; the whole is kept
#   make bench-report   docs/benchmarks.md, with plots, from what the last whole run measured
#   make fuzz     what parses foreign bytes, a minute each; one: make fuzz ARGS="dtype -runs=1000000"
#   make soak     what `make test` does a part of, in full: processes killed by the thousand, frames by the million, Ctrl-C at
#                 every place; the model explored further: an hour at most
#   make scenes   random scenes against Blender's own final renders, 2 000 of them; other numbers: make scenes ARGS="--scenes 100"
#   make test-versions   what concerns Blender with each version of it: bpy 4.2, 4.5, 5.0, 5.2, an executable
#   make clean    remove the environment and what the tools left
#
# PYTHON=/path/to/python3.13 names the Python; VENV=folder puts the environment elsewhere than in .venv.

VENV ?= .venv
PYTHON ?=
ARGS ?=

# The environment holds all that is needed, and nothing else should be found.
unexport PYTHONPATH PYTHONHOME

SET_UP = @tools/set-up "$(VENV)" "$(PYTHON)"
BIN = $(VENV)/bin

.PHONY: demo test lint format bench bench-report fuzz soak scenes test-versions clean
.DEFAULT_GOAL := demo

demo:
	$(SET_UP)
	@$(BIN)/python examples/datagen/minimal.py $(ARGS)

test:
	$(SET_UP) tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --benchmark-disable $(ARGS)

lint:
	$(SET_UP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format:
	$(SET_UP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench:
	$(SET_UP)
	@mkdir -p .benchmarks
	@$(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/$(if $(ARGS),selection,latest).json $(ARGS)

bench-report:
	$(SET_UP)
	@$(BIN)/python -m benchmarks.report .benchmarks/latest.json

fuzz:
	$(SET_UP)
	@$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	@$(BIN)/python -m tests.fuzz.coverage_guided $(ARGS)

soak:
	$(SET_UP) tests
	@BLENDTORCH_TESTS=all $(BIN)/python -m pytest -m long -rP $(ARGS)
	@$(BIN)/python -m tests.model

scenes:
	$(SET_UP) tests
	@$(BIN)/python -m tests.blender_side.random_scenes $(ARGS)

test-versions:
	$(SET_UP) tests
	@tools/test-versions "$(VENV)" $(ARGS)

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
