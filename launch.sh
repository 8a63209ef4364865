#!/usr/bin/env bash
# Builds grokpipe in release and runs it.
#
#   ./launch.sh                          the cluster of cluster.toml: the demo model on four local workers
#   ./launch.sh --once "PROMPT"          prints the continuation and ends
#   ./launch.sh worker --coordinator A   a first argument that is a subcommand goes to grokpipe itself
#
# What is missing is installed where that is possible (Debian, as root), or named. Everything but the program's own output goes
# to standard error.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
rust_needed=1.95

say() { printf '%s\n' "$*" >&2; }

# A toolchain that its user installed without touching the shell's settings is found all the same.
if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
  PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi

# install PACKAGE...: by apt, as root on Debian and its relatives; fails elsewhere.
install() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 1
  say "installing $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2
}

rust_is_new_enough() {
  local found
  # Asked here, so that a toolchain chosen for this folder counts.
  found=$(cd "$root" && rustc --version 2>/dev/null | cut -d' ' -f2) || return 1
  [ -n "$found" ] && [ "$(printf '%s\n%s\n' "$rust_needed" "$found" | sort -V | head -n 1)" = "$rust_needed" ]
}

if ! command -v cc >/dev/null; then
  install gcc libc6-dev || {
    say "error: there is no C compiler, which Rust needs for linking"
    say "  do     install one: apt-get install gcc libc6-dev"
    exit 1
  }
fi
if ! command -v cargo >/dev/null; then
  # The oldest Debian packages are too old; the check below says so.
  install cargo rustc || true
fi
if ! rust_is_new_enough && command -v rustup >/dev/null; then
  say "installing Rust $rust_needed with rustup"
  rustup toolchain install "$rust_needed" --profile minimal >&2 && export RUSTUP_TOOLCHAIN=$rust_needed
fi
if ! rust_is_new_enough; then
  say "error: Rust $rust_needed or newer is needed, found $(rustc --version 2>/dev/null || echo none)"
  say "  do     install rustup as https://rustup.rs says, then: rustup toolchain install $rust_needed"
  exit 1
fi

say "building (the first time takes some minutes)"
quiet=--quiet
if [ -t 2 ]; then quiet=; fi
cargo build --release --locked $quiet --manifest-path "$root/Cargo.toml" --package grokpipe >&2 || {
  say "error: the build failed; its messages stand above"
  exit 1
}
target=${CARGO_TARGET_DIR:-$root/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
grokpipe=$target/release/grokpipe

# The cluster.toml of the current folder comes first; without one, this project's, from wherever this script is called.
if [ -z "${GROKPIPE_CONFIG:-}" ] && [ ! -f cluster.toml ]; then
  export GROKPIPE_CONFIG=$root/cluster.toml
fi

case ${1:-} in
  up | coordinator | worker | generate | plan | status | inspect | verify | convert | tokenize | logits | bench | --help | -h | --version | -V)
    exec "$grokpipe" "$@"
    ;;
  *)
    exec "$grokpipe" up "$@"
    ;;
esac
