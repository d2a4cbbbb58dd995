# make install, make demo, make test, make test-slow, make check. Needs Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# A folder with a torch wheel, for machines that cannot reach PyTorch's own index.
WHEELS ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu

export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: install demo test test-slow check docs clean
install: $(STAMP)

# torch first: PyPI's Linux build brings gigabytes of CUDA that fedfin does not need. PyTorch's CPU index is asked
# for five seconds; where it cannot be reached, pip's own sources (WHEELS, find-links, a mirror, PyPI) decide.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedfin needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@if $(BIN)/python -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13.0"))' 2>/dev/null; then :; \
	elif test -n "$(WHEELS)"; then $(BIN)/python -m pip install --find-links "$(WHEELS)" torch==2.13.0; \
	elif test "$$(uname)" = Linux && $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
		$(BIN)/python -m pip install --index-url $(CPU_INDEX) torch==2.13.0; \
	else echo "PyTorch's CPU index is not used or not reachable: pip's own sources decide the build of torch"; \
		$(BIN)/python -m pip install torch==2.13.0; fi
	@$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/fedfin demo $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --timeout 900 $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

docs: $(STAMP)
	@$(BIN)/python -m fedfin.cli_reference docs

clean:
	rm -rf $(VENV) build dist *.egg-info
