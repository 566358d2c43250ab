# What a person types: `make demo`, `make test`. Everything else is a part of these.
#
# `setup` is quick the second time: it asks dpkg what is missing and make what is stale.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# python3-venv makes .venv; the others are the other ends of the tests and of the demo.
DEBIAN_PACKAGES := python3-venv mdadm fio nbdkit nbdkit-plugin-python libnbd-bin python3-libnbd fuse3 \
	qemu-utils e2fsprogs xz-utils util-linux kmod procps \
	corosync iproute2 gcc libc6-dev libcpg-dev libquorum-dev libvotequorum-dev libcmap-dev

.PHONY: setup packages demo test check bench clean

setup: packages $(INSTALLED)

packages:
	@missing=(); \
	if ! command -v dpkg-query >/dev/null; then \
		echo "setup: this is no Debian. The demo and the tests also use: $(DEBIAN_PACKAGES)"; \
		exit 0; \
	fi; \
	for package in $(DEBIAN_PACKAGES); do \
		[[ "$$(dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null)" == installed ]] \
			|| missing+=("$$package"); \
	done; \
	(( $${#missing[@]} )) || exit 0; \
	if [[ $$(id -u) != 0 ]]; then \
		echo "setup: not root, so these Debian packages stay missing: $${missing[*]}"; \
		echo "setup: what needs them is skipped; to have it: sudo apt-get install $${missing[*]}"; \
		exit 0; \
	fi; \
	echo "setup: installing Debian packages: $${missing[*]}"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq update && apt-get -qq install -y --no-install-recommends "$${missing[@]}" >/dev/null

$(INSTALLED): pyproject.toml | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "setup: $(PYTHON) is $$($(PYTHON) -V 2>&1); clustermd needs Python 3.11 or later (make PYTHON=...)"; exit 1; }
	@[[ -x $(BIN)/python ]] || { echo "setup: making a virtual environment in .venv"; $(PYTHON) -m venv .venv; }
	@echo "setup: installing clustermd and its tools into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $@
	@echo "setup: done, the command is $(BIN)/clustermd"

demo: setup
	@$(BIN)/clustermd demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup check
	$(BIN)/pytest -n 2 --dist worksteal -m "not alone"
	$(BIN)/pytest -m alone

bench: setup
	$(BIN)/python benchmarks/cluster.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
