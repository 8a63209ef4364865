#!/usr/bin/env bash
# Builds grokpipe in release mode and runs it.
#
#   ./launch.sh                          the cluster of cluster.toml: the demo model on four local workers
#   ./launch.sh --once "PROMPT"          prints the continuation and ends
#   ./launch.sh worker --coordinator A   a first argument that is a subcommand goes to grokpipe itself
#
# It installs what is missing where it can (Debian, as root), and otherwise names it. Only the program's own output goes to standard
# output.
set -euo pipefail
# With CDPATH set, `cd` may go to another folder and print its path.
unset CDPATH

# The script's own folder, even if it was started through a link.
script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do
  folder=$(cd -- "$(dirname -- "$script")" && pwd -P)
  script=$(readlink -- "$script")
  case $script in /*) ;; *) script=$folder/$script ;; esac
done
root=$(cd -- "$(dirname -- "$script")" && pwd -P)
rust_needed=1.95

say() { printf '%s\n' "$*" >&2; }

# Find a toolchain that was installed without changing the shell's settings.
cargo_home=${CARGO_HOME:-${HOME:+$HOME/.cargo}}
if ! command -v cargo >/dev/null && [ -n "$cargo_home" ] && [ -x "$cargo_home/bin/cargo" ]; then
  PATH=$cargo_home/bin:$PATH
fi

# install PACKAGE...: uses apt as root on Debian and its relatives; fails elsewhere.
install() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 1
  say "installing $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2
}

# rust_is_new_enough COMMAND...: true if this command, run as `rustc`, is at least the required version.
rust_is_new_enough() {
  local said
  # Run it in the project's folder, so that a toolchain chosen for the project counts.
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
  # Debian's packages may be too old; the check below reports that.
  install cargo rustc || true
fi
if ! rust_is_new_enough rustc && command -v rustup >/dev/null; then
  # Use an installed toolchain, even if it is not the chosen one.
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

# Where cargo builds, unless its own settings say otherwise.
target=${CARGO_TARGET_DIR:-${CARGO_BUILD_TARGET_DIR:-$root/target}}
case $target in /*) ;; *) target=$PWD/$target ;; esac
grokpipe=$target/release/grokpipe

# A first build takes minutes, so cargo reports its progress, also into a log. A later one is short: only a terminal shows it.
quiet=
if [ ! -x "$grokpipe" ]; then
  say "building grokpipe in release: a first build takes about 7 minutes on two cores"
elif [ ! -t 2 ]; then
  quiet=--quiet
fi
built=$(cargo build --release --locked $quiet --message-format json-render-diagnostics --manifest-path "$root/Cargo.toml" \
  --package grokpipe) || {
  say "error: the build failed; see cargo's messages above"
  exit 1
}
# Cargo reports the path of the program, which its settings may have moved.
reported=$(sed -nE 's/.*"executable":"(([^"\\]|\\.)*)".*/\1/p' <<<"$built" | sed -E 's/\\(.)/\1/g' | tail -n 1)
grokpipe=${reported:-$grokpipe}

# Use the cluster.toml of the current folder; without one, the project's.
if [ -z "${GROKPIPE_CONFIG:-}" ] && [ ! -f cluster.toml ]; then
  export GROKPIPE_CONFIG=$root/cluster.toml
fi

# The program knows its subcommands and its own flags; everything else goes to `up`.
if [ $# -gt 0 ] && "$grokpipe" "$1" --help >/dev/null 2>&1; then
  exec "$grokpipe" "$@"
fi
exec "$grokpipe" up "$@"
