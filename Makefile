# Two commands do everything: `make demo` and `make test`. Both make .venv from pinned constraints, once.
# While developing, `make check`: lint, types and the fast tests, in under a minute on two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE :=  # tests start many processes, and each would compile our sources anew
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: demo test check lint test-rest test-jax ruff types site course floors newest release-check soak fashion-mnist chromium clean

demo: $(VENV)/.demo
	$(BIN)/undertow demo

# JAX has a run of its own: a process that has imported it is warned of each fork, and other tests fork.
# Tests of one group run in one process, so that what they share is made once.
JAX := tests/frameworks/jax src/undertow/frameworks/jax
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
REST := -n 2 --dist loadgroup $(JAX:%=--ignore=%)

# Two targets at a time: packages beside the data and the browser; then types and JAX's tests beside all others.
test:
	$(MAKE) --no-print-directory --jobs 2 $(VENV)/.dev chromium
	$(MAKE) --no-print-directory ruff
	$(MAKE) --no-print-directory --jobs 2 test-rest test-jax

test-rest: $(VENV)/.dev
	$(PYTEST) $(REST)

test-jax: types
	$(PYTEST) $(JAX)

check: lint
	$(PYTEST) -m "not slow" $(REST)
	$(PYTEST) -m "not slow" $(JAX)

# Attacks the library for MINUTES, and counts what must not happen; not part of the tests.
MINUTES ?= 45
soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

# The documentation, in site/: it opens from the disk. Its tests build it too.
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The course as notebooks, beside the text that they are made of.
course: $(VENV)/.dev
	$(BIN)/jupytext --to ipynb --set-kernel python3 docs/course/[1-9]-*.md

# The lowest versions that pyproject.toml allows, and the newest on the index, in an environment of their own.
floors newest:
	$(PYTHON) .ci/versions.py $@

# Both archives, and each extra alone in a clean environment: gigabytes. EXTRAS= is the base, EXTRAS=record,plot these.
EXTRAS ?= record,plot,report,derive,torch,vision,demo,keras,jax,text,clip,ray
PYTHONS ?= $(BIN)/python
WITHOUT ?=
release-check: $(VENV)/.dev
	$(BIN)/python .ci/release.py --extras "$(EXTRAS)" --pythons "$(PYTHONS)" --without "$(WITHOUT)"

lint: ruff types

ruff: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(VENV)/.demo: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	touch $(VENV)/.demo $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "undertow needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# Real data for the tests; where there is no apt-get, the study downloads it through torchvision.
fashion-mnist:
	@test -e $(FASHION_MNIST) || ! command -v apt-get >/dev/null || \
	    { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y dataset-fashion-mnist; }

# The browser that the tests of the page drive; after the data, as one apt-get runs at a time.
chromium: fashion-mnist
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || \
	    { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y chromium; }

clean:
	rm -rf $(VENV)
