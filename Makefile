# Everything lives in .venv. A stamp file remembers each step, so nothing is done twice.
# Works with GNU Make 3.81 (macOS) and newer.

MODEL  ?= smollm2:135m
PROMPT ?= Why is the sky blue? Answer in one sentence.
ARGS   ?=
# A process for each core, four at most; ARGS="-n 0" for one alone.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

BIN    := .venv/bin
SETUP  := .venv/.stamp-setup
NATIVE := $(shell find kernels_cpu -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
CXX_FILES = $(shell find kernels_cpu -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help setup chat test test-all check format bench example-finetune goldens clean FORCE

help: ## list the targets
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo "PYTHON=… picks the Python for .venv; MODEL=… and PROMPT=… belong to chat, ARGS=… to test."

setup: $(SETUP) ## the environment in .venv, with what the tests need

chat: $(SETUP) ## fetch the model and talk to it; without a terminal answer one prompt
	@if [ -t 0 ] && [ -t 1 ]; then \
	  $(BIN)/localllm chat "$(MODEL)"; \
	else \
	  $(BIN)/localllm run "$(MODEL)" "$(PROMPT)" </dev/null; \
	fi

test: $(SETUP) ## the tests, without the long proofs
	@$(BIN)/pytest $(WORKERS) -m "not slow" $(ARGS)

test-all: $(SETUP) .venv/.stamp-parity ## every test, and the parity tables against transformers
	@$(BIN)/pytest $(ARGS)
	@$(BIN)/python -m scripts.parity_table

check: $(SETUP) .venv/.stamp-dev ## ruff, mypy, import-linter, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python scripts/source_tree.py .venv/source-tree
	@cd .venv/source-tree && ../bin/mypy --config-file pyproject.toml -p localllm
	@$(BIN)/python scripts/lint_imports.py .venv/source-tree
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(SETUP) .venv/.stamp-dev ## let ruff and clang-format rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES)

bench: $(SETUP) .venv/.stamp-bench ## measure; every figure in the README comes from here
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; \
	  $(BIN)/python -m "benchmarks.$$(basename $$script .py)" || exit 1; done

example-finetune: $(SETUP) ## teach a small model to answer in JSON; before and after
	@rm -rf build/json-answers
	@$(BIN)/localllm finetune --config examples/json_answers/finetune.toml --out build/json-answers
	@$(BIN)/python examples/json_answers/score.py smollm2:135m build/json-answers

goldens: $(SETUP) .venv/.stamp-parity ## write the expected values in tests/ again, from the originals
	@for script in scripts/goldens/[a-z]*.py; do echo "== $$script"; \
	  $(BIN)/python -m "scripts.goldens.$$(basename $$script .py)" || exit 1; done

clean: ## remove .venv, builds and caches; fetched models stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A clone that was moved, or whose Python went away, needs its environment again.
ifneq ($(shell test -x $(BIN)/python && cat $(SETUP) 2>/dev/null),$(CURDIR))
$(SETUP): FORCE
endif

# Another Python was asked for than the one in .venv.
WHICH := -c 'import sys; print(sys.base_prefix, *sys.version_info[:2])' 2>/dev/null
ifneq ($(PYTHON),)
ifneq ($(shell $(PYTHON) $(WHICH)),$(shell $(BIN)/python $(WHICH)))
$(SETUP): FORCE
endif
endif

$(SETUP): pyproject.toml CMakeLists.txt $(NATIVE)
	@python=$$(PYTHON="$(PYTHON)" scripts/find-python) && "$$python" scripts/environment.py project test
	@pwd -P > $@

.venv/.stamp-%: pyproject.toml | $(SETUP)
	@$(BIN)/python scripts/environment.py extra $*
	@touch $@
