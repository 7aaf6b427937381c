# needle: `make train` trains on the embedded digits, `make test` runs the tests; both set up .venv on the first call.
# Needs Python 3.11 or newer and make. PYTHON=/path/to/python chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
JOBS := 2
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.14 python3.13 python3.12 python3.11 python3 python)

.DEFAULT_GOAL := help
.PHONY: help train test fuzz dev lint format types docs check-docs bench size clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

train: $(VENV)/.train ## train an MLP-ResNet on the embedded handwritten digits
	@$(BIN)/needle train mlp_resnet $(ARGS)

test: $(VENV)/.dev ## run the tests, in two processes (JOBS=n for others)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

fuzz: $(VENV)/.dev ## compare 5,000 random programs in every mode, bit by bit (FUZZ=n for others)
	@FUZZ=$(or $(FUZZ),5000) $(BIN)/python -m pytest -q tests/test_same_bits.py $(ARGS)

dev: $(VENV)/.dev ## set up .venv for work on needle

lint: $(VENV)/.dev ## check format and style
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

format: $(VENV)/.dev ## format the code, sort imports
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.dev ## check the types
	@$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check-docs: $(VENV)/.dev ## run every Python block of README.md and docs/
	@$(BIN)/python tools/check_docs.py

bench: $(VENV)/.dev ## time eager ops beside PyTorch, and contractions beside the machine's limits
	@$(BIN)/python benchmarks/eager.py $(ARGS)
	@$(BIN)/python benchmarks/limits.py

size: $(VENV)/.dev ## count the lines, ops and flags of the package
	@$(BIN)/python tools/size.py --check

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Set-up. A stamp is remade when pyproject.toml changes; a Python counts only if it runs, since a name may be a broken shim.

$(VENV)/.python:
	@for name in $(CANDIDATES); do \
	    if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$name"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "needle needs Python 3.11 or newer; tried: $(CANDIDATES). Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "$$found lacks the venv module; install it (on Debian and Ubuntu: apt-get install python3-venv) or name another: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$found" -V) (once; this takes a minute) ..."; \
	"$$found" -m venv $(VENV)
	@touch $@

$(VENV)/.train: pyproject.toml $(VENV)/.python
	@$(PIP) install --editable '.[plot,data]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.python
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.train

$(VENV)/.docs: pyproject.toml $(VENV)/.python
	@$(PIP) install --editable '.[docs]'
	@touch $@
