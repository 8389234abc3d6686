# Two commands do everything: `make demo` and `make test`. Both install what is missing or say what to install.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: demo test build setup fmt golden clean

demo: build
	$(TARGET)/release/esker demo

build: setup
	$(CARGO) build --release --locked -p esker-server

# What CI runs. Everything is built in the release profile, with assertions on: what is tested is what runs.
test: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	$(CARGO) test --release --locked --workspace

setup:
	@./.ci/setup

fmt:
	$(CARGO) fmt --all

clean:
	$(CARGO) clean
