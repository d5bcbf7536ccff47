# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
# Any variable may be given: make test VENV=/scratch/venv JOBS=8 PYTEST_ARGS='-k filter'

SHELL := bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3) python3)
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
CAPTIONS ?= demo_data/captions
UV_VERSION ?= 0.13.8

# where this is set, each of the many processes would compile all that it imports
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup slurm azurite test lint docs wheel format stores demo demo-classify demo-diffuse demo-caption bench bench-fashion gpu chaos crash-points chaos-stores fuzz fuzz-sources clean

help:
	@echo "make demo     install, then run the whole pipeline on embedded data"
	@echo "make demo-classify  the same, training a Vision Mamba on scanned digits; TRAIN='seed=1 name=other'"
	@echo "make demo-diffuse   the same with scenes of two objects, which takes longer"
	@echo "make demo-caption   learn to describe images, and show what was learned"
	@echo "make test     install (where root and apt allow it, SLURM too), then run all tests"
	@echo "make setup    only install, into $(VENV)"
	@echo "make slurm    only install what the tests on a real SLURM need (Debian, root)"
	@echo "make lint     formatting, ruff, mypy       make format   mend what can be mended"
	@echo "make stores   start the object stores of the tests on loopback, to try things with"
	@echo "make azurite  only install what the tests on Azure need"
	@echo "make docs     build the documentation into docs/_build/html"
	@echo "make wheel    build the wheel, install it elsewhere and run the first stages from there"
	@echo "make bench    measure against peers        make clean    remove what was made here"
	@echo "make gpu      all tests that need a GPU, and figures in gpu.md; without a GPU a rehearsal; GPU='parts=precompute'"
	@echo "make bench-fashion  Fashion-MNIST (Debian: dataset-fashion-mnist) from files to accuracy; FASHION='seeds=1 epochs=1'"
	@echo "make fuzz     damaged images for three minutes: nothing may crash, hang or flood; FUZZ='seconds=600 seed=2'"
	@echo "make fuzz-sources   damaged lists, captions, annotations and archives; FUZZ_SOURCES='mutations=9000 seed=2'"
	@echo "make crash-points   end a process at every single file operation of the engine's scenarios (make test: at every third)"
	@echo "make chaos-stores   200 kills, with faults of the store, while datasets are published and written there; KILLS='PUBLISH_SEEDS=99'"
	@echo "make chaos    break jobs on a real SLURM in 25 ways, 40 times (Debian, root), compare results; CHAOS='trials=100 seed=2'"

setup: $(INSTALLED)
	@:

# pip, not python, which a broken-off creation leaves without it
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# uv takes half a minute for what takes pip four
$(INSTALLED): constraints.txt setup.cfg setup.py | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python -r constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

slurm:
	@tests/slurm_cluster/install.sh

# one more, since one of the processes mostly waits for SLURM
test: setup slurm
	$(BIN)/python -m pytest -n $$(($(JOBS) + 1)) --durations=15 $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pipeline launch
	$(BIN)/lint-imports

azurite: setup
	@tests/install_azurite.sh $(BIN)/uv $(BIN)/python

stores: setup
	PYTHONPATH=tests $(BIN)/python -m object_stores

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

wheel: setup
	VENV=$(abspath $(VENV)) .ci/wheel

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup
	$(BIN)/python launch/submit.py stage=all dataset=shapes data_dir=demo_data ranks=$(JOBS)

demo-classify: setup
	$(BIN)/python launch/submit.py stage=download,filter,shard dataset=digits data_dir=demo_data split=test
	$(BIN)/python launch/submit.py stage=download,filter,shard,train dataset=digits data_dir=demo_data $(TRAIN)
	$(BIN)/python -m pipeline.stages.evaluate dataset=digits data_dir=demo_data

demo-diffuse: setup
	$(BIN)/python launch/submit.py stage=all dataset=pairs data_dir=demo_data ranks=$(JOBS)

# unseen pictures: another seed of the same drawings
demo-caption: setup
	$(BIN)/python launch/submit.py stage=download,filter,shard,features dataset=shapes data_dir=$(CAPTIONS) count=3000 questions=true
	$(BIN)/python launch/submit.py stage=download,filter,shard dataset=shapes split=test data_dir=$(CAPTIONS) count=300 seed=7 questions=true
	@$(MAKE) --no-print-directory -j $(JOBS) $(addprefix demo-caption-,mamba transformer questions)

LEARNED_mamba := decoder=mamba max_length=16
LEARNED_transformer := max_length=16
LEARNED_questions := prompt=question max_length=32

demo-caption-%:
	@set -eo pipefail; { \
		$(BIN)/python -m pipeline.stages.train task=caption dataset=shapes data_dir=$(CAPTIONS) name=$* $(LEARNED_$*) \
			steps=300 lr=0.002 valid_fraction=0.1 evaluate_every=150; \
		$(BIN)/python -m pipeline.stages.caption image_path=$(CAPTIONS)/shapes/test/shard-mds \
			checkpoint=$(CAPTIONS)/shapes/runs/$* output=$(CAPTIONS)/shapes/captions-$* batch_size=100; \
	} 2>&1 | sed -u 's/^/$*: /'

bench: setup
	@set -e; for script in $(filter-out benchmarks/chaos.py benchmarks/fashion.py benchmarks/gpu.py,$(wildcard benchmarks/[!_]*.py)); do \
		echo "== $$script"; $(BIN)/python $$script; done

# With VENV= the packages of PYTHON itself are taken, as on a machine that has its own torch and no network:
# make gpu PYTHON=/opt/torch/bin/python VENV=
GPU_PYTHON = $(if $(VENV),$(BIN)/python,$(PYTHON))

gpu: $(if $(VENV),setup)
	@$(GPU_PYTHON) -c 'import torch' || { echo "$(GPU_PYTHON) cannot import torch" >&2; exit 1; }
	@failed=0; device=; figures=output=gpu.md; export HF_HUB_OFFLINE=1; \
		$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
			echo "no GPU: this is a rehearsal on the CPU, which measures nothing; launch/doctor.py says why torch sees none"; \
			device=cpu figures="output=gpu-rehearsal.md size=tiny device=cpu"; }; \
		GPU_TESTS_DEVICE=$$device $(GPU_PYTHON) -m pytest -m gpu -rs --durations=15 $(PYTEST_ARGS) || failed=1; \
		$(GPU_PYTHON) benchmarks/gpu.py $$figures $(GPU) || failed=1; exit $$failed

bench-fashion: setup
	$(BIN)/python benchmarks/fashion.py $(FASHION)

fuzz: setup fuzz-sources
	$(BIN)/python tests/fuzz_images.py $(FUZZ)

fuzz-sources: setup
	$(BIN)/python tests/fuzz_sources.py $(FUZZ_SOURCES)

crash-points: setup
	CRASH_POINTS_EVERY=1 $(BIN)/python -m pytest -n $(JOBS) tests/partitions/test_crash_points.py

# eight kills for each seed of publishing, six for each of writing
chaos-stores: setup
	PUBLISH_SEEDS=13 DIRECT_SEEDS=17 $(KILLS) $(BIN)/python -m pytest -n $(JOBS) -k kills_and_faults \
		tests/partitions/test_publish.py tests/partitions/test_direct_output.py

chaos: setup slurm
	$(BIN)/python benchmarks/chaos.py $(CHAOS)

clean:
	rm -rf $(VENV) demo_data build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
