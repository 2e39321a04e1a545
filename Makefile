# make demo: from a bare machine to a trained, evaluated model and its report. make test: the tests. Both make .venv first.
VENV ?= .venv
PYTHON_VENV := $(VENV)/bin/python
WORKDIR ?= runs/demo
WORKERS ?= 2
BENCHMARKS = $(sort $(wildcard experiments/bench_*/run.py))

.PHONY: help demo test test-slow lint bench golden clean env env-test

help:
	@echo "make demo        train, evaluate and show a model ($(WORKDIR)/report.html)"
	@echo "make test        the tests; make test-slow: those that take minutes"
	@echo "make lint        ruff"
	@echo "make bench       the benchmarks of experiments/"
	@echo "make golden      write the golden texts of the configs anew"
	@echo "make clean       remove .venv and caches"

env:
	@VENV=$(VENV) scripts/setup_env.sh run

env-test:
	@VENV=$(VENV) scripts/setup_env.sh test

# Huge pages under malloc: the CPU backend's large temporary arrays cost fewer page faults.
demo: env
	@VENV=$(VENV) scripts/install_font.sh
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PYTHON_VENV) -m vlm_jax.demo --workdir $(WORKDIR)

test: env-test
	$(PYTHON_VENV) -m pytest -q -n $(WORKERS) -m "not slow"

test-slow: env-test
	$(PYTHON_VENV) -m pytest -q -n $(WORKERS) -m slow

lint: env-test
	$(PYTHON_VENV) -m ruff check .

bench: env-test
	@set -e; for script in $(BENCHMARKS); do echo "$$script"; $(PYTHON_VENV) -m $$(echo $${script%.py} | tr / .); done

golden: env-test
	$(PYTHON_VENV) -m tests.configs.regenerate

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
