# Every target needs only python3 >= 3.11; what it uses beyond that is installed into .venv from constraints.txt.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.recofuse-installed
RUNNABLE := $(VENV)/.recofuse-runnable

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check fmt proto docs lock pictures bench drills audit check-deploy check-gpu check-image check-package

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "recofuse needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Each reinstalls only when a dependency changed; the package itself is installed editable. What runs the model on a CPU
# is a third of everything, and is all that there is to wait for until more is asked for; modules are compiled when used.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[all,dev]' -c constraints.txt
	@touch $@ $(RUNNABLE)

$(RUNNABLE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -e '.[cpu,server]' -c constraints.txt
	@touch $@

setup: $(INSTALLED) ## install everything into .venv

demo: $(RUNNABLE) ## serve, fuse one pair over HTTP (IR=... VIS=... for your own), write demo/fused.png and demo/sheet.png
	@$(BIN)/recofuse demo $(if $(IR),--ir "$(IR)") $(if $(VIS),--vis "$(VIS)")

serve: $(RUNNABLE) ## keep a server running
	@$(BIN)/recofuse serve

test: $(INSTALLED) ## run the tests that need no GPU, but for those of deploy/, in two processes (JOBS=N for more)
	@$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile -m 'not gpu and not stack and not package and not image' --ignore=tests/deploy

check: $(INSTALLED) ## formatting, lint and types, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fmt: $(INSTALLED) ## format, and mend what lint can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

proto: $(INSTALLED) ## generate recofuse_protos from proto/
	@$(BIN)/python proto/generate.py

docs: $(INSTALLED) ## write docs/settings.md, docs/metrics.md, .env.example, README's table of files and the floor plan from the code
	@$(BIN)/recofuse settings > docs/settings.md
	@$(BIN)/recofuse metrics > docs/metrics.md
	@$(BIN)/python -m docs.write_formats
	@$(BIN)/python -m docs.floor_plan
	@{ cat deploy/compose.env; $(BIN)/recofuse settings --env; } > .env.example

lock: $(INSTALLED) ## write deploy/requirements-*.txt, what the images install, from pyproject.toml and constraints.txt
	@UV=$(BIN)/uv deploy/lock.sh

pictures: $(INSTALLED) ## make the pictures of the documents from generated scenes
	@$(BIN)/python -m docs.make_pictures

bench: $(INSTALLED) ## measure what the service costs without the model, and the model by runtime; on an idle machine
	@$(BIN)/recofuse bench service $(ARGS)
	@$(BIN)/recofuse bench engine --runtimes

drills: $(INSTALLED) ## prove the promises of docs/reliability.md on real processes, in ten to fifteen minutes
	@$(BIN)/python -m benchmarks.drills $(ARGS)

check-gpu: $(INSTALLED) ## everything that only an NVIDIA GPU can show, in under ten minutes
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

audit: $(INSTALLED) ## check the installed packages, and with pip-audit their known vulnerabilities
	@$(BIN)/python -m pip check --disable-pip-version-check
	@if command -v pip-audit >/dev/null; then pip-audit --requirement constraints.txt --no-deps --disable-pip; \
	else echo "pip-audit is not installed: known vulnerabilities were not looked up"; fi

check-package: $(INSTALLED) ## build the wheel, install it into empty environments, and run its part of the tests there
	@$(BIN)/python -m pytest tests/packaging

check-deploy: $(INSTALLED) ## check everything in deploy/, and run docker-compose.yml as local processes (STRICT=1: all tools)
	@CHECK_DEPLOY_STRICT=$(STRICT) $(BIN)/python -m pytest tests/deploy

check-image: $(INSTALLED) ## build the images and run them in real containers (STRICT=1: all tools; KEEP=1: for a quick next run; GPU=1: that for GPUs, too)
	@CHECK_DEPLOY_STRICT=$(STRICT) CHECK_IMAGE_KEEP=$(KEEP) CHECK_IMAGE_GPU=$(GPU) $(BIN)/python -m pytest tests/image
