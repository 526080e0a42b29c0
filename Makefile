# Two commands do all the set-up: `make train` and `make test`. PYTHON is any Python from 3.11 on with venv.
PYTHON ?= python3
BIN := .venv/bin
# Two workers: their compiles fit two cores and 24 GiB. A file stays with one worker, as its tests share what it made; in
# the order of their names, as those of few tests, which would come last, are the longest.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test test-slow test-interop lint perf crash bitflips bench clean

# The packages are what requirements.txt pins; the marker is newer than it once they are installed.
.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/installed-interop: .venv/installed-dev requirements-interop.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-interop.txt
	touch $@

train: .venv/installed
	$(BIN)/python -m maxscale.train --config configs/tiny.py

test: .venv/installed-dev lint
	$(PYTEST)

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

test-interop: .venv/installed-interop
	$(PYTEST) tests/interop tests/models/test_parity.py tests/models/test_plain.py tests/models/test_rope.py \
	  tests/models/test_router.py tests/models/test_experts.py tests/data/test_data_chat.py tests/test_docs.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

perf: .venv/installed-dev
	$(BIN)/python -m maxscale.perf.gate

crash: .venv/installed-dev
	$(BIN)/python -m tests.crash --times 10

bitflips: .venv/installed-dev
	$(BIN)/python -m tests.checkpoint.bitflips --flips 60

bench: .venv/installed-dev
	$(BIN)/python -m maxscale.bench

clean:
	rm -rf .venv runs
