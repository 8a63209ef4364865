#!/usr/bin/env bash
# Everything that CI checks: format, lints, documentation, tests. GPU tests run on whatever Vulkan adapter there is, a software
# one included; with GPU_REQUIRED=1 (as in CI) a missing adapter is a failure, otherwise those tests say that they were skipped.
set -euo pipefail
cd "$(dirname "$0")"
# Nothing here asks anybody anything.
exec </dev/null

step() { printf '\n== %s\n' "$*" >&2; }

step "format"
cargo fmt --all --check
step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet
step "the fuzz targets' lock file"
cargo metadata --locked --format-version 1 --manifest-path tests/fuzz/Cargo.toml >/dev/null
step "tests"
cargo test --workspace --locked "$@"
