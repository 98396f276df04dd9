# The two commands are `make demo` and `make test`; each sees to what it needs.

CARGO ?= cargo
IMAGE ?=
# By the environment: a path may hold quotes.
export IMAGE

.PHONY: all build demo test lint test-host test-kernel bench clean help

all: build

help:
	@echo 'make build        the release binary, target/release/imgdm'
	@echo 'make demo         attach an example chain and compare it with qemu-img (IMAGE=path: your own)'
	@echo 'make test         everything: lint, unit, CLI, oracle and property tests, kernel tier'
	@echo 'make test-host    the tests that need no device-mapper'
	@echo 'make test-kernel  the tests on a real kernel, in a User-Mode Linux guest'
	@echo 'make bench        speed, as ratios to qemu-img and to the plain reads'

build:
	@scripts/setup build
	$(CARGO) build --release --locked

demo:
	@scripts/setup demo
	@scripts/demo "$$IMAGE"

test:
	@scripts/setup test
	$(MAKE) lint
	$(MAKE) test-host
	$(MAKE) test-kernel

# --all-targets passes over the kernel tiers, which cargo test does not run by itself.
lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --features fault-injection -- -D warnings
	$(CARGO) clippy --locked --test kernel --test kernel_udev --features fault-injection -- -D warnings
	$(CARGO) clippy --locked --lib --bins --no-default-features -- -D warnings

# Only what tests depend on is built optimised (Cargo.toml): compiling the rest so takes longer than it saves.
test-host:
	$(CARGO) test --locked
	$(CARGO) test --locked --no-default-features --lib --bins

test-kernel:
	tests/kernel/run
	tests/kernel_udev/run

bench:
	@scripts/setup test
	$(CARGO) bench --locked

clean:
	$(CARGO) clean
