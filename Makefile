# Everything happens in .venv; `make bench` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: bench test test-long lint install clean

bench: .venv/installed
	$(BIN)/peftzoo bench --method unilora --task gsm8k

test: .venv/installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=20

# What takes long: twenty kills of sweeps and of searches, workers of Ray that die, Ctrl-C, two sweeps at once, two
# processes, more of packs, the default budget of LoRA, a board of ten thousand records.
test-long: .venv/installed-all
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long -n 2 --durations=20

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

install: .venv/installed-all

clean:
	rm -rf .venv build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@ .venv/installed

.venv/installed-all: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '.[all]'
	touch $@ .venv/installed .venv/installed-test
