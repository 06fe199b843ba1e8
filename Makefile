# every target sets up .venv from nothing and reuses what is there; PYTHON chooses the interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# the newest Python that the package is for
PYTHON_NEXT ?= python3.13

.DEFAULT_GOAL := help
.PHONY: help demo accuracy test test-large coverage lint dist-check bench clean

help:
	@echo "make demo        two models from training to a library (2 to 3 minutes)"
	@echo "make accuracy    what patterns of zeros cost: table and plots (20 to 60 minutes of CPU time; goes on where it stopped)"
	@echo "make test        the tests"
	@echo "make test-large  the tests with models in their stated sizes (minutes, gigabytes)"
	@echo "make coverage    the tests, and which lines of the package they reach (build/coverage)"
	@echo "make lint        ruff, clang-format, mypy and the floors of imports"
	@echo "make dist-check  sdist and wheel, checked; the wheel tried with PYTHON_NEXT where it is there"
	@echo "make bench       ratios against PyTorch on this machine, on its GPU where it has one"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# stamps: a new setup.cfg installs again, an unchanged one does not
$(VENV)/.all: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[all]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev,all]'
	@touch $@ $(VENV)/.all

demo: $(VENV)/.all
	$(BIN)/tvm-balanced demo --output build/demo

accuracy: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m examples.accuracy.run --workers $(WORKERS) \
	    -o build/accuracy $(ACCURACY_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not large and not gpu' \
	    --durations=20 $(PYTEST_ARGS)

test-large: $(VENV)/.dev
	$(BIN)/python -m pytest -m large --timeout 3600 --durations=20 $(PYTEST_ARGS)

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not large and not gpu' --timeout 600 \
	    --cov --cov-report=term --cov-report=html:build/coverage $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	@# mypy finds the mapped folders only in a regular install
	@# setuptools keeps what an earlier build copied, deleted modules among it
	rm -rf build/lint build/lib
	$(BIN)/python -m pip install --quiet --no-deps --target build/lint .
	cd build/lint && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../setup.cfg \
	    --cache-dir ../../.mypy_cache --python-executable ../../$(BIN)/python -p tvm_balanced
	@# the floors, and no circle
	cd build/lint && PYTHONPATH=. ../../$(BIN)/lint-imports ../../setup.cfg --no-cache
	@# the same install, outside the tree, must work
	PYTHONPATH=build/lint $(BIN)/python tests/smoke.py build/lint

dist-check: $(VENV)/.dev
	@# setuptools keeps what an earlier build copied, deleted modules among it
	rm -rf build/dist build/lib build/wheel build/smoke
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/python -m twine check --strict build/dist/*
	@# where the newest Python is not there, the wheel is tried with the one of the tests
	for python in $(PYTHON_NEXT) $(wildcard $(HOME)/.pyenv/versions/*/bin/$(PYTHON_NEXT)) $(BIN)/python; do \
	    "$$python" -m venv build/wheel 2>/dev/null && break; done
	build/wheel/bin/python --version
	build/wheel/bin/python -m pip install --quiet build/dist/*.whl
	@# outside the tree, whose folders would be imported instead
	mkdir -p build/smoke && cp tests/smoke.py build/smoke
	cd build/smoke && ../wheel/bin/python smoke.py ../wheel

bench: $(VENV)/.dev
	$(BIN)/tvm-balanced bench --set llm --layer 7b-attention --pattern 2:16 --m 1,8,16,32,64 \
	    --peers dense,csr $(BENCH_ARGS)
	$(BIN)/python benchmarks/models.py --model minilm
	$(BIN)/python benchmarks/build_times.py

clean:
	rm -rf build
