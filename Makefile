# make demo, make test and make lint set up what they need in .venv; they ask for nothing but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
OUTPUT ?= output/demo
EPOCHS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo gpu test test-slow test-rest test-oldest lint format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# INDEX is the address that pytorch.org shows behind --index-url for the CPU build, which needs no CUDA.
install: $(VENV)/installed ## set up .venv with the tested versions (INDEX=... takes torch from there: a CPU build)

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	@echo "Installing torch and the rest into $(VENV): some 5 GB with CUDA, a few minutes. Less without: make install INDEX=..."
	$(PYTHON) -m venv $(VENV)
	$(if $(INDEX),$(BIN)/python -m pip install --quiet torch torchvision -c constraints.txt --index-url $(INDEX))
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

# On the CPU, so that it needs no GPU; last digits differ between machines and versions of torch. Two processes train faster than two threads of one: the model is small.
SHAPES := --device cpu --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32
demo: install ## train, evaluate and draw on a data set that is drawn by the program, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=2 main_deit.py $(SHAPES) \
		--epochs $(EPOCHS) --batch-size 32 --lr 8e-3 --warmup-epochs 1 --warmup-lr 1e-3 --drop-path 0 --num_workers 1 \
		--no-repeated-aug --aa '' --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --no-model-ema --overwrite --output_dir $(OUTPUT)
	$(BIN)/python main_deit.py $(SHAPES) --eval --resume $(OUTPUT)/checkpoint.pth
	$(BIN)/python visualize.py $(SHAPES) --resume $(OUTPUT)/checkpoint.pth --output_dir $(OUTPUT)/pictures \
		--batch-size 12 --score
	$(BIN)/python visualize.py --log $(OUTPUT) --output_dir $(OUTPUT)/pictures
	@echo "Learning curves: $(OUTPUT)/pictures/curves.png; what it selects in 12 images: $(OUTPUT)/pictures/seed0_contact.png"
	@echo "(It selects what the class token attends to: this small network may tell a ring or a cross by what is around it.)"
	@echo "Next, a pretrained ViT on a photo of yours: $(BIN)/python visualize.py --model deit_tiny_patch16_224 --evolve --resume WEIGHTS.pth --img-path PHOTO.jpg --output_dir $(OUTPUT)/photo"

# With the Python that is there, which has torch for the GPU; it goes on where it stopped.
gpu: ## everything that is measured on a GPU, 8 minutes (FOLDER=... for the rows)
	$(PYTHON) experiments/gpu.py --output $(or $(FOLDER),docs/benchmarks)

# Two halves at the same time, as two cores allow. Each prints when it is done, where make can do that.
test: install ## all tests
	@echo "Testing, several minutes ..."
	@$(MAKE) --jobs=2 --keep-going $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) test-slow test-rest

test-slow: install ## the tests that start processes
	$(BIN)/python -m pytest -m slow

test-rest: install ## the other tests
	$(BIN)/python -m pytest -m 'not slow'

# The same with the lowest versions that requirements.txt allows, without the slow tests, in an environment of its own.
test-oldest: $(OLDEST)/installed ## the faster tests with the oldest versions that are allowed
	$(OLDEST)/bin/python -m pytest -m 'not slow'

$(OLDEST)/installed: requirements.txt requirements-dev.txt
	@echo "Installing the oldest versions of torch and the rest into $(OLDEST): some 5 GB, a few minutes."
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/>=([0-9.]+).*/==\1/p' requirements.txt requirements-dev.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/requirements.txt
	touch $@

lint: install ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove environments and the demo
	rm -rf $(VENV) $(OLDEST) output/demo
