# make demo, make test: all the set-up on a fresh machine, then the job. Neither needs a GPU.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h graphcache/_C/*.h)
# numpy: torch warns without it, and warnings are errors in tests. pytest-xdist: tests on all cores.
# hypothesis: the fuzzer. mypy and ruff: what `test` checks, each at one version, as new ones bring new rules.
TOOLS := setuptools ninja numpy wrapt tqdm pytest pytest-xdist hypothesis ruff==0.17.6 mypy==2.4.1 types-tqdm

.PHONY: demo test fuzz lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/python examples/plain_module.py
	$(BIN)/python examples/weak_refs.py
	$(BIN)/python examples/char_decode.py

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

fuzz: $(VENV)/.built
	$(BIN)/python -m tests.fuzz --sequences 10000 --jobs 2 --out fuzz-emulated.json

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check $(TOOLS)
	touch $@

# --no-build-isolation: the helper is built against the torch above (see setup.py).
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info graphcache/_C/_built.py graphcache/_C/*.so
