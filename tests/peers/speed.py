#!/usr/bin/env python3
"""Speed beside llama.cpp and ik_llama.cpp, on the same files and threads, in alternating runs.

    tests/peers/speed.py FOLDER [--types Q8_0,Q4_K] [--threads 1,2] [--rounds 3] [--prompts 128,512]

FOLDER has bench-TYPE.gguf and the peers: build/bin/llama-bench and llama-batched-bench of llama.cpp, build-ik/bin/llama-bench of
ik_llama.cpp; a peer that is not there is left out. Each round runs every program once, so that what the machine does meanwhile
disturbs all alike; the medians over the rounds and our ratios to the peers are printed as a table in Markdown. The share is that of
the read bandwidth which our own run measured around each test.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

GENERATED = 64
SEQUENCES = 8
ROOT = Path(__file__).resolve().parents[2]


def run(command):
    """Standard output of a command; its errors go to ours."""
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def ours(program, model, threads, prompts):
    """Tokens a second by test, and the share of the bandwidth of each decode."""
    command = [program, "bench", "stage", "--model", model, "--device", "cpu", "--threads", threads, "--precision", "fast"]
    command += ["--gen", GENERATED, "--batch", f"1,{SEQUENCES}", "--prompt", ",".join(map(str, prompts)), "--repeat", 1, "--json"]
    found, shares = {}, {}
    for result in json.loads(run(command))["results"]:
        name = f"decode × {result['batch']}" if result["test"] == "decode" else f"prefill {result['prompt']}"
        found[name] = result["tokens_per_second"]
        if result["test"] == "decode":
            shares[name] = result["share_of_bandwidth"]
    return found, shares


def llama_bench(program, model, threads, prompts, more):
    """Tokens a second of llama-bench, of either project."""
    command = [program, "-m", model, "-t", threads, "-p", ",".join(map(str, prompts)), "-n", GENERATED, "-r", 1, "-o", "json"]
    found = {}
    for result in json.loads(run(command + more)):
        name = f"prefill {result['n_prompt']}" if result["n_prompt"] else "decode × 1"
        found[name] = result["avg_ts"]
    return found


def batched(program, model, threads):
    """Tokens a second of several sequences that decode together, by llama.cpp."""
    command = [program, "-m", model, "-t", threads, "-c", 4096, "-npp", 16, "-ntg", 32, "-npl", SEQUENCES]
    for line in run(command).splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        # PP, TG, B, N_KV, T_PP, S_PP, T_TG, S_TG, T, S
        if len(cells) == 10 and cells[2] == str(SEQUENCES):
            return {f"decode × {SEQUENCES}": float(cells[7])}
    sys.exit(f"{program} printed no line of {SEQUENCES} sequences")


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default="Q8_0,Q4_K")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompts", default="128,512")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    grokpipe, llama = target / "release/grokpipe", args.folder / "build/bin/llama-bench"
    llama_batched, ik = args.folder / "build/bin/llama-batched-bench", args.folder / "build-ik/bin/llama-bench"
    if not grokpipe.exists():
        sys.exit(f"{grokpipe} is missing: cargo build --release -p grokpipe")
    prompts = [int(prompt) for prompt in args.prompts.split(",")]
    print("| file | threads | test | grokpipe | of memory | ik_llama.cpp | llama.cpp | × ik | × llama.cpp |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for kind in args.types.split(","):
        model = args.folder / f"bench-{kind}.gguf"
        for threads in args.threads.split(","):
            all_found, all_shares = [], []
            for _ in range(args.rounds):
                mine, shares = ours(grokpipe, model, threads, prompts)
                ik_found = llama_bench(ik, model, threads, prompts, ["-rtr", 1, "-fa", 0]) if ik.exists() else {}
                llama_found = llama_bench(llama, model, threads, prompts, []) if llama.exists() else {}
                if llama_batched.exists():
                    llama_found |= batched(llama_batched, model, threads)
                all_found.append((mine, ik_found, llama_found))
                all_shares.append(shares)
            for test in all_found[0][0]:
                medians = [
                    statistics.median(round_[which][test] for round_ in all_found) if test in all_found[0][which] else None
                    for which in range(3)
                ]
                share = statistics.median(shares[test] for shares in all_shares) if test in all_shares[0] else None
                cells = [kind, threads, test, f"{medians[0]:.1f}", f"{100 * share:.0f} %" if share else ""]
                cells += [f"{value:.1f}" if value else "" for value in medians[1:]]
                cells += [f"{medians[0] / value:.2f}" if value else "" for value in medians[1:]]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
