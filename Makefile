# Everything on a fresh machine: `make tune` searches, `make test` runs the tests. Both set up first.
# Extra arguments: `make tune ARGS="--data photos --backbone resnet50"`, `make test ARGS="-k journal"`.

PYTHON ?= python3
ARGS ?=
MODEL ?=
IMAGE ?= visiontuner-serving
ENGINE ?=
BIN := .venv/bin
STAMP := .venv/.installed
LISTS := pyproject.toml requirements.txt constraints.txt
# For `make ui` and `make serving-image`; visiontuner itself switches it off.
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help install tune test test-container serving-image aws-smoke ui lint bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

install: $(STAMP)  ## a virtual environment in .venv with exactly the tested versions

# pip or uv, whichever is there; the stamp makes a second `make` do nothing.
$(STAMP): $(LISTS)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "visiontuner needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1 || true)." \
	    "Name another one: make install PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || if command -v uv >/dev/null; then uv venv --quiet --seed --python "$(PYTHON)" .venv; \
	  else "$(PYTHON)" -m venv .venv >/dev/null || { rm -rf .venv; \
	    echo "'$(PYTHON) -m venv' failed: install your system's venv package" \
	      "(Debian, Ubuntu: apt install python3-venv), or install uv." >&2; exit 1; }; fi
	@echo "Installing the tested versions into .venv (some gigabytes; minutes the first time)"
	@if command -v uv >/dev/null; \
	  then uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	  else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; fi
	@touch $(STAMP)

tune: $(STAMP)  ## search on the quickstart's images; ARGS= for your own
	@$(BIN)/python -m visiontuner tune $(ARGS)

test: $(STAMP)  ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Without a Docker engine root on Debian gets one for the length of the tests; with ENGINE=--or-skip
# it is no failure if there is none.
test-container: $(STAMP)  ## test the model in SageMaker's container
	@VISIONTUNER_CONTAINER_TESTS=1 $(BIN)/python tests/container/engine.py $(ENGINE) \
	  $(BIN)/python -m pytest tests/container $(ARGS)

serving-image: $(STAMP)  ## the image that serves a model: make serving-image MODEL=models:/dogs@champion
	@docker info >/dev/null 2>&1 || { echo "No Docker engine runs here (\`docker info\` fails):" \
	  "start Docker, or build where one runs." >&2; exit 1; }
	@test -n "$(MODEL)" || { echo "Name the model: make serving-image MODEL=models:/NAME@champion" >&2; exit 1; }
	@$(BIN)/python scripts/serving_image.py "$(MODEL)" "$(IMAGE)"

aws-smoke: $(STAMP)  ## deploy, ask and undeploy on your AWS account; costs some cents
	@$(BIN)/python scripts/aws_smoke.py $(ARGS)

ui: $(STAMP)  ## compare the runs in a browser
	@$(BIN)/python -m visiontuner.tracking.view
	@$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" $(ARGS)

lint: $(STAMP)  ## ruff, mypy and the layer rule
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)  ## repeat the measurements of docs/benchmarks.md
	@$(BIN)/python benchmarks/run.py $(ARGS)

clean:  ## remove .venv, builds and tools' caches; searches/ and mlflow.db stay
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Kept what you made: searches/ and mlflow.db."
