# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup browser demo newcomer test bench soak docs screenshot lint format typecheck unit clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' PIP_BUILD_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' \
		$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

# BROWSER=no leaves out the tests that need Chromium.
export BROWSER
browser:
	@.ci/chromium

demo: setup
	@$(BIN)/python -m tests.demo $(if $(KONG),--kong)

# From a clone to the first usage table, timed.
newcomer:
	@$(PYTHON) -m tests.newcomer $(ARGS)

bench: setup
	@$(BIN)/python -m tests.bench $(if $(KONG),--kong) $(ARGS)

soak: setup
	@$(BIN)/python -m tests.soak $(ARGS)

$(VENV)/.docs: $(VENV)/.ready
	PIP_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' PIP_BUILD_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' \
		$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[docs]'
	@touch $@

#? docs: build the documentation as a site into site/, its tables made of the code first
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(BIN)/python -m tests.settings_reference
	$(BIN)/python -m tests.deploy.metrics_reference
	$(BIN)/python -m mkdocs build --clean

#? screenshot: take the README's picture of the dashboard from a running demo (needs Chromium)
screenshot: setup
	$(BIN)/python -m tests.demo.screenshot

# With the documentation, so that its strict build is among the tests.
test: browser lint typecheck $(VENV)/.docs unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup
	$(BIN)/mypy

unit: setup browser
	$(BIN)/pytest -n 4 $(ARGS)

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis
