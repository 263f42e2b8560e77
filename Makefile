# Everything a checkout needs, in a virtual environment of its own:
#
#   make demo     make limoe     make test     make lint     make bench     make gpu
#
# A fresh machine needs python3 (3.10 or newer) and a C++ compiler. Without the compiler the package
# is installed as pure Python. `make <target> ARGS="..."` hands arguments to the command it runs.

PYTHON ?= python3
ARGS ?=
PROCESSES ?= 2
CASES ?= 1000
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

# With a compiler at hand a broken build must be an error; without one pure Python will do.
CONTRASTIVE_OPS_EXT ?= $(if $(shell command -v $(firstword $(CXX)) 2>/dev/null),1,auto)
export CONTRASTIVE_OPS_EXT

# Python files are used in place; only these make a new build necessary.
BUILD_INPUTS := $(wildcard setup*.py) pyproject.toml $(shell find csrc -type f 2>/dev/null)
CPP_FILES := $(shell find csrc tests/cuda_host -name "*.h" -o -name "*.cpp" -o -name "*.cu")

.DEFAULT_GOAL := help
.PHONY: help install peers demo limoe limoe-ablation simclr distributed moe-embeddings distill test fuzz mutate sanitize coverage docs notebooks wheel hf-kernels lint format bench cores processes bench-peers peer-suites gpu matrix aarch64 clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) must be Python 3.10 or newer; name another one with make PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "python -m venv must work; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }

$(VENV)/.dev: requirements/dev.txt | $(RUN)
	@echo "contrastive_ops: downloading what requirements/dev.txt names, torch first of all"
	$(RUN) -m pip install --no-compile --disable-pip-version-check -q -r requirements/dev.txt
	@touch $@

$(VENV)/.peers: requirements/peers.txt $(VENV)/.dev
	$(RUN) -m pip install --no-compile --disable-pip-version-check -q -r requirements/peers.txt
	@touch $@

$(VENV)/.notebooks: requirements/notebooks.txt $(VENV)/.dev
	$(RUN) -m pip install --no-compile --disable-pip-version-check -q -r requirements/notebooks.txt
	@touch $@

# Never `build_ext --inplace`: it would leave the mapping of contrastive_ops.kernels out.
BUILD := $(RUN) .ci/building.py $(RUN) -m pip install --no-build-isolation --no-deps --disable-pip-version-check -q -e .
$(VENV)/.install: $(BUILD_INPUTS) $(VENV)/.dev
	@rm -f $(VENV)/.demo
	@$(BUILD)
	@touch $@ $(VENV)/.demo

# What the demo needs: one SIMD level, and no kernel for a GPU where none is seen. It is no `install`: the next one
# compiles the rest.
SEES_GPU := $(wildcard /dev/nvidia*)$(shell command -v nvidia-smi 2>/dev/null)
$(VENV)/.demo: $(BUILD_INPUTS) $(VENV)/.dev
	@rm -f $(VENV)/.install
	@CONTRASTIVE_OPS_NATIVE=1 CONTRASTIVE_OPS_CUDA=$${CONTRASTIVE_OPS_CUDA:-$(if $(SEES_GPU),auto,0)} $(BUILD)
	@touch $@

install: $(VENV)/.install ## the package and its tools, editable, in .venv

peers: $(VENV)/.peers ## the packages that tests and benchmarks compare with

demo: $(VENV)/.demo ## train a docstring search with plain PyTorch and with contrastive_ops, then mine negatives for it
	$(RUN) examples/docstring_search.py $(ARGS)

limoe: install ## train a LIMoE, one sparse tower for images and text, on digits with captions; ARGS="--dense"
	$(RUN) examples/train_limoe.py $(ARGS)

limoe-ablation: install ## the same with each combination of balance losses, over three seeds, and two figures
	$(RUN) examples/train_limoe.py --ablate $(ARGS)

simclr: install ## train with NT-Xent and SupCon on digits, and probe the features
	$(RUN) examples/simclr_digits.py $(ARGS)

distributed: install ## train the docstring search on PROCESSES (2) processes; the curve is that of one
	$(BIN)/torchrun --nproc-per-node $(PROCESSES) examples/train_distributed.py $(ARGS)

moe-embeddings: install ## tune one embedding model for many domains, with an expert for each
	$(RUN) examples/moe_embeddings.py $(ARGS)

distill: install ## distil a small embedding model from a larger one
	$(RUN) examples/distill_embeddings.py $(ARGS)

