# Two commands do everything: `make demo` and `make test`. Both make .venv from pinned constraints, once.
# While developing, `make check`: lint, types and the fast tests, in under a minute on two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: demo test check lint site course floors release-check soak fashion-mnist chromium clean

demo: $(VENV)/.demo
	$(BIN)/undertow demo

# JAX has a run of its own: a process that has imported it is warned of each fork, and other tests fork.
JAX := tests/frameworks/jax src/undertow/frameworks/jax
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: lint fashion-mnist chromium
	$(PYTEST) $(JAX:%=--ignore=%)
	$(PYTEST) $(JAX)

check: lint
	$(PYTEST) -m "not slow" $(JAX:%=--ignore=%)
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

# The lowest versions that pyproject.toml allows, in an environment of their own.
floors: $(VENV)/.dev
	$(BIN)/python .ci/floors.py

# Both archives, and each extra alone in a clean environment: gigabytes. EXTRAS= is the base, EXTRAS=record,plot these.
EXTRAS ?= record,plot,report,derive,torch,vision,demo,keras,jax,text,clip,ray
release-check: $(VENV)/.dev
	$(BIN)/python .ci/release.py --extras "$(EXTRAS)"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "undertow needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) '.[dev]'
	touch $@

# Real data for the tests; where there is no apt-get, the study downloads it through torchvision.
fashion-mnist:
	@test -e $(FASHION_MNIST) || ! command -v apt-get >/dev/null || \
	    { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y dataset-fashion-mnist; }

# The browser that the tests of the page drive.
chromium:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || \
	    { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y chromium; }

clean:
	rm -rf $(VENV)
