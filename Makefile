# Two commands set everything up on a machine with Python 3.11 or newer and make:
#   make demo    train on handwritten digits, from audit to bundle
#   make test    run the tests
PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data

.PHONY: demo test soak check bench peers clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/goodfit demo

# Two tests at a time, each on a core of its own; then those that need both cores, or that time something, one after another.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not soak and not alone"
	$(BIN)/python -m pytest -m "alone and not soak"

soak: .venv/installed
	$(BIN)/python -m pytest -m soak

check: .venv/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/shape

bench: .venv/installed
	$(BIN)/python benchmarks/loader.py $(DATA)/classify/trashnet/dataset-resized
	$(BIN)/python benchmarks/loader.py $(DATA)/classify/cifar10/cifar10.zip --size 32 --rounds 3 --seconds 1
	$(BIN)/python benchmarks/step_share.py $(DATA)/classify/trashnet/dataset-resized
	$(BIN)/python benchmarks/first_run.py
	$(MAKE) peers

# The other systems, in an environment of their own (5.5 GB), beside goodfit: half an hour on two cores.
.venv-peers/installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install --quiet -r benchmarks/peers.txt
	touch $@

peers: .venv/installed .venv-peers/installed
	$(BIN)/python benchmarks/peers.py $(DATA)/classify/trashnet/dataset-resized --peers $(CURDIR)/.venv-peers/bin/python

clean:
	rm -rf .venv .venv-peers build dist
