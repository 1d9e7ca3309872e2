# `make help` lists the targets. Options:
#   PYTHON=python3.11           the interpreter to build the environments from
#   TORCH=torch==2.13.0         the torch to install
#   PIP_OPTIONS="--index-url …" pip's own options for torch, to choose a CPU or CUDA build
#   NPU=no                      leaves out what needs torch-npu: the tests of the Ascend engine
#   TRITON=no                   leaves out what needs Triton: the tests of the CUDA engine
#   JOBS=2                      how many files of tests run side by side
#   GRIDS=yes                   the full grids too, as in test-all
#   DTYPE=bf16                  that demo-megatron trains in, instead of fp32
#   MEGATRON=0.12.1             the version of megatron-core that unit-megatron runs on
#   TORCH_NPU=torch-npu==2.13.0, TORCH_OF_NPU=torch==2.13.0
#                               what unit-npu runs on; each version in an environment of its own

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
PIP_OPTIONS ?=
VENV ?= .venv
NPU ?= yes
TORCH_NPU_OF_CI := torch-npu==2.13.0
TORCH_NPU ?= $(TORCH_NPU_OF_CI)
TORCH_OF_NPU ?= torch==2.13.0
VENV_NPU ?= .venv-npu$(if $(filter-out $(TORCH_NPU_OF_CI),$(TORCH_NPU)),-$(lastword $(subst =, ,$(TORCH_NPU))))
MEGATRON ?= 0.12.1
DTYPE ?= fp32
TRITON ?= yes
JOBS ?= 2
TRITON_PACKAGE ?= triton==3.7.1
VENV_TRITON ?= .venv-triton
TRITON_ASCEND ?= triton-ascend==3.2.0 ascendnpu-ir==1.2.0
VENV_TRITON_ASCEND ?= .venv-triton-ascend

# Files of tests run side by side, each in one process: many wait for ranks that they have started.
# In the order that tests/longest.py gives them.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Cases that pyproject.toml leaves out.
ALL := $(if $(GRIDS),-m "full or not full")
BIN := $(VENV)/bin
BIN_NPU := $(VENV_NPU)/bin
BIN_TRITON := $(VENV_TRITON)/bin
MEGATRON_FOLDER := .megatron-$(MEGATRON)
TORCHRUN := $(BIN)/torchrun --standalone
.DEFAULT_GOAL := help
.PHONY: help demo demo-megatron quick test test-all checks lint types docs unit unit-megatron \
    unit-npu unit-triton unit-cuda gate numbers record-shares bench hooks ascend-triton environments clean
.DELETE_ON_ERROR:

help: ## this list, and the options
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' Makefile | \
	    while IFS='|' read -r name text; do printf '%-20s %s\n' "$$name" "$$text"; done
	@echo; sed -n '/^#/!q; s/^# \?//p' Makefile

# The stamp keeps the environment until what it was made from changes.
$(VENV)/installed: pyproject.toml
	@echo "== install into $(VENV) with $(PYTHON)"
	@echo "   downloads: $(TORCH) (a CPU build is about 190 MB; the package index's default build for"
	@echo "   Linux x86-64 brings CUDA and several GB: choose with PIP_OPTIONS), then about 180 MB of"
	@echo "   numba, numpy, tokenizers, matplotlib, rich, typer, pytest, hypothesis, mypy, ruff, mkdocs,"
	@echo "   megatron-core and transformers. pip options for torch: '$(PIP_OPTIONS)'"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) $(TORCH) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[launch,test,peers,docs,hooks]' && \
	echo "== install: $$(( $$(date +%s) - start )) s"
	@touch $@

# A second environment: where torch-npu is installed, `import torch` needs the libraries of CANN.
# tests/npu_sim brings its own; without it this is a machine with torch-npu and no CANN. Some wheels
# of torch-npu ask for torch==X+cpu, which the package index lacks: so without dependencies.
$(VENV_NPU)/installed: pyproject.toml
	@case "$$(uname -s) $$(uname -m)" in "Linux x86_64"|"Linux aarch64") ;; *) \
	    echo "there is no $(TORCH_NPU) for $$(uname -s) $$(uname -m): make test NPU=no" >&2; exit 1;; esac
	@for tool in gcc nm; do command -v $$tool >/dev/null || { \
	    echo "$$tool is needed to build the stand-in for CANN (gcc, binutils): make test NPU=no" >&2; \
	    exit 1; }; done
	@echo "== install into $(VENV_NPU) with $(PYTHON)"
	@echo "   downloads: $(TORCH_OF_NPU) (a CPU build is about 190 MB; choose it with PIP_OPTIONS),"
	@echo "   $(TORCH_NPU) (about 45 MB), then about 140 MB of numba, numpy, tokenizers, matplotlib,"
	@echo "   rich, typer, pytest and hypothesis. pip options for torch: '$(PIP_OPTIONS)'"
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV_NPU) && \
	$(BIN_NPU)/python -I -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) $(TORCH_OF_NPU) && \
	$(BIN_NPU)/python -I -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH_NPU) && \
	$(BIN_NPU)/python -I -m pip install --quiet --disable-pip-version-check numpy pyyaml \
	    -e '.[launch]' pytest pytest-xdist hypothesis && \
	echo "== install: $$(( $$(date +%s) - start )) s"
	@touch $@

