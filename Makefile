# Two commands do everything: `make demo` and `make test`. Both make .venv from pinned constraints, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: demo test fashion-mnist clean

demo: $(VENV)/.demo
	$(BIN)/undertow demo

test: $(VENV)/.dev fashion-mnist
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

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

clean:
	rm -rf $(VENV)
