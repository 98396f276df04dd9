# The two commands are `make demo` and `make test`; each sees to what it needs.

CARGO ?= cargo
STRIP ?= strip
IMAGE ?=
# By the environment: a path may hold quotes.
export IMAGE

TARGET_DIR = $(or $(CARGO_TARGET_DIR),target)
# What `make build` leaves for `make install`, with the pages and completions that the
# program writes itself.
export BUILT ?= $(TARGET_DIR)/package
# The C library is linked in; musl's, where rustup has that target.
STATIC_TARGET = $(shell uname -m)-unknown-linux-$(or $(STATIC_LIBC),gnu)

.PHONY: all build static install uninstall deb rpm demo test lint test-host test-kernel test-packages test-fuzz test-miri bench clean help

all: build

help:
	@echo 'make build        the release binary, target/release/imgdm, and what goes with it'
	@echo 'make install      all of it, below PREFIX (/usr/local); DESTDIR and more: scripts/install --help'
	@echo 'make uninstall    takes exactly that away, with the same variables'
	@echo 'make static       a binary that needs no library, for initrds and rescue disks'
	@echo 'make deb          a Debian package, in target/debian'
	@echo 'make rpm          an RPM package, in target/rpm'
	@echo 'make demo         attach an example chain and compare it with qemu-img (IMAGE=path: your own)'
	@echo 'make test         everything: lint, unit, CLI, oracle and property tests, kernel tier, packages, fuzzing'
	@echo 'make test-host    the tests that need no device-mapper'
	@echo 'make test-kernel  the tests on a real kernel, in a User-Mode Linux guest'
	@echo 'make test-packages  install, static binary and packages'
	@echo 'make test-fuzz    each fuzz target for 20 seconds (fuzz/README.md)'
	@echo 'make test-miri    the parsers over the fuzz corpora, interpreted, where Miri is installed'
	@echo 'make bench        speed, as ratios to qemu-img and to the plain reads'

build:
	@scripts/setup build
	$(CARGO) build --release --locked
	@scripts/package-files $(TARGET_DIR)/release/imgdm

# Built once; as root, `make install` after `make build` needs no Rust.
$(BUILT)/imgdm:
	$(MAKE) build

install: | $(BUILT)/imgdm
	@scripts/install install

uninstall:
	@scripts/install uninstall

static:
	@scripts/setup build
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --profile static --locked --target $(STATIC_TARGET)
	mkdir -p $(TARGET_DIR)/static
	cp $(TARGET_DIR)/$(STATIC_TARGET)/static/imgdm $(TARGET_DIR)/static/imgdm

# Not of what an earlier build left.
deb: build
	@scripts/setup deb
	packaging/deb

rpm: build
	@scripts/setup rpm
	packaging/rpm

demo:
	@scripts/setup demo
	@scripts/demo "$$IMAGE"

test:
	@scripts/setup test
	$(MAKE) lint
	$(MAKE) test-host
	$(MAKE) test-kernel
	$(MAKE) test-packages
	$(MAKE) test-fuzz
	$(MAKE) test-miri

# --all-targets passes over the kernel tiers, which cargo test does not run by itself.
lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --features fault-injection -- -D warnings
	$(CARGO) clippy --locked --test kernel --test kernel_udev --features fault-injection -- -D warnings
	$(CARGO) clippy --locked --lib --bins --test fuzzed --no-default-features -- -D warnings
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	@$(CARGO) deny --version >/dev/null 2>&1 || { echo 'lint: cargo-deny is missing: scripts/setup test installs it' >&2; exit 1; }
	$(CARGO) deny --locked check bans licenses sources
	shellcheck $$(grep -rlIE '^#!/bin/(ba|busybox )?sh' .ci debian dracut fuzz/make-corpus fuzz/miri fuzz/run initramfs packaging scripts tests)

# Only what tests depend on is built optimised (Cargo.toml): compiling the rest so takes longer than it saves.
test-host:
	$(CARGO) test --locked
	$(CARGO) test --locked --no-default-features --lib --bins

test-kernel:
	tests/kernel/run
	tests/kernel_udev/run
	tests/kernel_initrd/run

test-packages:
	tests/packages/run

# Without a nightly toolchain `make test-host` still runs the corpora.
test-fuzz:
	@scripts/setup fuzz
	@if rustup toolchain list 2>/dev/null | grep -q '^nightly'; then fuzz/run; else echo 'test-fuzz: no nightly toolchain, nothing is fuzzed'; fi

# Without Miri `make test-host` still runs the corpora, with overflow checks and debug assertions.
test-miri:
	@status=0; fuzz/miri || status=$$?; [ $$status = 69 ] || exit $$status

bench:
	@scripts/setup bench
	$(CARGO) bench --locked

clean:
	$(CARGO) clean
