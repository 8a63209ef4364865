#!/usr/bin/env bash
# Not part of CI: shows that llama.cpp reads what `grokpipe convert` writes, and compares the search for blocks with its own.
#
#   tests/peers/convert.sh FOLDER [MODEL]
#
# FOLDER has llama.cpp's programs in build/bin (llama-completion, llama-quantize, llama-gguf-split) and a Python with its package
# gguf in venv. MODEL, any file or folder that grokpipe opens, is converted to bf16 for the comparison of errors; rows of a multiple
# of 256 make it a comparison of the K formats. Without it only the demo model is converted.
set -euo pipefail
cd "$(dirname "$0")/../.."
peer=${1:?usage: tests/peers/convert.sh FOLDER [MODEL]}
model=${2:-}
bin=$peer/build/bin
cargo build --bin grokpipe --locked --quiet
grokpipe=${CARGO_TARGET_DIR:-target}/debug/grokpipe
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

prompt="The capital of France is"
wanted="Paris."
complete() {
    timeout 120 "$bin/llama-completion" -m "$1" -p "$prompt" -n 24 --temp 0 -no-cnv --no-display-prompt \
        </dev/null 2>"$scratch/log" || { tail -n 5 "$scratch/log" >&2; return 1; }
}
check() {
    local text
    text=$(complete "$2")
    printf '%-16s %s\n' "$1" "$(tr '\n' '|' <<<"$text")"
    [[ $text == *"$wanted"* ]] || { echo "expected $wanted" >&2; exit 1; }
}

echo "== llama.cpp runs the demo model in every type"
for type in q8_0 q4_0 q4_k q6_k bf16 mixed; do
    "$grokpipe" convert model/demo "$scratch/$type.gguf" --type "$type" >/dev/null
    check "$type" "$scratch/$type.gguf"
done

echo "== llama.cpp runs and merges a split file"
"$grokpipe" convert model/demo "$scratch/split.gguf" --type q8_0 --split-max-size 13MB >/dev/null
(cd "$scratch" && sha256sum --check --quiet split.gguf.sha256)
first=$(ls "$scratch"/split-00001-of-*.gguf)
check split "$first"
"$bin/llama-gguf-split" --merge "$first" "$scratch/merged.gguf" >/dev/null 2>&1
check merged "$scratch/merged.gguf"

echo "== grokpipe reads what llama.cpp merged, and its numbers are the same"
"$grokpipe" inspect "$scratch/merged.gguf" >/dev/null
"$grokpipe" convert "$scratch/merged.gguf" "$scratch/again.gguf" --type q8_0 >/dev/null
cmp "$scratch/again.gguf" "$scratch/q8_0.gguf"

if [ -n "$model" ]; then
    echo "== errors against bf16, ours and llama.cpp's"
    "$grokpipe" convert "$model" "$scratch/exact.gguf" --type bf16 >/dev/null
    for type in q8_0 q4_0 q4_k q6_k mixed; do
        "$grokpipe" convert "$scratch/exact.gguf" "$scratch/ours-$type.gguf" --type "$type" >/dev/null
    done
    for type in Q8_0 Q4_0 Q4_K Q6_K; do
        "$bin/llama-quantize" --pure "$scratch/exact.gguf" "$scratch/theirs-$type.gguf" "$type" >/dev/null 2>&1
    done
    "$bin/llama-quantize" "$scratch/exact.gguf" "$scratch/theirs-mixed.gguf" Q4_K_M >/dev/null 2>&1
    "$peer/venv/bin/python" - "$scratch" <<'PY'
import glob, os, sys
import gguf
import numpy as np

folder = sys.argv[1]
read = lambda name: {t.name: t for t in gguf.GGUFReader(os.path.join(folder, name)).tensors}
numbers = lambda t: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
exact = read("exact.gguf")
worse = False
for ours in sorted(glob.glob(os.path.join(folder, "ours-*.gguf"))):
    kind = os.path.basename(ours)[5:-5]
    theirs = read(f"theirs-{kind if kind == 'mixed' else kind.upper()}.gguf")
    sums = {}
    for name, tensor in read(os.path.basename(ours)).items():
        if tensor.tensor_type.name == "F32":
            continue
        if theirs[name].tensor_type != tensor.tensor_type:
            sys.exit(f"{name}: {tensor.tensor_type.name}, llama.cpp has {theirs[name].tensor_type.name}")
        x = numbers(exact[name])
        sum = sums.setdefault(tensor.tensor_type.name, [0.0, 0.0, 0.0])
        for index, y in enumerate((x * 0, numbers(tensor), numbers(theirs[name]))):
            sum[index] += ((y - x) ** 2).sum()
    for format, (size, own, other) in sums.items():
        own, other = (own / size) ** 0.5, (other / size) ** 0.5
        worse |= own > other * 1.0005
        print(f"{kind:6} {format:5} ours {own:.5f}  llama.cpp {other:.5f}")
sys.exit("a search of ours errs more than llama.cpp's" if worse else 0)
PY
fi
echo "all good"
