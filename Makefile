# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Images of CI often set it. Without bytecode on disk each of four workers rewrites the assertions of 450 files
# once more (12 s instead of 67 s of CPU to collect them), and each of a thousand processes compiles its modules.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo unit test cov slow lint format typecheck bench soak leaders model conformity docs dist images images-test images-newcomer screenshots newcomer browser tools clean
.DEFAULT_GOAL := help

#? help: print this list
help:
	@sed -n 's/^#? //p' $(MAKEFILE_LIST) | sed 's/: /\t/' | expand -t 12 | sed 's/^/make /'
	@echo
	@echo "ARGS= passes options on to pytest or to the program: make unit ARGS='-k spool', make soak ARGS='--rounds 5'"

#? setup: install the project and what its tests need into .venv
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' PIP_BUILD_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' \
		$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

#? demo: replay recorded traffic, create the customers, check the bill (KONG=1: through a real Kong; LUA=1: in Lua)
demo: setup
	@$(BIN)/python -m tests.demo $(if $(KONG),--kong) $(if $(LUA),--lua)

#? unit: run the quick tests only, in under a minute
unit: setup
	$(BIN)/pytest -n 2 -m 'not slow' $(ARGS)

#? test: run every check (lint, types, all tests, the coverage floor)
test: setup browser
	@# Compiling helm takes two minutes on a new machine; style and types are checked meanwhile.
	@$(MAKE) --no-print-directory -j 3 --output-sync=target tools lint typecheck
	@$(MAKE) --no-print-directory cov
	@$(MAKE) --no-print-directory slow

#? cov: run the quick tests and fail if they cover less than the floor
cov: setup
	$(BIN)/pytest -n 4 -m 'not slow' --cov --cov-report=term:skip-covered $(ARGS)

#? slow: run the tests that need processes, servers, a browser or many examples
slow: setup browser tools $(VENV)/.docs
	$(BIN)/pytest -n 4 -m slow $(ARGS)

#? lint: check style, format and the direction of imports
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

#? format: fix style and format
format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

#? typecheck: check types with mypy
typecheck: setup
	$(BIN)/mypy

#? bench: measure against kong-pdk and a bare loop (KONG=1: in a real Kong, against an empty plugin server)
bench: setup
	@$(BIN)/python -m tests.bench $(if $(KONG),--kong) $(ARGS)

#? soak: kill every process at random for a hundred rounds, then check that every event was counted once
soak: setup
	@$(BIN)/python -m tests.soak $(ARGS)

#? leaders: kill or freeze the leader of three syncds on one PostgreSQL, fifty times (ARGS='--rounds 5')
leaders: setup
	@$(BIN)/python -m tests.leaders $(ARGS)

#? model: run syncd for 10,000 random steps against a failing metering API and people who edit (STEPS=, SEED=)
model: setup
	MODEL_STEPS=$(or $(STEPS),10000) MODEL_SEED=$(or $(SEED),0) \
		$(BIN)/pytest -n 4 -m slow tests/syncd/model $(ARGS)

#? conformity: check syncd and the plugin against a metering API (URL=http://... DIALECT=v1|v3|both TOKEN=... WITH_CUSTOMERS=yes)
conformity: setup
	@$(BIN)/python -m tests.conformity $(URL) $(if $(DIALECT),--dialect $(DIALECT)) $(if $(WITH_CUSTOMERS),--with-customers) $(ARGS)

$(VENV)/.docs: $(VENV)/.ready
	PIP_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' PIP_BUILD_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' \
		$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[docs]'
	@touch $@

#? docs: regenerate the reference tables and build the site
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(BIN)/python -m tests.settings_reference
	$(BIN)/python -m tests.json_schemas
	$(BIN)/python -m tests.deploy.metrics_reference
	$(BIN)/python -m tests.state_diagrams
	$(BIN)/python -m tests.scale
	$(BIN)/python -m mkdocs build --clean

#? dist: build wheel and source distribution twice, install each extra, write the SBOM
dist: setup
	@PIP_CONSTRAINT='$(CURDIR)/.ci/constraints.txt' \
		$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dist]'
	@$(BIN)/python -m tests.packaging

#? images: build both images with podman, on a base that debootstrap makes; prints their sizes
images: setup
	@.ci/images
	@$(BIN)/python -m tests.images

#? images-test: run the images: the compose file's services, the chart's pods, an init container
images-test: images
	IMAGES=yes $(BIN)/pytest tests/images $(ARGS)

#? images-newcomer: from an empty container to a bill, timed: install the wheel, replay traffic, sync
images-newcomer: setup
	@.ci/images
	@$(BIN)/python -m tests.images.newcomer

#? screenshots: take every page of the dashboard into screenshots/, and retake those of the README
screenshots: setup browser
	$(BIN)/python -m tests.demo.screenshots

#? newcomer: measure the time from a fresh clone to the first usage table
newcomer:
	@$(PYTHON) -m tests.newcomer $(ARGS)

#? browser: install Chromium for the dashboard's tests (BROWSER=no skips them)
export BROWSER
browser:
	@.ci/chromium

#? tools: install helm, kubeconform, actionlint, promtool and schemas into .tools for the deployment tests
tools:
	@.ci/tools

#? clean: remove .venv, .tools, site and caches
clean:
	rm -rf $(VENV) .tools site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
