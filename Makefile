# make demo and make test each make .venv, install into it, and run. Any Python from 3.11 on:
#   make install PYTHON=python3.12
PYTHON ?= python3
OUT ?= demo_out
# Processes that run the tests, a file of them at a time. Most of the time is XLA's compiler's, which
# uses one core. WORKERS=0 runs all in one process, e.g. for --pdb.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

# After installation nothing needs the network; these libraries would look for news.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install demo test docs lint format lock audit clean

help:
	@echo "make install            .venv with all that demo and tests need"
	@echo "make demo [OUT=DIR]     the whole story on the embedded data set; report in DIR"
	@echo "make test [ARGS=...]    the tests, in WORKERS=2 processes; ARGS go to pytest"
	@echo "make docs               README and docs/ as a site in site/; fails on a broken link"
	@echo "make lint               ruff and ty, nothing is changed"
	@echo "make format             ruff mends what it can"
	@echo "make lock               requirements/ci.txt: what CI installs, with hashes"
	@echo "make audit              known holes in those versions"
	@echo "make clean              removes .venv and caches"

install: $(STAMP)

# torch serves only the tests against PyTorch. 2.13.0 on Python 3.11 is the one pair that was tried;
# elsewhere those tests are skipped and say so. So are those that compile for TPUs: with libtpu
# beside it, JAX complains of the missing TPU at every start. CI installs it and runs them.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"$(PYTHON) is Python {v[0]}.{v[1]}, wanted 3.11 or newer: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --editable \
	  ".[$$($(BIN)/python -c 'import sys; print("test,parity" if sys.version_info[:2] == (3, 11) else "test")')]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/emollama demo --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# One folder of pages: README becomes the home page, links to docs/ lose that prefix, and pipes in
# tables lose the backslash that GitHub wants.
# What .ci/run installs, on Python 3.11 and Linux, with the SHA-256 of every file. Versions that are
# there are kept; `make lock ARGS=--upgrade` takes the newest. PyTorch is its own index' CPU build.
LOCK_FROM ?= --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra test --extra parity --extra docs --extra plan \
	  --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet $(LOCK_FROM) \
	  --no-emit-index-url --no-emit-find-links $(ARGS) --output-file requirements/ci.txt

# Known holes in the locked versions; without a network, nothing is known, and that is no error.
audit: $(STAMP)
	$(BIN)/python -m pip install --quiet pip-audit || true
	$(BIN)/python -m tools.audit $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	rm -rf build/docs
	mkdir -p build
	cp -r docs build/docs
	for page in README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs/*.md; do \
	  sed 's#](docs/#](#g; s#\\|#|#g' $$page > build/docs/$${page##*/}; done
	mv build/docs/README.md build/docs/index.md
	$(BIN)/zensical build --clean --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build site