# A third one: a CPU build of torch has no Triton, and beside one it is a driver without a card.
$(VENV_TRITON)/installed: pyproject.toml
	@[ "$$(uname -s)" = Linux ] || { \
	    echo "there is no $(TRITON_PACKAGE) for $$(uname -s): make test TRITON=no" >&2; exit 1; }
	@echo "== install into $(VENV_TRITON) with $(PYTHON)"
	@echo "   downloads: $(TORCH) (a CPU build is about 190 MB; choose it with PIP_OPTIONS),"
	@echo "   $(TRITON_PACKAGE) (about 190 MB, 700 MB installed), then about 20 MB of numpy, pytest"
	@echo "   and hypothesis. pip options for torch: '$(PIP_OPTIONS)'"
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV_TRITON) && \
	$(BIN_TRITON)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) $(TORCH) && \
	$(BIN_TRITON)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TRITON_PACKAGE) && \
	$(BIN_TRITON)/python -m pip install --quiet --disable-pip-version-check -e . pytest pytest-xdist hypothesis && \
	echo "== install: $$(( $$(date +%s) - start )) s"
	@touch $@

# A fourth one, for one target: triton-ascend brings a triton package of its own.
$(VENV_TRITON_ASCEND)/installed: pyproject.toml
	@echo "== install into $(VENV_TRITON_ASCEND) with $(PYTHON)"
	@echo "   downloads: $(TORCH), $(TRITON_ASCEND) (about 220 MB, 700 MB installed), and pybind11"
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV_TRITON_ASCEND) && \
	$(VENV_TRITON_ASCEND)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) $(TORCH) && \
	$(VENV_TRITON_ASCEND)/bin/python -m pip install --quiet --disable-pip-version-check \
	    $(TRITON_ASCEND) pybind11 "numpy<2" && \
	echo "== install: $$(( $$(date +%s) - start )) s"
	@touch $@

# `make -j3 environments` builds three at a time, before a `make test` that then finds them.
ENVIRONMENTS := $(MEGATRON_FOLDER)/installed
ifneq ($(NPU),no)
ENVIRONMENTS += $(VENV_NPU)/installed
endif
ifneq ($(TRITON),no)
ENVIRONMENTS += $(VENV_TRITON)/installed $(VENV_TRITON_ASCEND)/installed
endif
environments: $(ENVIRONMENTS) ## builds every environment that the tests need

ascend-triton: $(VENV_TRITON_ASCEND)/installed ## whether the Triton kernels fit an Ascend core
	@start=$$(date +%s); echo "== Triton kernels for Ascend, without CANN"; \
	$(VENV_TRITON_ASCEND)/bin/python -m tests.engines.ascend && \
	echo "== Triton kernels for Ascend: $$(( $$(date +%s) - start )) s"

demo: $(VENV)/installed ## a GPT on two CPU ranks, the vocabulary split between them
	OMP_NUM_THREADS=1 $(TORCHRUN) --nproc-per-node 2 -m vocab_parallel_ce.launch.train \
	    --tp 2 --device cpu --out runs/demo --resume never

# Two ranks compile Megatron's fused loss at its end: some seconds, and a C++ compiler if there is one.
demo-megatron: $(VENV)/installed ## a GPTModel of megatron-core: Megatron's losses beside ours
	OMP_NUM_THREADS=1 $(TORCHRUN) --nproc-per-node 2 -m vocab_parallel_ce.launch.megatron_gpt \
	    --tp 2 --sequence-parallel --compare --device cpu --dtype $(DTYPE) --out runs/megatron

# What somebody runs between two edits; tests/quick.py is the list.
quick: lint types ## lint, types, and tests that touch every module: under two minutes
	@start=$$(date +%s); echo "== quick tests"; \
	$(BIN)/python -m pytest -q -m quick && \
	echo "== quick tests: $$(( $$(date +%s) - start )) s"

