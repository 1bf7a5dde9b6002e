# make demo   quantize the shipped model, sample, compare      make test   every check that CI runs
# make docs   the site, into _docs/                             make clean  remove what these commands made
# make results   the tables of README, in hours; goes on where it stopped. PLAN=1 only says what it costs, N=512 draws fewer images
# make gpu    what only a GPU can tell: tests, speed, encoding; in pieces of ten minutes, goes on where it stopped
# Another Python:  make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test docs results gpu clean

help:
	@sed -n 's/^# //p' Makefile

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11; name another, e.g. make test PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet -c constraints.txt pip setuptools wheel
	$(PIP) install --progress-bar off --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/aquatic demo

test: $(STAMP)
	$(BIN)/python tests/gates.py

docs: $(STAMP)
	$(BIN)/python tools/docs.py

results: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/results.py $(if $(PLAN),--plan) $(if $(N),--n $(N))

gpu: $(STAMP)
	$(BIN)/python tools/gpu.py

clean:
	rm -rf $(VENV) _docs _proc _demo build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
