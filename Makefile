# Everything a fresh machine with Python 3.11 and make needs; each target creates .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
LAB := $(VENV)/.lab
# timm and torchvision need another build of torch: some 6 GB
ARCHITECTURES := .venv-architectures
LOWEST := .venv-lowest
NEWEST := .venv-newest
WHEEL := .venv-wheel
DOCS := .venv-docs
PUBLISHING := .venv-publishing
PUBLISHED := $(ARCHITECTURES)/.installed
# what measures the tests: coverage, changes at random
DEV := $(VENV)/.dev
FAST := tests/unit tests/oracles tests/networks -m "not slow"
CORE := tests/unit tests/oracles tests/networks tests/properties tests/distributed
# the processes of a test run compile the sources once
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-gpu test-architectures architectures coverage mutants shuffled lint types docs format lowest newest dist bench gallery house results study-small hooks clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(LAB)  ## plain training, smoothing, dropout, SAM, ASAM and FAM on noisy digits, compared; the report is demo/report.html
	$(BIN)/relflat compare digits-unshifted --label-noise 0.2 --epochs 30 --trials 0 --seeds 9 --runs demo/runs --out demo

quick: $(READY)  ## tests of the core's parts, of every awkward network and of quoted numbers, in under 90 seconds
	$(PYTEST) tests/unit tests/oracles tests/networks tests/docs/test_results.py tests/docs/test_repository.py -m "not slow"

test: $(READY)  ## every test, doctest and document
	$(PYTEST)

test-gpu: $(READY)  ## tests of numbers on a GPU, in float64 and half precision; where there is none it says so
	@$(BIN)/python tests/gpu.py

test-architectures: $(PUBLISHED)  ## every published architecture, those of timm, torchvision and smp too, layer by layer
	$(ARCHITECTURES)/bin/python -m pytest -n 2 --dist loadgroup tests/architectures

architectures: $(PUBLISHED)  ## write docs/architectures.md
	$(ARCHITECTURES)/bin/python tests/architectures/report.py

coverage: $(DEV)  ## lines of the core that its tests run; fails under 95 %
	$(PYTEST) $(CORE) --cov --cov-report=term --cov-fail-under=95

mutants: $(DEV)  ## do the tests notice 150 small changes at random to what chooses, captures, estimates? an hour; SEED=2
	mkdir -p build
	$(PYTEST) $(CORE) --cov --cov-report= --cov-context=test -vv --durations=0 --durations-min=0 > build/durations.txt
	$(BIN)/python tools/mutants.py --durations build/durations.txt --out build/mutants.jsonl --seed $(or $(SEED),2)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check src tests benchmarks docs tools
	$(BIN)/ruff format --check src tests benchmarks docs tools

types: $(READY)  ## mypy --strict on src
	$(BIN)/mypy

docs: $(DOCS)/.installed  ## the site, in site/; strict: every link and anchor must lead somewhere
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

format: $(READY)  ## write what ruff can mend
	$(BIN)/ruff check --fix src tests benchmarks docs tools
	$(BIN)/ruff format src tests benchmarks docs tools

shuffled: $(READY)  ## tests of the core's parts in an order at random; SEED=1
	$(BIN)/pip install --quiet --no-deps --target build/shuffled --upgrade pytest-randomly
	PYTHONPATH=build/shuffled $(PYTEST) $(FAST) -p randomly --randomly-seed=$(or $(SEED),1)

lowest:  ## tests of the core's parts and a comparison at the lowest versions that pyproject.toml allows; another 6 GB
	$(call environment,$(LOWEST),--resolution lowest-direct)
	$(LOWEST)/bin/python -m pytest -q -n 2 -m "not slow" tests/unit tests/oracles
	$(LOWEST)/bin/relflat compare digits --arms plain,fam --epochs 2 --seeds 3 --runs build/lowest --out build/lowest

newest:  ## the same at the newest versions that there are, whatever constraints.txt has; another 6 GB
	$(call environment,$(NEWEST),--upgrade)
	$(NEWEST)/bin/python -m pytest -q -n 2 -m "not slow" tests/unit tests/oracles
	$(NEWEST)/bin/relflat compare digits --arms plain,fam --epochs 2 --seeds 3 --runs build/newest --out build/newest

dist:  ## wheel and source distribution under dist, checked; the wheel in an empty environment, with a user's type checkers
	$(PYTHON) -m venv --clear $(PUBLISHING)
	$(PUBLISHING)/bin/pip install --quiet build twine mypy pyright
	rm -rf dist
	$(PUBLISHING)/bin/python -m build --quiet
	$(PUBLISHING)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	PUBLISHING=$(abspath $(PUBLISHING)) tools/wheel.sh $(abspath $(WHEEL))

bench: $(READY)  ## cost of training and measuring, in benchmarks/results, errors of estimates and memory of vocabularies, in build
	$(BIN)/python benchmarks/cost.py
	mkdir -p build
	$(BIN)/python benchmarks/estimators.py --json build/estimators.json
	$(BIN)/python benchmarks/vocabulary_memory.py --json build/vocabulary_memory.json

gallery: $(READY)  ## draw the figures of docs/gallery by its programs, and write its page
	$(BIN)/relflat data get fashion-mnist minilm reviews
	$(BIN)/python tools/gallery.py

house: $(READY)  ## sizes, arrows between modules and rooms, and what is over the limits
	$(BIN)/python tools/house.py

results: $(READY)  ## take the numbers of new reports under docs/study over into docs/study/results.json, and draw their picture
	$(BIN)/python docs/study/collect.py
	$(BIN)/python docs/study/picture.py

study-small: $(LAB)  ## run the comparisons on digits again and hold them against the printed intervals; some 20 minutes
	$(BIN)/python docs/study/repeat.py

hooks: $(READY)  ## run ruff and mypy before each commit
	$(BIN)/pip install --quiet --constraint constraints.txt pre-commit
	$(BIN)/pre-commit install

define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet uv
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) --editable ".[lab]" --group test
endef

# what the main job needs, and no more
$(LAB): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	@echo "installing relflat with its lab: some 1.5 GB, a few minutes"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[lab]"
	touch $@

$(READY): $(LAB)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[lab,lightning,transformers,accelerate,skorch,peft,hub,ray]" --group test --group architectures --group examples
	touch $@

# neither torch nor relflat: docstrings are read, not imported
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt --group docs
	touch $@

$(DEV): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $@

$(PUBLISHED): pyproject.toml
	$(PYTHON) -m venv $(ARCHITECTURES)
	$(ARCHITECTURES)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(ARCHITECTURES)/bin/pip install --quiet --editable . --group architectures timm torchvision segmentation-models-pytorch hypothesis pytest pytest-xdist
	touch $@

clean:  ## remove the environment, caches and the demo
	rm -rf $(VENV) $(ARCHITECTURES) $(LOWEST) $(NEWEST) $(WHEEL) $(PUBLISHING) $(DOCS) build dist demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis
