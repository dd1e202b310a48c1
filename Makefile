# Two commands matter: `make demo` (a real language model learns a real task) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.PHONY: demo test test-real test-statistical test-gpu lint clean

# One virtual environment with everything; torch is pinned in constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hf,trl,demo,dev]"
	touch $@

demo: $(VENV)/.installed      ## fine-tune SmolLM2-135M on movie-review sentiment, forward passes only (about ten minutes on two cores)
	$(BIN)/zotune train recipes/demo.yaml --out $(RUN)

test: $(VENV)/.installed      ## the whole suite, offline
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not real and not statistical and not gpu"

test-real: $(VENV)/.installed ## checks on the real SmolLM2 (downloads it once)
	$(BIN)/pytest -m real

test-statistical: $(VENV)/.installed ## long Monte-Carlo checks
	$(BIN)/pytest -m statistical

test-gpu: $(VENV)/.installed ## checks that need a CUDA device
	$(BIN)/pytest -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info
