# make tour   see the landmark claims on a real model      make test   everything that must hold
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what is imported is compiled then; compiling all of what is installed would take longer than the tests
PIP := $(BIN)/python -m pip install --quiet --no-compile
JOBS ?= 2
# many tests start Python: what it has compiled is kept
export PYTHONDONTWRITEBYTECODE :=

.PHONY: docs tour test lint types contracts tests test-portable bench clean

tour: $(VENV)/.installed
	$(BIN)/paperworks tour

test: lint types contracts tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

tests: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# the same tests with other kernels than this processor's best: nothing may rest on the last bit
test-portable: $(VENV)/.installed-dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(MAKE) tests
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(MAKE) tests

# the site, in out/site: a page a paper from its result, the guides, the reference from docstrings
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/build.py
	$(BIN)/python -m mkdocs build --quiet --strict -f docs/mkdocs.yml

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("paperworks needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt --group dev --group oracles
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -c constraints.txt --group docs
	touch $@

clean:
	rm -rf $(VENV) out
