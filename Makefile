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
	corosync fence-agents iproute2 gcc libc6-dev libcpg-dev libquorum-dev libvotequorum-dev libcmap-dev

# What locks are compared with.
BENCH_PACKAGES := etcd-server redis-server

.PHONY: setup packages demo test check bench bench-packages clean

setup: packages $(INSTALLED)

# install-debian NAMES, WHAT-FOR: those of the packages that are missing, if we may.
define install-debian
	@missing=(); \
	if ! command -v dpkg-query >/dev/null; then \
		echo "setup: this is no Debian. $(2) also use: $(1)"; \
		exit 0; \
	fi; \
	for package in $(1); do \
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
endef

packages:
	$(call install-debian,$(DEBIAN_PACKAGES),The demo and the tests)

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
	$(BIN)/pytest -n 2 --dist worksteal -m "not by_file and not machines"
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m machines
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m by_file

# Debian starts a server that it installs; RUNLEVEL=1 says not to: the benchmark has servers of its own.
bench-packages: export RUNLEVEL := 1
bench-packages:
	$(call install-debian,$(BENCH_PACKAGES),The benchmarks)

bench: setup bench-packages
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group bench
	$(BIN)/python benchmarks/cluster.py
	$(BIN)/python benchmarks/locks.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
