# Everything runs in .venv, made on first use. PYTHON chooses the interpreter, one of 3.10 to 3.13.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := tests/data/panoramas
# Some images forbid Python to keep what it compiles; every process would compile PyTorch anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# Test files at once: one more than cores, since they wait, too, but four at most and one for each 7 GB.
WORKERS ?= $(shell awk -v most=$$(nproc) '/^MemTotal/ { n = int($$2 / 7e6); most = most < 3 ? most + 1 : 4; \
	print n < 1 ? 1 : n < most ? n : most }' /proc/meminfo)

.DEFAULT_GOAL := help
.PHONY: always help setup demo test check fault-check cluster-check deploy-check deploy-golden bench gpu-check gpu-rehearsal perf-analyzer docs clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# uv where it is installed, which does the same sooner; UV= for pip, whose settings uv does not read.
# Python compiles what it imports, not all that came.
UV ?= $(shell command -v uv 2> /dev/null)
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,\
	$(BIN)/python -m pip install --no-compile) --quiet -c constraints.txt

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, tritonserver and what the demo needs into $(VENV): a few GB, some minutes ..."
	$(INSTALL) -e '.[export]'
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(INSTALL) -e '.[dev]'
	touch $@

setup: $(VENV)/.installed  ## install into .venv

# By content, whatever the dates: a checkout that changes only those exports nothing, one that removes a source does.
SOURCES := constraints.txt $(sort $(shell find export model_repository client/panotriton/prompts client/panotriton/server/engines -type f -not -name '*.pyc'))
repository/.small: $(VENV)/.demo always
	@sha256sum $(SOURCES) | cmp --silent - $@ || { $(BIN)/panotriton export --preset small && sha256sum $(SOURCES) > $@; }

demo: repository/.small  ## two panoramas through the whole pipeline, on a server of its own
	$(BIN)/panotriton process --local $(DEMO)/sunset.jpg $(DEMO)/city.jpg --seed 7 --sphere 0 --preview --report -o out/demo

test: $(VENV)/.installed repository/.small  ## all tests, a real tritonserver included; WORKERS=1 for one after the other
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: setup  ## format, lint, types, generated pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/architecture.py --check
	$(BIN)/python docs/api.py --check

$(VENV)/.deploy: $(VENV)/.installed
	$(INSTALL) -e '.[deploy]'
	touch $@

build/deploy/helm: $(VENV)/.deploy tests/deploy/helm.txt
	$(BIN)/python tests/deploy/fetch_helm.py build/deploy
	touch $@

fault-check: $(VENV)/.installed repository/.small  ## kill, stop, drain and confuse servers, at most 15 minutes
	timeout 840 $(BIN)/python -m pytest -m "" --durations=30 tests/faults
	timeout 60 $(BIN)/python -m pytest -m thorough tests/server --ignore tests/server/test_cluster.py

cluster-check: $(VENV)/.installed  ## kill the workers, replicas and driver of runs on a Ray cluster, a quarter of an hour
	$(BIN)/python -m pytest -m thorough tests/server/test_cluster.py

deploy-check: build/deploy/helm  ## containers, chart, dashboards: all that needs no engine or cluster
	$(BIN)/python -m pytest tests/deploy

deploy-golden: build/deploy/helm  ## rewrite what the chart renders, kept for review
	$(BIN)/python -m tests.deploy.golden

bench: $(VENV)/.installed repository/.small  ## all measurements, half an hour: build/bench/report.md
	$(BIN)/python tests/bench/run.py

gpu-check: $(VENV)/.installed repository/.small  ## all that needs a GPU, 8 minutes and at first an export; exit code 4 without one
	$(BIN)/panotriton bench gpu

gpu-rehearsal: $(VENV)/.installed repository/.small  ## the same on the CPU, in smallest sizes: whether all of it runs, a minute
	$(BIN)/python -m pytest -n 2 --dist load tests/gpu

build/bench/perf_analyzer/tool/perf_analyzer: $(VENV)/.installed
	$(BIN)/python tests/bench/perf_analyzer.py --fetch

perf-analyzer: build/bench/perf_analyzer/tool/perf_analyzer  ## fetch NVIDIA's load generator

docs: setup  ## rewrite what is generated from the configs
	$(BIN)/python docs/architecture.py
	$(BIN)/python docs/api.py

clean:  ## remove what was built, keep .venv
	rm -rf out build *.egg-info repository
