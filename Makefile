# make demo: install, train on real images under ZeRO-3, sample, judge.   make test: install, lint, every test.
# make test-long: the tests that take half an hour or more, most of them with several ranks.
# make bench-gpu: benchmark this GPU, starting no case after eight minutes; REFERENCE=DIR also times a checkout of the published code.
# make demo-nan: a run that falls back from bf16 to TF32 and returns.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
DEMO := runs/demo

.PHONY: demo demo-nan entities test test-long lint install bench-gpu clean-demo

demo: install
	test -f $(DEMO)/data/dataset.json || python tools/cache_latents.py digits --out $(DEMO)/data
	launchers/deepspeed.sh train --recipe digits --run-dir $(DEMO) sample.every=100
	xar-scale sample $(DEMO) --out $(DEMO)/samples.png
	xar-scale evaluate $(DEMO) --reference digits --images 1000
	xar-scale report $(DEMO)
	@echo
	@echo "samples      $(DEMO)/samples.png"
	@echo "report       $(DEMO)/report.html"
	@echo "checkpoint   $(DEMO)/checkpoints/$$(cat $(DEMO)/checkpoints/latest)"
	@echo "TensorBoard  $(VENV)/bin/tensorboard --logdir $(DEMO)/tensorboard"
	@echo "next         . .venv/bin/activate"
	@echo "             xar-scale sample $(DEMO) --classes 3,7 --seeds 100-119 --out $(DEMO)/more.png sample.guidance=3.0"
	@echo "             launchers/deepspeed.sh train --recipe digits --run-dir runs/wider data.path=$(DEMO)/data model.width=192"
	@echo "             README.md, From here to ImageNet"

demo-nan: install
	python -m tests.demo_nan --out runs/demo-nan

entities: install
	python tools/compare_entities.py --out runs/entities

test: install lint
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: install
	python -m pytest -m long -n 2 --dist loadfile

lint: install
	ruff check .
	ruff format --check .
	mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "xar_scale needs Python >= 3.10, $(PYTHON) is older; make PYTHON=python3.x"; exit 1; }
	@echo "installing into .venv (torch with its CUDA libraries: 5.6 GB, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -e '.[demo,evaluate,dev]'
	@touch $@

bench-gpu: install
	python tools/bench_gpu.py --out docs/benchmarks $(if $(REFERENCE),--reference $(REFERENCE))

clean-demo:
	rm -rf $(DEMO)
