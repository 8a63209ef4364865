#!/usr/bin/env bash
# The whole test suite several times in a row, on two cores with two other busy processes: tests that need an idle machine fail here.
#   tests/repeat.sh [TIMES]        5 by default
# A line a run, then the lines of those that failed or were skipped. Exit code 1 if one run failed. Ends its own processes only.
set -euo pipefail
cd "$(dirname "$0")/.."
times=${1:-5}
on_two_cores=()
if command -v taskset >/dev/null; then on_two_cores=(taskset --cpu-list 0,1); fi
busy=()
for _ in 1 2; do
    ${on_two_cores[@]+"${on_two_cores[@]}"} sh -c 'while :; do :; done' &
    busy+=($!)
done
trap 'kill "${busy[@]}" 2>/dev/null; wait "${busy[@]}" 2>/dev/null || true' EXIT
mkdir -p target
failed=0
for run in $(seq "$times"); do
    began=$SECONDS
    if ${on_two_cores[@]+"${on_two_cores[@]}"} ./test.sh >"target/repeat-$run.log" 2>&1; then how=green; else how=RED failed=1; fi
    printf 'run %s: %s in %s s: %s\n' "$run" "$how" $((SECONDS - began)) "$(tail -n 1 "target/repeat-$run.log")"
done
grep -hE '^(failed|skipped): ' target/repeat-*.log | sort | uniq -c || true
exit $failed
