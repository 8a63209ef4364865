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
# With it `cd` may go elsewhere, and says where.
unset CDPATH

# The script's own folder, also when it is called by a link.
script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do
  folder=$(cd -- "$(dirname -- "$script")" && pwd -P)
  script=$(readlink -- "$script")
  case $script in /*) ;; *) script=$folder/$script ;; esac
done
root=$(cd -- "$(dirname -- "$script")" && pwd -P)
rust_needed=1.95

say() { printf '%s\n' "$*" >&2; }

# A toolchain that its user installed without touching the shell's settings is found all the same.
cargo_home=${CARGO_HOME:-${HOME:+$HOME/.cargo}}
if ! command -v cargo >/dev/null && [ -n "$cargo_home" ] && [ -x "$cargo_home/bin/cargo" ]; then
  PATH=$cargo_home/bin:$PATH
fi

# install PACKAGE...: by apt, as root on Debian and its relatives; fails elsewhere.
install() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 1
  say "installing $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2
}

# rust_is_new_enough COMMAND...: whether this command, as `rustc`, is Rust of the version that is needed.
rust_is_new_enough() {
  local said
  # Asked in the project's folder, so that a toolchain chosen for it counts.
  said=$(cd -- "$root" && "$@" --version 2>/dev/null) || return 1
  [[ $said =~ ^rustc\ ([0-9]+)\.([0-9]+) ]] || return 1
  ((BASH_REMATCH[1] > ${rust_needed%%.*} || (BASH_REMATCH[1] == ${rust_needed%%.*} && BASH_REMATCH[2] >= ${rust_needed#*.})))
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
if ! rust_is_new_enough rustc && command -v rustup >/dev/null; then
  # One that is there already, though it is not the chosen one, will do.
  while read -r toolchain _; do
    if rust_is_new_enough rustup run "$toolchain" rustc; then
      export RUSTUP_TOOLCHAIN=$toolchain
      break
    fi
  done < <(rustup toolchain list 2>/dev/null)
  if ! rust_is_new_enough rustc; then
    say "installing Rust $rust_needed with rustup"
    rustup toolchain install "$rust_needed" --profile minimal >&2 && export RUSTUP_TOOLCHAIN=$rust_needed
  fi
fi
if ! rust_is_new_enough rustc; then
  say "error: Rust $rust_needed or newer is needed, found $(rustc --version 2>/dev/null || echo none)"
  say "  do     install rustup as https://rustup.rs says, then: rustup toolchain install $rust_needed"
  exit 1
fi

say "building (the first time takes some minutes)"
quiet=--quiet
if [ -t 2 ]; then quiet=; fi
built=$(cargo build --release --locked $quiet --message-format json-render-diagnostics --manifest-path "$root/Cargo.toml" \
  --package grokpipe) || {
  say "error: the build failed; its messages stand above"
  exit 1
}
# Cargo says where the program is, wherever its settings have it build.
grokpipe=$(sed -nE 's/.*"executable":"(([^"\\]|\\.)*)".*/\1/p' <<<"$built" | sed -E 's/\\(.)/\1/g' | tail -n 1)
if [ -z "$grokpipe" ]; then
  target=${CARGO_TARGET_DIR:-${CARGO_BUILD_TARGET_DIR:-$root/target}}
  case $target in /*) ;; *) target=$PWD/$target ;; esac
  grokpipe=$target/release/grokpipe
fi

# The cluster.toml of the current folder comes first; without one, this project's, from wherever this script is called.
if [ -z "${GROKPIPE_CONFIG:-}" ] && [ ! -f cluster.toml ]; then
  export GROKPIPE_CONFIG=$root/cluster.toml
fi

# The program knows its subcommands and the flags that it takes without one; everything else is for `up`.
if [ $# -gt 0 ] && "$grokpipe" "$1" --help >/dev/null 2>&1; then
  exec "$grokpipe" "$@"
fi
exec "$grokpipe" up "$@"
