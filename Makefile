# make demo, make test and make lint set up what they need in .venv; they ask for nothing but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= output/demo
EPOCHS ?= 12

.PHONY: install demo test lint format clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: install
	$(BIN)/python main_deit.py --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32 --epochs $(EPOCHS)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) output
