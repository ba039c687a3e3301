# `make demo` and `make test` need nothing but Python 3.11 and a network: they set themselves up.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TREE := build/tree
SIDE_BY_SIDE := --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
THREADS ?= $(shell nproc)
GPU_OUT ?= build/gpu-check
GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format oracle gallery kernels train-shapes train-variants score-shapes score-tasks bench-host bench-sd15 bench-sd15-aot bench-tasks gpu-check gpu-kit clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(STAMP)  ## make .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH"; echo "hint: install Python 3.11, or name another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setup: installing the pinned packages in $(VENV), about 3 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup, 1 of 2: PyTorch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	@echo "setup, 2 of 2: sdrt with everything else that it is built, checked and measured with"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## build the embedded model, draw with it, compare with PyTorch: pictures and report in demo/
	mkdir -p demo
	@echo "demo, 1 of 3: building the embedded model, about 2 minutes on two cores"
	$(BIN)/sdrt build shapes --out demo/shapes.sdrt --precision fp32 --threads $(THREADS) --force
	@echo "demo, 2 of 3: drawing eight captions"
	$(BIN)/sdrt demo --bundle demo/shapes.sdrt --out demo --force
	@echo "demo, 3 of 3: comparing with PyTorch, about a minute; the pictures are in demo/ already"
	$(BIN)/sdrt bench demo/shapes.sdrt --baseline shapes --suite shapes --out demo/report --threads $(THREADS) --force

test: check  ## everything that CI runs: check, then the tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=40

check: $(STAMP)  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TREE) && mkdir -p $(TREE)
	cp -as $(CURDIR)/sdrt $(TREE)/sdrt
	for folder in export engines benchmarks models; do cp -as $(CURDIR)/$$folder $(TREE)/sdrt/$$folder; done
	cd $(TREE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p sdrt
	cd $(TREE) && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

gallery: $(STAMP)  ## draw the pictures of docs/gallery.md with its commands
	$(BIN)/python -m sdrt.models.shapes.gallery --work build/gallery --out docs/pictures/gallery.png

oracle: $(STAMP)  ## schedulers and tasks with every option against diffusers; writes docs/schedulers.md
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=20 -m exhaustive tests
	$(BIN)/python -m tests.oracle.scheduler_table docs/schedulers.md

bench-host: $(STAMP)  ## what a plan costs, and a step beside the engines
	mkdir -p benchmarks/results
	$(BIN)/python -m sdrt.benchmarks.host --out benchmarks/results/host-work.json

kernels:  ## compile the GPU kernels of the runtime again, after a change to them
	$(PYTHON) -m venv build/venv-kernels
	build/venv-kernels/bin/pip install --quiet --disable-pip-version-check cuda-bindings==13.5.0 nvidia-cuda-nvrtc==13.5.37
	build/venv-kernels/bin/python tests/contract/compile_kernels.py

format: $(STAMP)  ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-shapes: $(STAMP)  ## train the embedded model anew (about 100 minutes on 2 cores)
	$(BIN)/python -m sdrt.models.shapes.train --work build/shapes --out models/shapes/checkpoint

train-variants: $(STAMP)  ## fine-tune the embedded model's task variants anew
	$(BIN)/python -m sdrt.models.shapes.train_variants --work build/shapes-variants

score-tasks: $(STAMP)  ## does every task do what its name promises? 100 held-out cases each
	mkdir -p benchmarks/results
	$(BIN)/python -m sdrt.benchmarks.score_tasks --cases 100 --threads $(THREADS) --out benchmarks/results/tasks-score.json

score-shapes: $(STAMP)  ## does the embedded model draw what its captions say? 500 captions, here and in PyTorch
	mkdir -p benchmarks/results build
	$(BIN)/sdrt build shapes --out build/score.sdrt --threads $(THREADS) --force
	$(BIN)/python -m sdrt.benchmarks.score build/score.sdrt --baseline models/shapes/checkpoint --captions 500 --threads $(THREADS) --out benchmarks/results/shapes-score.json

bench-sd15: $(STAMP)  ## SD1.5 architecture, random weights, 512x512, against PyTorch and OpenVINO GenAI
	mkdir -p benchmarks/results
	$(BIN)/sdrt bench --suite sd15 --out benchmarks/results/sd15 --threads $(THREADS) --force

bench-tasks: $(STAMP)  ## each task at SD1.5's size against its diffusers pipeline; goes on where it was stopped
	mkdir -p benchmarks/results
	$(BIN)/sdrt bench --suite tasks --work build/tasks --out benchmarks/results/tasks --threads $(THREADS) $(ARGS)

bench-sd15-aot: $(STAMP)  ## TensorRT engines at SD1.5's size, built without a GPU: time, memory, parity
	mkdir -p benchmarks/results build
	$(BIN)/python -m sdrt.benchmarks.ahead_of_time --work build/sd15 --tensorrt build/venv-tensorrt --out benchmarks/results/sd15-ahead-of-time.json

ifdef KIT
gpu-check:
	mkdir -p $(GPU_OUT)
	$(GPU_PYTHON) benchmarks/gpu/from_kit.py $(KIT) --out $(GPU_OUT) $(ARGS)
else
gpu-check: $(STAMP)  ## on a machine with an NVIDIA GPU: parity, repeats, mixtures, latency against PyTorch (docs/gpu.md)
	mkdir -p build
	$(BIN)/python -c 'from pathlib import Path; from sdrt.benchmarks.builds import ensure_tensorrt; ensure_tensorrt(Path("build/venv-tensorrt"))'
	PYTHONPATH="$$(echo $(CURDIR)/build/venv-tensorrt/lib/python3*/site-packages)" $(BIN)/python -m sdrt.benchmarks.gpu --work build/gpu --out $(GPU_OUT) $(ARGS)
endif

gpu-kit: $(STAMP)  ## what gpu-check needs on a machine without a network, in parts (docs/gpu.md)
	mkdir -p build
	$(BIN)/python -m sdrt.benchmarks.gpu.kit --out build/gpu-kit $(foreach name,$(WITH),--with $(name))

clean:  ## remove what was built, but not .venv
	rm -rf build dist demo .mypy_cache .ruff_cache .pytest_cache