test: install ## the tests, which say how long they take; ARGS="-n 2", ARGS="-k name -x", ARGS="tests/test_nn.py"
	$(RUN) -m pytest $(ARGS)

fuzz: install ## random calls of everything against dense formulas: CASES (1000), SEED (0), ARGS="--subjects losses"
	PYTHONPATH=tests $(RUN) -m fuzz --cases $(CASES) --seed $(SEED) $(ARGS)

mutate: install ## plant small faults in a copy of the sources, and say which no test notices; ARGS="--kinds cuda --resume"
	PYTHONPATH=tests $(RUN) -m faults $(ARGS)

sanitize: install ## the C++ extension under sanitizers: tests of the primitives, the fuzzer; ARGS="--kinds thread --cases 50"
	PYTHONPATH=tests $(RUN) -m sanitizers $(ARGS)

coverage: install ## which lines of Python and of C++ the tests run, in build/coverage; ARGS="tests/test_maxsim.py"
	$(RUN) -m pip install --no-compile --disable-pip-version-check -q -r requirements/coverage.txt
	$(RUN) .ci/covered.py $(ARGS)

docs: install ## the documentation site, in build/site; a link or an argument that does not exist is an error
	$(RUN) -m pip install --no-compile --disable-pip-version-check -q -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebooks: install $(VENV)/.notebooks ## run the notebooks of examples/notebooks and keep what they print and draw
	$(BIN)/jupyter execute --inplace examples/notebooks/*.ipynb

# For every torch, Python from 3.10 on and Linux from glibc 2.28 on, but for the module with torch's headers, which is for
# the torch and the Python of .venv. The second is for machines that this one is not for, the third to compile there.
wheel: $(VENV)/.dev ## what `pip install` takes from an index, in dist: a wheel, one without the extension, the sources
	$(RUN) -m pip install --no-compile --disable-pip-version-check -q -r requirements/wheel.txt
	rm -rf dist build/wheel build/lib*
	CONTRASTIVE_OPS_WHEEL=1 CONTRASTIVE_OPS_EXT=1 CONTRASTIVE_OPS_CUDA=0 $(RUN) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --exclude "libc10.so" --exclude "libtorch*.so" -w dist build/wheel/*.whl
	rm -rf build/lib*
	CONTRASTIVE_OPS_EXT=0 $(RUN) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	$(RUN) -m build -q --sdist --no-isolation --outdir dist .
	@ls -l dist

hf-kernels: ## the package as Hugging Face's kernels loads it, pure Python with its Triton kernels, in build/hf-kernels
	$(PYTHON) .ci/hf_kernels.py $(ARGS)

lint: install ## ruff, mypy and clang-format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy contrastive_ops
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.dev ## apply what lint asks for where that is mechanical
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: install ## every number to reach, hit or missed, in ten minutes; ARGS="--op clip", ARGS="--base main", ARGS="--curves"
	$(RUN) -m benchmarks.run $(or $(ARGS),--targets)

cores: install ## modelled speed-up on 2 to 128 cores; ARGS="--op clip --size large --regions 64", ARGS="--check"
	$(RUN) -m benchmarks.cores $(ARGS)

processes: install ## CLIP's loss over two processes beside open_clip's gather, and a model of 1 to 1,024; ARGS="--save"
	$(RUN) -m benchmarks.processes --model $(ARGS)

peer-suites: install $(VENV)/.peers ## the tests of other packages with our adapters in them; ARGS="--sources FOLDER" of clones
	$(RUN) .ci/peer_suites.py $(ARGS)

bench-peers: install $(VENV)/.peers ## the same against the packages in requirements/peers.txt
	$(RUN) -m benchmarks.run --peers $(ARGS)

# With the torch of $(PYTHON) where that is named, else of .venv where there is one: nothing is installed.
gpu: ## on a machine with an NVIDIA GPU: build, tests, experiments, compute-sanitizer and benchmarks in eight minutes, no network
	$(if $(findstring file,$(origin PYTHON)),$(or $(wildcard $(RUN)),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu $(ARGS)

matrix: $(VENV)/.dev ## the extension with every compiler and Python of this machine: build, check, tests of the primitives
	$(RUN) .ci/matrix.py $(ARGS)

aarch64: $(VENV)/.dev ## the extension for 64-bit ARM, compiled across: main loops counted, check and tests in an emulator
	$(RUN) .ci/aarch64.py $(ARGS)

clean: ## remove build products and caches, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f contrastive_ops/_C*.so contrastive_ops/_eager*.so contrastive_ops/_build_report.json $(VENV)/.install $(VENV)/.demo
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
