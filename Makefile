# Everything a developer or a CI does, one line each. `make run` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
SEEDS ?= 100
BIN := .venv/bin
READY := .venv/.ready

.PHONY: venv run test lint type sim chaos bench format clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "everstep needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "'$(PYTHON)' cannot make environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

run: $(READY)  # from step 0 each time; to go on from the newest checkpoint: .venv/bin/everstep run examples/gpt.yaml
	$(BIN)/everstep run examples/gpt.yaml --set checkpoint.resume=never --result runs/gpt.json

test: $(READY)
	tests/debian-packages.sh
	$(BIN)/pytest -q --ignore=tests/chaos

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

type: $(READY)
	$(BIN)/mypy

sim: $(READY)
	EVERSTEP_SEEDS=$(SEEDS) $(BIN)/pytest -q --timeout=0 tests/simulation

chaos: $(READY)  # about six minutes of killing, freezing and cutting
	tests/debian-packages.sh
	$(BIN)/pytest -q tests/chaos

bench: $(READY)  # without the soak, which takes an hour: .venv/bin/python benchmarks/soak.py
	set -e; for file in $(filter-out benchmarks/soak.py,$(sort $(wildcard benchmarks/*.py))); do $(BIN)/python $$file; done

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist src/everstep.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
