# `make` alone says what there is. Everything runs in .venv, which `make setup` fills.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
REPEAT ?= 1
MINUTES ?= 10
# Tests wait for processes more than they compute: twice as many as there are cores.
JOBS ?= 4
SEED ?=
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup demo test versions pgbouncer slow nightly crash mutations chaos drill bench bench-smoke bench-peers audit \
	deploy-check lock lint types layers format migration

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS='…' is handed on to demo, test, crash and bench: make demo ARGS='--leads 200 --keep'"

setup: $(STAMP) ## Put Stepwell and all that its development needs into .venv

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup ## Welcome a thousand leads while workers are killed
	$(BIN)/stepwell demo $(ARGS)

test: setup ## Run all tests but the slow ones
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' $(ARGS)

# On this version what the integration tests test goes through a PgBouncer, where there is one: so that happens once with
# each change, and takes no time of its own.
POOLED := 15
# Of these only what is mostly SQL is tested: for versions between two that are tested whole.
BRIEFLY ?=
SQL_TESTS := tests/upgrade $$(ls tests/integration/test_{protocol,schema,enqueue,plans,forget,repairs,exporter,idle}*.py)

versions: setup ## Run the tests that need a database on the other versions of Postgres that are here, once through PgBouncer
	export STEPWELL_PROGRAMS=$${STEPWELL_PROGRAMS:-50}; \
	for version in $$($(BIN)/python -m tests.postgres); do \
		if [[ " $(BRIEFLY) " = *" $$version "* ]]; then \
			echo "on Postgres $$version, briefly"; \
			$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' --postgres $$version $(SQL_TESTS) $(ARGS); \
			continue; \
		fi; \
		through=; \
		if [ "$$version" = $(POOLED) ] && PATH="$$PATH:/usr/sbin" command -v pgbouncer >/dev/null; then through=--pgbouncer; fi; \
		echo "on Postgres $$version $${through:+through PgBouncer}"; \
		$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' --postgres $$version $$through tests/integration tests/crash tests/upgrade $(ARGS); \
		$(BIN)/pytest -n $(JOBS) --dist load -m 'slow and crash' --postgres $$version tests/crash tests/upgrade $(ARGS); \
	done

pgbouncer: setup ## Run the integration tests with everything that is tested behind a PgBouncer in transaction mode
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' --pgbouncer tests/integration $(ARGS)

slow: setup ## Run the slow tests: the demo in every way it can go, and the crash matrix
	$(BIN)/pytest -n $(JOBS) --dist load -m slow $(ARGS)

nightly: setup ## Run thousands of random programs among random kills, another seed each time, and the whole matrix
	STEPWELL_PROGRAMS=$${STEPWELL_PROGRAMS:-3000} STEPWELL_SEED=$${STEPWELL_SEED:-$$(date +%s)} \
		$(BIN)/pytest tests/crash/test_programs.py $(ARGS)
	STEPWELL_MATRIX=full $(BIN)/pytest tests/crash/test_matrix.py $(ARGS)

crash: setup ## Run the crash tests, slow ones too; REPEAT=10 runs them ten times in a row
	for round in $$(seq $(REPEAT)); do \
		echo "crash tests, round $$round of $(REPEAT)"; \
		$(BIN)/pytest -n $(JOBS) --dist load -m crash $(ARGS); \
	done

mutations: setup ## Turn off one guard after the other, and see that a test notices; ARGS='--only fence'
	$(BIN)/python -m tests.mutations $(ARGS)

chaos: setup ## Let everything go wrong under a mixed load, MINUTES=10 long, SEED=… says how
	$(BIN)/python -m tests.crash.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

drill: setup ## Kill the primary of a Patroni cluster under load and print the ledger; ARGS='--rounds 5 --asynchronous'
	$(BIN)/python -m tests.crash.drill $(ARGS)

BENCH_STAMP := .venv/.installed-bench

$(BENCH_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

bench-peers: $(BENCH_STAMP) ## Measure other systems beside it, each set up as its documentation advises; needs the network
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench: setup ## Measure: runs per second, latency, recovery; ARGS='--all' for all there is
	$(BIN)/python -m benchmarks $(ARGS)

bench-smoke: setup ## Fail if it has become a lot slower, compared with Postgres itself
	$(BIN)/python -m benchmarks.smoke $(ARGS)

audit: setup ## Look dependencies up in the database of known vulnerabilities; needs the network
	test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit; .audit/bin/python -m pip install --quiet pip-audit; }
	.audit/bin/pip-audit --strict --skip-editable --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

DEPLOY_STAMP := .venv/.installed-deploy

$(DEPLOY_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[deploy]'
	mkdir -p .venv/kubernetes-models
	cd .venv/kubernetes-models && echo '{"private": true}' >package.json && \
		npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts \
		@kubernetes-models/keda @kubernetes-models/prometheus-operator
	touch $@

deploy-check: $(DEPLOY_STAMP) ## Validate all of deploy/; what `make test` skips for want of a tool fails here
	STEPWELL_DEPLOY_CHECK=1 $(BIN)/pytest tests/deploy tests/crash/test_scrape.py $(ARGS)

# Without an address in them: whoever builds the image gets the files from where he gets all others.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' $(ARGS)

lock: $(DEPLOY_STAMP) ## Pin by hash what the image gets; ARGS=--upgrade takes the newest
	$(LOCK) --extra encryption --extra otel pyproject.toml --output-file deploy/requirements.txt
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" \
		| $(LOCK) - --output-file deploy/requirements-build.txt

lint: setup ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check the types of the code; tests/typing checks the public API as its users see it
	$(BIN)/mypy
	$(BIN)/pyright

layers: setup ## Check which module may import which
	$(BIN)/lint-imports --no-logo

migration: setup ## Draft the migration that a changed schema.sql needs; NAME=trace
	@$(BIN)/python -m tests.upgrade.draft $(or $(NAME),name)

format: setup ## Format the code and mend what can be mended mechanically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
