# Needs Python 3.11 or later; demo, test, lint and docs install the rest in .venv.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
OUTPUT ?= output/demo
EPOCHS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo gpu docs test test-slow test-rest test-oldest lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# INDEX: the --index-url that pytorch.org shows for the CPU build.
install: $(VENV)/installed ## install the tested versions in .venv (INDEX=URL: a CPU build of torch)

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	@echo "Installing torch and the rest into $(VENV): about 5 GB with CUDA, a few minutes. For a smaller CPU build: make install INDEX=URL"
	$(PYTHON) -m venv $(VENV)
	$(if $(INDEX),$(BIN)/python -m pip install --quiet torch torchvision -c constraints.txt --index-url $(INDEX))
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

# On the CPU, with two processes: for a small model they are faster than two threads. Last digits depend on machine and torch.
SHAPES := --device cpu --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32
demo: install ## train, evaluate and visualize on SHAPES, which needs no download, in minutes (EPOCHS=2)
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=2 main_deit.py $(SHAPES) \
		--epochs $(EPOCHS) --batch-size 32 --lr 8e-3 --warmup-epochs 1 --warmup-lr 1e-3 --drop-path 0 --num_workers 1 \
		--no-repeated-aug --aa '' --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --no-model-ema --overwrite --output_dir $(OUTPUT)
	$(BIN)/python main_deit.py $(SHAPES) --eval --resume $(OUTPUT)/checkpoint.pth
	$(BIN)/python visualize.py $(SHAPES) --resume $(OUTPUT)/checkpoint.pth --output_dir $(OUTPUT)/pictures \
		--batch-size 12 --score
	$(BIN)/python visualize.py --log $(OUTPUT) --output_dir $(OUTPUT)/pictures
	@echo "Learning curves: $(OUTPUT)/pictures/curves.png; selections of 12 images: $(OUTPUT)/pictures/seed0_contact.png"
	@echo "(Selection follows class attention: this small network may recognize a ring or a cross by its surroundings.)"
	@echo "Next, a pretrained ViT on your photo: $(BIN)/python visualize.py --model deit_tiny_patch16_224 --evolve --resume WEIGHTS.pth --img-path PHOTO.jpg --output_dir $(OUTPUT)/photo"

# Uses the Python at hand, with its torch for the GPU. Resumes where it stopped.
gpu: ## measure everything that needs a GPU, 8 minutes (FOLDER=... for the rows)
	$(PYTHON) experiments/gpu.py --output $(or $(FOLDER),docs/benchmarks)

docs: install ## rewrite the tables of README and docs from the measured rows
	$(BIN)/python -m experiments.tables

# Two halves in parallel. Each prints when it is done, if make supports that.
test: install ## all tests
	@echo "Testing, several minutes ..."
	@$(MAKE) --jobs=2 --keep-going $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) test-slow test-rest

test-slow: install ## tests that start processes
	$(BIN)/python -m pytest -m slow

test-rest: install ## all other tests
	$(BIN)/python -m pytest -m 'not slow'

# The lowest versions that requirements.txt allows, in their own environment.
test-oldest: $(OLDEST)/installed ## test-rest with the oldest supported versions
	$(OLDEST)/bin/python -m pytest -m 'not slow'

$(OLDEST)/installed: requirements.txt requirements-dev.txt
	@echo "Installing the oldest supported versions into $(OLDEST): about 5 GB, a few minutes."
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/>=([0-9.]+).*/==\1/p' requirements.txt requirements-dev.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/requirements.txt
	touch $@

lint: install ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environments and the demo
	rm -rf $(VENV) $(OLDEST) output/demo
