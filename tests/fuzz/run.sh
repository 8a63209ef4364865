#!/usr/bin/env bash
# Fuzzes the readers: run.sh [TARGET|all] [SECONDS], by default all four for ten minutes each, one after the other.
# Needs a nightly toolchain and a C++ compiler, and builds as cargo-fuzz does, without it. An input that crashes, takes longer than
# a second, or makes a reader use more than 512 MB or allocate 256 MB at once is kept in target/fuzz/artifacts/TARGET/, and fails the run.
set -euo pipefail
cd "$(dirname "$0")"
fuzz=$PWD root=$(cd ../.. && pwd)
chosen=${1:-all} seconds=${2:-600}
targets=(gguf safetensors pickle tokenizer)
if [ "$chosen" != all ]; then
    [[ " ${targets[*]} " == *" $chosen "* ]] || { echo "run.sh: expected all or one of ${targets[*]}, found $chosen" >&2; exit 2; }
    targets=("$chosen")
fi

host=$(rustc +nightly -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=$root/target/fuzz
# Flags go to the target alone, so that build scripts are not instrumented; hence --target.
RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo +nightly build --release --locked --target "$host"

# Freed memory that the sanitizer holds back would count as used.
export ASAN_OPTIONS=quarantine_size_mb=32
status=0
for target in "${targets[@]}"; do
    binary=$CARGO_TARGET_DIR/$host/release/$target
    work=$CARGO_TARGET_DIR/corpus/$target artifacts=$CARGO_TARGET_DIR/artifacts/$target
    mkdir -p "$work" "$artifacts"
    inputs=("$work" "$fuzz/corpus/$target")
    if [ -d "$fuzz/regressions/$target" ]; then inputs+=("$fuzz/regressions/$target"); fi
    echo "== $target, $seconds s" >&2
    # Work goes on after a slow input, since a busy machine makes any input slow at times.
    "$binary" "${inputs[@]}" -artifact_prefix="$artifacts/" \
        -max_total_time="$seconds" -max_len=16384 -use_value_profile=1 -print_final_stats=1 \
        -report_slow_units=1 -timeout=60 -rss_limit_mb=512 -malloc_limit_mb=256 || status=1
    # Those that are slow again by themselves, and the others that failed, are findings.
    for slow in "$artifacts"/slow-unit-*; do
        if [ -e "$slow" ] && "$binary" -timeout=1 "$slow" 2>/dev/null; then rm "$slow"; fi
    done
    if [ -n "$(ls "$artifacts")" ]; then echo "$target: see $artifacts" >&2 && status=1; fi
done
exit $status
