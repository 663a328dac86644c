# Everything from a clean machine: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MESON_DIR := build/meson
NATIVE := core/packetstack_core/native
CODE := core agent engine cli operator bench tests setup.py
PACKAGES := core/packetstack_core agent/packetstack_agent engine/packetstack_engine cli/packetstack_cli operator/packetstack_operator
# Tests that play the agent's ports: what they play must be what the agent takes. And those of Mirror.
TYPED_TESTS := tests/lab/mirrored.py $(wildcard tests/mirror/test_*.py) tests/model/node.py $(patsubst %,tests/agent/test_%.py,attachments balancing explaining follower keeping probes scaling shedding verbs watchdog web)
PYTEST_ARGS ?=
TEST_JOBS ?= 3
BENCH_ARGS ?=
IMAGE ?= localhost/packetstack:dev
FUZZ_SECONDS ?= 30
# Of the demo: transfer or mirror.
HANDOVER ?= transfer
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Byte code is kept: tests start hundreds of commands and agents, and pytest rewrites each of its files.
unexport PYTHONDONTWRITEBYTECODE

DEBIAN := clang libclang-rt-dev bpftool gcc libbpf-dev libelf-dev zlib1g-dev libc6-dev linux-libc-dev meson ninja-build pkg-config python3 \
	python3-venv mount netbase ethtool iproute2 iputils-ping procps nftables iptables nginx-light haproxy iperf3 wrk curl util-linux buildah mmdebstrap prometheus \
	containerd runc containernetworking-plugins etcd-server

.PHONY: setup build image test soak lint format demo bench fuzz sanitize clean manifests cluster cluster-down
.DEFAULT_GOAL := build

# ---- set-up: stamp files, so that a second call costs nothing ------------------------------------------

build/.packages: Makefile
	@mkdir -p build
	@missing=""; for p in $(DEBIAN); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then echo "missing packages:$$missing; run this once as root, or install them" >&2; exit 1; fi; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -q && apt-get install -q -y --no-install-recommends $$missing; fi
	@touch $@

build/.python: pyproject.toml setup.py build/.packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"$(PYTHON) is Python %d.%d; PacketStack needs 3.11 or newer: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages into $(VENV); this takes a few minutes the first time"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: build/.python

# ---- native parts ---------------------------------------------------------------------------------------

$(MESON_DIR)/build.ninja: | build/.packages
	meson setup $(MESON_DIR)

build: $(MESON_DIR)/build.ninja
	@ninja --quiet -C $(MESON_DIR)
	@meson install -C $(MESON_DIR) --no-rebuild --quiet

# The container image as an OCI archive, build/image/packetstack.tar; nothing is done when it is up to date.
image: build/.packages
	deploy/build-image $(IMAGE) build/image/packetstack.tar

# ---- checks ---------------------------------------------------------------------------------------------

# Most tests wait more than they work, so they run side by side; those that count losses or measure rates follow, one by
# one. Which is which, and what shares a cluster, is in tests/conftest.py.
test: setup build lint
	@status=0; \
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder -m "not alone" $(PYTEST_ARGS) || status=1; \
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS) || status=1; \
	exit $$status

# What is long, at full size or random: an hour and a half. The suite has a small copy of each, with fixed seeds.
soak: setup build
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)
	$(MAKE) fuzz FUZZ_SECONDS=600

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(PACKAGES) $(TYPED_TESTS)
	$(BIN)/lint-imports --no-logo
	git ls-files -co --exclude-standard '*.c' '*.h' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: setup
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	git ls-files -co --exclude-standard '*.c' '*.h' | xargs -r $(BIN)/clang-format -i

# The unit programs of tests/c under AddressSanitizer + UndefinedBehaviourSanitizer, then ThreadSanitizer.
sanitize: build/.packages
	@test -f build/asan/build.ninja || CC=clang meson setup build/asan -Db_sanitize=address,undefined -Db_lundef=false
	ninja --quiet -C build/asan && meson test -C build/asan --print-errorlogs
	@test -f build/tsan/build.ninja || CC=clang meson setup build/tsan -Db_sanitize=thread -Db_lundef=false
	ninja --quiet -C build/tsan && meson test -C build/tsan --print-errorlogs

fuzz: build/.packages
	@test -f build/fuzz/build.ninja || CC=clang meson setup build/fuzz -Dfuzz=true
	ninja --quiet -C build/fuzz
	FUZZ_SECONDS=$(FUZZ_SECONDS) tests/fuzz/run build/fuzz

# What is made of other files: CRDs of the models, tables of the list of reasons, deploy/install.yaml of the charts.
manifests: setup
	$(BIN)/python -m packetstack_core.crds charts/packetstack-crds/templates
	$(BIN)/python -m packetstack_core.reasons docs/troubleshoot.md
	$(BIN)/python -m packetstack_core.preconditions docs/troubleshoot.md
	HELM=$$($(BIN)/python -c 'from tests.cluster.kubernetes_binaries import find; print(find("helm"))') deploy/render

# ---- to be seen -----------------------------------------------------------------------------------------

demo: setup build
	$(BIN)/packetstack demo --handover $(HANDOVER)

# A real Kubernetes of one node on this machine; the first time its programs are built, for some eight minutes.
cluster: setup build
	@$(BIN)/python -m tests.cluster up

cluster-down: setup
	@$(BIN)/python -m tests.cluster down

bench: setup build
	$(BIN)/python bench/run.py $(BENCH_ARGS)

clean:
	rm -rf build dist $(NATIVE) $(VENV) *.egg-info
