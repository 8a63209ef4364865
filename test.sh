#!/usr/bin/env bash
# Everything that CI checks: format, lints, documentation, tests. Every suite of tests runs, whatever became of those before it; the
# end lists tests that failed and tests that were skipped, and its last line counts them for machines.
#
# GPU tests run on whatever Vulkan adapter there is, a software one included; with GPU_REQUIRED=1 (as in CI) a missing adapter is a
# failure, otherwise those tests are skipped. Arguments are those of `cargo test`; everything that tests said is in target/test.log.
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
of_cargo=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do of_cargo+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
mkdir -p target
log=target/test.log
# All but what passing tests printed.
progress() {
    local line shown=yes
    while IFS= read -r line; do
        case $line in successes:) shown=no ;; failures: | "test result: "*) shown=yes ;; esac
        if [ $shown = yes ]; then printf '%s\n' "$line"; fi
    done
}
set +e
cargo test --workspace --locked --no-fail-fast ${of_cargo[@]+"${of_cargo[@]}"} -- --show-output "$@" 2>&1 |
    tee "$log" | progress
code=${PIPESTATUS[0]}
set -e
step "all suites have run"
awk -v code="$code" -f tests/summary.awk "$log"
exit "$code"
