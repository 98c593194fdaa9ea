# Each target sets up all it needs: a virtual environment with pinned packages. Needs Python >= 3.11, nothing else.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
JOBS ?= 2
SETUP := setup.py pyproject.toml constraints.txt

.PHONY: help train test tests test-fast test-portable lint bench exactness audit gpu clean

help:
	@echo "make train  train a small sentence encoder on this machine's own documentation, one to three minutes"
	@echo "make test   lint, type check and run the tests"
	@echo "make test-fast  the quick ones of them, for after each edit"
	@echo "make test-portable  the numeric ones as other processors, libraries, threads and locales would run them"
	@echo "make bench  speed and memory of the loss against its rivals on this machine"
	@echo "make exactness  error of loss and gradients against float64, by dtype, batch size and backend"
	@echo "make audit  compile the GPU kernels for six chips, no GPU needed: registers, spills, shared memory"
	@echo "make gpu    GPU tests and benchmarks with the python at hand (bench/gpu.sh)"

train: $(VENV)/.ready-train
	$(RUN)/clusterns train --output-dir runs/demo --overwrite-output-dir

test: $(VENV)/.ready-test
	$(MAKE) -j 2 lint tests  # side by side: tests that wait for processes leave room

tests: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: $(VENV)/.ready-test
	$(RUN)/ruff check .
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" -k "not triton"

test-portable: $(VENV)/.ready-test
	$(RUN)/python tests/portable.py --jobs $(JOBS)

lint: $(VENV)/.ready-test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(VENV)/.ready-test
	$(RUN)/python bench/run.py --output bench/results
	$(RUN)/python -m pytest bench --benchmark-only

exactness: $(VENV)/.ready-test
	TRITON_INTERPRET=1 $(RUN)/python bench/run.py exactness --dim 256 --output bench/results

audit: $(VENV)/.ready-test
	$(RUN)/python bench/audit.py --output bench/results/audit.csv

gpu:
	bash bench/gpu.sh

$(VENV)/.ready-%: $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "clusterns needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