test: checks unit unit-megatron unit-npu unit-triton ## everything that CI runs but the gate

test-all: ## the same, and the full grids of options and shapes
	@$(MAKE) --no-print-directory test GRIDS=yes

checks: $(VENV)/installed ## lint, types and docs, two at a time
	@$(MAKE) --no-print-directory -j2 lint types docs

lint: $(VENV)/installed ## ruff: rules and format
	@start=$$(date +%s); echo "== lint"; \
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && \
	echo "== lint: $$(( $$(date +%s) - start )) s"

types: $(VENV)/installed ## mypy, strict
	@start=$$(date +%s); echo "== types"; \
	$(BIN)/mypy && echo "== types: $$(( $$(date +%s) - start )) s"

docs: $(VENV)/installed ## builds the pages into site/: no dead link, no missing page
	@start=$$(date +%s); echo "== docs"; \
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site && \
	echo "== docs: $$(( $$(date +%s) - start )) s, site/index.html"

unit: $(VENV)/installed ## the tests on CPU, megatron-core 0.16.1 included
	@start=$$(date +%s); echo "== tests"; \
	$(BIN)/python -m pytest -q $(PARALLEL) $(ALL) --durations=15 && \
	echo "== tests: $$(( $$(date +%s) - start )) s"

# The Megatron-core that MindSpeed builds on, before the one in the environment; a few MB.
$(MEGATRON_FOLDER)/installed: $(VENV)/installed
	@echo "== install megatron-core $(MEGATRON) into $(MEGATRON_FOLDER)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(MEGATRON_FOLDER) megatron-core==$(MEGATRON)
	@touch $@

# Of the tests that `unit` runs on the version in the environment those that touch Megatron's
# names most; all of them on any other version than the first, and in test-all.
TESTS_MEGATRON := tests/parallel/megatron
ifeq ($(MEGATRON)$(GRIDS),0.12.1)
TESTS_MEGATRON := $(patsubst %,tests/parallel/megatron/test_%.py,\
    install cross_entropy mindspeed model fused_head)
endif
unit-megatron: $(MEGATRON_FOLDER)/installed ## the tests of the Megatron hook on another version
	@start=$$(date +%s); echo "== tests on megatron-core $(MEGATRON)"; \
	PYTHONPATH=$(CURDIR)/$(MEGATRON_FOLDER) VOCAB_PARALLEL_CE_TEST_MEGATRON=$(MEGATRON) \
	    $(BIN)/python -m pytest -q $(PARALLEL) $(ALL) --durations=5 $(TESTS_MEGATRON) && \
	echo "== tests on megatron-core $(MEGATRON): $$(( $$(date +%s) - start )) s"

# Frameworks that are no part of CI, each without what it asks for beside torch.
HOOKS := deepspeed==0.19.8 torchtitan==0.3.0 verl==0.9.1 nemo-automodel==0.7.0
HOOKS_NEED := hjson py-cpuinfo msgpack einops ninja pydantic pydantic-core annotated-types \
    typing-inspection spmd-types==0.2.3 tyro docstring-parser shtab typeguard psutil torchdata
.hooks/installed: $(VENV)/installed
	@echo "== install $(HOOKS) into .hooks"
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --upgrade --target .hooks $(HOOKS) $(HOOKS_NEED)
	@touch $@

hooks: .hooks/installed ## the hooks of DeepSpeed, torchtitan, verl, NeMo-Automodel against the real packages
	@start=$$(date +%s); echo "== hooks: $(HOOKS)"; \
	PYTHONPATH=$(CURDIR)/.hooks $(BIN)/python -m pytest -q -o addopts= $(PARALLEL) $(if $(GRIDS),,-m "not full") \
	    tests/hooks && \
	echo "== hooks: $$(( $$(date +%s) - start )) s"

# What only an NPU has, and the tests of the loss that run on any device.
TESTS_NPU := tests/npu tests/engines/test_contract.py tests/test_oracle.py tests/test_oracle_operator.py \
    tests/test_oracle_statistics.py tests/test_inplace.py tests/test_overwriting.py \
    tests/test_overwritten_logits.py tests/test_properties.py

ifeq ($(NPU),no)
unit-npu:
	@echo "== tests of the Ascend engine: LEFT OUT, because of NPU=no"
else
unit-npu: $(VENV_NPU)/installed ## the tests of the Ascend engine: real torch_npu on stand-ins for CANN
	@start=$$(date +%s); echo "== tests of the Ascend engine: the real torch-npu over tests/npu_sim"; \
	$(BIN_NPU)/python -m tests.npu_sim python -m pytest -q $(PARALLEL) $(ALL) --durations=10 $(TESTS_NPU) && \
	echo "== tests of the Ascend engine: $$(( $$(date +%s) - start )) s"
