#!/usr/bin/env bash
# Tests the CPU backend for 64-bit ARM under emulation: with NEON's byte products, and on a CPU that has none.
#
# Needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user, and `rustup target add aarch64-unknown-linux-gnu`. Takes some
# ten minutes, which is why ./test.sh does without it.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu missing=()
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) || missing+=(qemu-user)
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu)
[ -d /usr/aarch64-linux-gnu/include ] || missing+=(libc6-dev-arm64-cross)
[ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || missing+=("Rust's target $target")
if [ ${#missing[@]} -gt 0 ]; then
    echo "arm.sh: missing are $(printf '%s, ' "${missing[@]}" | sed 's/, $//')" >&2
    exit 1
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
cargo clippy --locked --target "$target" -p grokpipe-kernels --lib --tests -- -D warnings

# tests CPU PATH ARGUMENTS...: as this CPU, on which this path must be the best.
tests() {
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$qemu -L /usr/aarch64-linux-gnu -cpu $1" CPU_PATH=$2 \
        cargo test --locked --target "$target" -p grokpipe-kernels "${@:3}"
}
# All but two references that take minutes here: what they hold to account has the same bits as plain Rust, as others see.
tests max neon --lib -- cpu ops:: --skip gpu --skip ops::matmul --skip ops::gated_gelu
tests cortex-a53 portable --lib -- cpu::
# xAI's numbers, and on either path the bits that x86 gives.
tests max neon --test cpu_golden -- xais fingerprint
tests cortex-a53 portable --test cpu_golden -- fingerprint
