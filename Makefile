# Two commands matter: `make demo` (a real language model learns a real task) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.PHONY: demo test test-oldest test-real test-statistical test-gpu lint clean

# One virtual environment with everything; torch is pinned in constraints.txt.
NATIVE := $(wildcard src/zotune/kernels/native*.[ch])

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hf,trl,demo,dev]"
	touch $@

demo: $(VENV)/.installed      ## fine-tune SmolLM2-135M on movie-review sentiment, forward passes only (six to twenty minutes on two cores)
	$(BIN)/zotune train recipes/demo.yaml --out $(RUN)

test: $(VENV)/.installed      ## the whole suite, offline
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not real and not statistical and not gpu"

# The same code with the oldest transformers, PEFT, TRL and accelerate that pyproject.toml admits; torch and numpy as ever.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet torch==2.13.0
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[trl,plot]" pytest pytest-xdist hypothesis
	touch $@

test-oldest: $(OLDEST)/.installed ## what touches transformers, peft, trl and accelerate, on their oldest versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --dist loadfile tests/hf tests/tuning tests/ecosystem tests/masked

test-real: $(VENV)/.installed ## checks on the real SmolLM2 (downloads it once)
	$(BIN)/pytest -m real

test-statistical: $(VENV)/.installed ## long Monte-Carlo checks
	$(BIN)/pytest -m statistical

test-gpu: $(VENV)/.installed ## checks that need a CUDA device
	$(BIN)/pytest -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) build dist src/*.egg-info
