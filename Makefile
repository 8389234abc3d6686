# Two commands do everything: `make demo` and `make test`. Both install what is missing or say what to install.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: demo test test-clients page torture fuzz build setup fmt golden clean

demo: build
	$(TARGET)/release/esker demo

build: setup
	$(CARGO) build --release --locked -p esker-server

# What CI runs. Everything is built in the release profile, with assertions on: what is tested is what runs.
test: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	@./.ci/setup-power
	$(CARGO) test --release --locked --workspace

# The Python package and its connectors under the engines' own code, each in a virtual environment of its own.
test-clients: build
	@CARGO_TARGET_DIR="$(abspath $(TARGET))" ./.ci/test-clients

# The page at / of the HTTP port, from server/ui/src. What it is built to is committed and embedded: only who changes it needs Node.
page:
	cd server/ui && npm ci --no-audit --no-fund && npm run build

# The long form of the reliability tests: an hour or two. Figures go to torture.json, see RELIABILITY.md.
torture: setup
	@./.ci/setup-power
	@CARGO="$(CARGO)" ./.ci/torture

# Each parser for a minute, from the kept corpus. Needs cargo-fuzz, and says so.
fuzz: setup
	@CARGO="$(CARGO)" ./.ci/fuzz

setup:
	@./.ci/setup

fmt:
	$(CARGO) fmt --all

clean:
	$(CARGO) clean