endif

# The engine's contract and its own tests; tests/engines/triton compiles the kernels as well. And
# the npu engine's kernels for Ascend.
TESTS_TRITON := tests/engines/triton tests/engines/npu tests/engines/test_contract.py

ifeq ($(TRITON),no)
unit-triton:
	@echo "== tests of the CUDA engine: LEFT OUT, because of TRITON=no"
else
unit-triton: $(VENV_TRITON)/installed ## the tests of the CUDA engine: Triton's interpreter and compiler
	@start=$$(date +%s); echo "== tests of the CUDA engine: Triton's interpreter and compiler"; \
	TRITON_INTERPRET=1 $(BIN_TRITON)/python -m pytest -q $(PARALLEL) $(ALL) --durations=10 \
	    -W ignore::RuntimeWarning $(TESTS_TRITON) && \
	echo "== tests of the CUDA engine: $$(( $$(date +%s) - start )) s"
endif

# The tests of the loss that run on any device, and what the engine's kernels do beside them. With
# fewer cards than ranks the ranks share them, over Gloo.
TESTS_CUDA := tests/engines/triton tests/engines/test_contract.py tests/test_oracle.py \
    tests/test_oracle_operator.py tests/test_oracle_statistics.py tests/test_inplace.py \
    tests/test_overwriting.py tests/test_overwritten_logits.py tests/test_properties.py \
    tests/test_zloss.py tests/test_selected.py tests/test_row_scale.py \
    tests/test_forgotten_group.py tests/test_unused_rows.py tests/test_shared_logits.py

unit-cuda: $(VENV)/installed ## the tests of the loss on this machine's CUDA card; a CUDA build of torch
	@start=$$(date +%s); echo "== tests on a CUDA card"; \
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device, or a CPU build of torch"' && \
	VOCAB_PARALLEL_CE_TEST_DEVICE=cuda $(BIN)/python -m pytest -q $(PARALLEL) $(ALL) --durations=10 $(TESTS_CUDA) && \
	echo "== tests on a CUDA card: $$(( $$(date +%s) - start )) s"

DTYPES := --dtype fp32 --dtype bf16 --dtype fp16

# Against loops of plain memory and arithmetic in the same run (launch/bench/gate.py), whatever the
# processor; the ratios to F.cross_entropy are reported.
gate: $(VENV)/installed ## fails where the loss got slower than this machine's limits allow
	@start=$$(date +%s); echo "== speed gate"; \
	$(BIN)/python -m vocab_parallel_ce.launch.bench --gate --ranks 1 --repeats 5 $(DTYPES) \
	    --peers ours-inplace,ours,torch --out runs/gate && \
	echo "== speed gate: $$(( $$(date +%s) - start )) s"

numbers: $(VENV)/installed record-shares ## measures the CPU's numbers of the pages anew: half an hour, on a quiet machine
	$(BIN)/vocab-parallel-ce bench --device cpu --csv launch/bench/medians.csv
	$(BIN)/vocab-parallel-ce curve --device cpu --repeats 5 --largest 33554432 --picture docs/curve.png
	$(BIN)/vocab-parallel-ce call-cost --json launch/bench/call_cost/results.json
	$(BIN)/python -m vocab_parallel_ce.launch.bench.fused_head.record
	$(MAKE) demo && cp runs/demo/result.json launch/train/demo.json
	$(MAKE) demo-megatron && cp runs/megatron/result.json launch/megatron_gpt/demo_fp32.json
	$(MAKE) demo-megatron DTYPE=bf16 && cp runs/megatron/result.json launch/megatron_gpt/demo_bf16.json
	$(BIN)/python -m vocab_parallel_ce.launch.pages

record-shares: $(VENV)/installed ## keeps how near the limits the loss is here: for the gate, on a quiet machine
	$(BIN)/python -m vocab_parallel_ce.launch.bench --ranks 1 --repeats 15 --wait-idle 10 $(DTYPES) \
	    --peers ours-inplace,ours --out runs/shares
	$(BIN)/python -m vocab_parallel_ce.launch.bench.record runs/shares/bench.json

bench: $(VENV)/installed ## the loss beside its peers on this machine; writes runs/bench
	$(BIN)/python -m vocab_parallel_ce.launch.bench --out runs/bench

clean: ## removes the environments and all that was built
	rm -rf site $(VENV) .venv-npu* $(VENV_TRITON) $(VENV_TRITON_ASCEND) .megatron-* .hooks runs build dist *.egg-info
