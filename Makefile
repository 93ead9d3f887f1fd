# make demo: sets up and runs the main job on real data. make test: sets up and passes the tests.
# Python 3.10 to 3.12, git and make are all that a machine needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt

PARTS  := tests-a-to-d tests-o-to-s tests-e-to-j tests-t-to-z tests-k-to-n

.PHONY: help setup demo test $(PARTS) slow coverage lint benchmark gpu gpu-here clean

help:
	@echo "make demo       segment the demo brain and compare with nnU-Net (3 minutes)"
	@echo "make test       install, lint, type-check and test"
	@echo "make slow       the longer proofs"
	@echo "make coverage   the tests once more, with the lines that they run"
	@echo "make benchmark  measure beside nnU-Net (an hour)"
	@echo "make gpu        all that needs an NVIDIA GPU: tests, sanitizers, benchmarks, one table"
	@echo "make gpu-here   the same with what PYTHON has: nothing is installed"

$(VENV)/.ready: pyproject.toml tests/constraints.txt tests/bindings.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	grep '^tensorrt' tests/bindings.txt | while read pin; do \
	  $(PIP) --no-deps --upgrade --target $(VENV)/bindings/$${pin##*==} $$pin || exit 1; \
	done
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/python benchmarks/demo/run_demo.py --output .demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	$(MAKE) --no-print-directory -j2 $(PARTS)

# two at once, each in a process of its own: signals that a test sends itself can end one that ran all the others before
$(PARTS): tests-%: setup
	$(PYTEST) --junitxml=.pytest_cache/tests-$*.xml tests/test_[$(subst -to-,-,$*)]*.py

coverage: setup
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=xml

slow: setup
	$(PYTEST) -m slow --junitxml=.pytest_cache/slow.xml

benchmark: setup
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/resampling.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/way_back.py
	$(BIN)/python benchmarks/folder_run.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/int8_network.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/tensorrt_build.py

# Without what cannot be installed the rest is measured, and the table says what was missing.
gpu: setup
	$(BIN)/python benchmarks/gpu/measure.py --check
	$(PIP) -e '.[gpu]'
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	$(PIP) 'onnxruntime-gpu[cuda,cudnn]' || $(PIP) onnxruntime
	-$(PIP) -e '.[tensorrt]'
	$(BIN)/python benchmarks/gpu/measure.py

gpu-here:
	PYTHONPATH=$(CURDIR):$(CURDIR)/calibration:$$PYTHONPATH $(PYTHON) benchmarks/gpu/measure.py

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache
