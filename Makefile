# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
# Tests and kills are real processes: one worker a core.
WORKERS ?= auto
PYTEST_ARGS ?=
FIGURES ?= figures

.PHONY: install demo test test-s3 test-deep lint bench clean

install: $(VENV)/.installed

# PyTorch comes first and through pip, which finds the CPU build; uv then resolves the rest in seconds.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch uv
	$(UV) -c constraints.txt -e '.[hf,lightning,s3,dev]'
	# The oldest minor release of Lightning that is supported, next to the newest, for tests/lightning.
	$(UV) --target $(VENV)/lightning-2.5 --no-deps lightning==2.5.6 pytorch-lightning==2.5.6
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# What uses S3, against the server that SPOT_TEST_S3_ENDPOINT names, with credentials as every AWS client finds them.
test-s3: install
	$(BIN)/python -m pytest -m s3 -n $(WORKERS) --dist worksteal --session-timeout 1800 $(PYTEST_ARGS)

# The durability tests again with many more histories, kills and damaged files: some tens of minutes.
test-deep: install
	SPOT_TEST_DEEP=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/durability

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Half an hour. Figures and the picture go to $(FIGURES).
bench: install
	mkdir -p $(FIGURES)
	$(BIN)/python benchmarks/stall.py --size all --json $(FIGURES)/stall-hf.json
	$(BIN)/python benchmarks/stall.py --trainer lightning --size all --json $(FIGURES)/stall-lightning.json
	$(BIN)/python benchmarks/storage.py --size lora --repeat 3 --json $(FIGURES)/storage.json
	$(BIN)/python benchmarks/steady.py --repeat 2 --saves 30 --json $(FIGURES)/steady.json
	$(BIN)/python benchmarks/relaunch.py --repeat 1 --json $(FIGURES)/relaunch.json
	$(BIN)/python benchmarks/plot.py $(FIGURES)/stall-hf.json $(FIGURES)/stall-lightning.json $(FIGURES)/storage.json \
		--plot $(FIGURES)/performance.png

clean:
	rm -rf $(VENV) dist runs
