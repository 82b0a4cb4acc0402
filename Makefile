# make demo    set everything up, compile SmolLM2-135M to 2.4 bits, load it in a new process, generate
# make test    set everything up, run the tests
# make lint    ruff and mypy
# make golden  rewrite the golden IR dumps (read the diff!)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint golden clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check liftc passes codegen runtime tests examples scripts benchmarks
	$(BIN)/mypy liftc

golden: $(STAMP)
	$(BIN)/python -m pytest -q --update-golden tests

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[quantize,report,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build
