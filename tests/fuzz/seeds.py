#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets, corpus/TARGET/NAME. Names that begin with good- are whole files that the readers accept.

Nothing but the standard library; the same bytes every time. Sizes are those of tiny/config.json where a format has none of its own.
"""
import json
import struct
from pathlib import Path

HERE = Path(__file__).parent
D, F, Q, KV, EXPERTS, VOCAB = 8, 16, 8, 4, 2, 16
GROUPS = 2  # of the row-parallel matrices


def save(target, name, data):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def f32(count):
    return struct.pack(f"<{count}f", *(i % 7 / 2 - 1 for i in range(count)))


# --- GGUF: kinds of value, and number, weights and bytes of each block format

U8, U16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, F64 = 0, 2, 4, 5, 6, 7, 8, 9, 10, 12
BLOCKS = [(1, 1, 2), (30, 1, 2), (8, 32, 34), (2, 32, 18), (3, 32, 20), (6, 32, 22), (7, 32, 24), (10, 256, 84),
          (11, 256, 110), (12, 256, 144), (13, 256, 176), (14, 256, 210), (20, 32, 18), (23, 256, 136)]
PACK = {U8: "<B", U16: "<H", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", F64: "<d"}


def text(value):
    return struct.pack("<Q", len(value)) + value


def scalar(kind, value):
    return text(value) if kind == TEXT else struct.pack(PACK[kind], value)


def array(kind, values):
    return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)


def gguf(metadata, tensors, version=3, alignment=32):
    """metadata: (key, kind, value or bytes of an array); tensors: (name, sizes innermost first, number of the type, bytes)."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    for key, kind, value in metadata:
        head += text(key.encode()) + struct.pack("<I", kind) + (value if kind == ARRAY else scalar(kind, value))
    data = b""
    for name, sizes, kind, numbers in tensors:
        head += text(name.encode()) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + struct.pack("<IQ", kind, len(data))
        data += numbers + bytes(-len(numbers) % alignment)
    return head + bytes(-len(head) % alignment) + data


def sizes(d=D, f=F, heads=2):
    values = {"block_count": 1, "context_length": 128, "embedding_length": d, "feed_forward_length": f,
              "attention.head_count": heads, "attention.head_count_kv": 1, "expert_count": EXPERTS, "expert_used_count": 2}
    return [("general.architecture", TEXT, b"grok"), *(("grok." + key, U32, value) for key, value in values.items()),
            ("grok.attention.layer_norm_rms_epsilon", F32, 1e-5)]


def tensors(merged=True, d=D, f=F, vocabulary=VOCAB, block=(0, 1, 4), heads=2):
    kind, weights, size = block

    def numbers(dimensions, vector=False):
        count = 1
        for dimension in dimensions:
            count *= dimension
        if vector or kind == 0:
            return (dimensions, 0, f32(count))
        one = bytes(i * 37 % 60 for i in range(size))
        return (dimensions, kind, one * (count // weights))

    kv = d // heads
    found = [("token_embd.weight", *numbers([d, vocabulary])), ("output_norm.weight", *numbers([d], True))]
    for name in ("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"):
        found.append((f"blk.0.{name}.weight", *numbers([d], True)))
    for name, dimensions in (("attn_q", [d, d]), ("attn_k", [d, kv]), ("attn_v", [d, kv]), ("attn_output", [d, d]),
                             ("ffn_gate_inp", [d, EXPERTS])):
        found.append((f"blk.0.{name}.weight", *numbers(dimensions)))
    for name, dimensions in (("ffn_gate", [d, f]), ("ffn_up", [d, f]), ("ffn_down", [f, d])):
        if merged:
            found.append((f"blk.0.{name}_exps.weight", *numbers(dimensions + [EXPERTS])))
        else:
            found += [(f"blk.0.{name}.{expert}.weight", *numbers(dimensions)) for expert in range(EXPERTS)]
    return found


def part(number, count=2):
    return [("split.no", U16, number), ("split.count", U16, count)]


def write_gguf():
    save("gguf", "good-merged", gguf(sizes(), tensors()))
    save("gguf", "good-apart", gguf(sizes(), tensors(merged=False), version=2))
    head = [("output.weight", [D, VOCAB], 30, bytes(2 * D * VOCAB))]
    more = [("general.alignment", U32, 8), ("general.name", TEXT, b"tiny"), ("grok.rope.freq_base", F32, 10000.0),
            ("grok.embedding_scale", F32, 78.0), ("grok.vocab_size", U64, VOCAB), ("grok.attention.key_length", I32, 4)]
    save("gguf", "good-head", gguf(sizes() + more, tensors() + head, alignment=8))
    for name, block in (("q8_0", BLOCKS[2]), ("q4_0", BLOCKS[3]), ("q5_1", BLOCKS[6])):
        save("gguf", f"good-{name}", gguf(sizes(32, 32), tensors(d=32, f=32, vocabulary=4, block=block)))
    every = tensors(merged=False)
    one = sizes() + part(0) + [("split.tensors.count", I32, len(every))]
    save("gguf", "good-split", gguf(one, every[:5]) + gguf(part(1), every[5:]))
    # No models, but headers with everything that a header can hold.
    blocks = [(f"t{kind}", [weights], kind, bytes(range(size))) for kind, weights, size in BLOCKS]
    save("gguf", "blocks", gguf([], blocks))
    kinds = [(f"k{kind}", kind, 1) for kind in PACK]
    lists = [(f"l{kind}", ARRAY, array(kind, [1, 0])) for kind in PACK]
    nested = struct.pack("<IQ", ARRAY, 2) + array(U8, [1]) + array(TEXT, [b"a"])
    save("gguf", "values", gguf(kinds + lists + [("n", ARRAY, nested), ("t", ARRAY, array(TEXT, [b"a", b""]))], []))
    save("gguf", "other-architecture", gguf([("general.architecture", TEXT, b"llama")], []))


# --- safetensors

OWN = "transformer/decoder_layer_0/"


def shapes():
    found = {"language_model/in_out_embed/embeddings": [VOCAB, D], "language_model/rms_norm/scale": [D]}
    layer = {"moe/linear/w": [EXPERTS, D, F], "moe/linear_1/w": [EXPERTS, F, D], "moe/linear_v/w": [EXPERTS, D, F],
             "multi_head_attention/key/w": [D, KV], "multi_head_attention/linear/w": [Q, D],
             "multi_head_attention/query/w": [D, Q], "multi_head_attention/value/w": [D, KV], "rms_norm/scale": [D],
             "rms_norm_1/scale": [D], "rms_norm_2/scale": [D], "rms_norm_3/scale": [D], "router/w": [D, EXPERTS]}
    return found | {OWN + name: shape for name, shape in layer.items()}


def hpcai():
    prefix = "model.layers.0."
    found = {"model.embed_tokens.weight": [VOCAB, D], "model.norm.scale": [D], "lm_head.weight": [VOCAB, D]}
    for name, shape in (("attn.q_proj.weight", [Q, D]), ("attn.k_proj.weight", [KV, D]), ("attn.v_proj.weight", [KV, D]),
                        ("attn.o_proj.weight", [D, Q]), ("moe_block.gate.weight", [EXPERTS, D]), ("pre_attn_norm.scale", [D]),
                        ("post_attn_norm.scale", [D]), ("pre_moe_norm.scale", [D]), ("post_moe_norm.scale", [D])):
        found[prefix + name] = shape
    for expert in range(EXPERTS):
        for name, shape in (("linear", [F, D]), ("linear_v", [F, D]), ("linear_1", [D, F])):
            found[f"{prefix}moe_block.experts.{expert}.{name}.weight"] = shape
    return found


def safetensors(shapes, dtype="F32", metadata=None):
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        numbers = f32(count) if dtype == "F32" else b"\x80\x3f" * count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def write_safetensors():
    save("safetensors", "good-own", safetensors(shapes(), metadata={"format": "pt"}))
    save("safetensors", "good-bf16", safetensors(hpcai(), "BF16"))
    save("safetensors", "good-f16", safetensors(hpcai(), "F16"))
    index = json.dumps({"metadata": {}, "weight_map": {name: "a.safetensors" for name in hpcai()}}).encode()
    save("safetensors", "good-index", index + b"\0" + safetensors(hpcai(), "BF16"))
    save("safetensors", "one", safetensors({"a": [2, 2]}))
    save("safetensors", "none", safetensors({}))


# --- pickles, as numpy writes them

def short(value):
    return b"\x8c" + bytes([len(value)]) + value


def named(module, name):
    return short(module) + short(name) + b"\x93"


def integer(value):
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


def pickled(shape, code, numbers):
    dtype = named(b"ml_dtypes", b"bfloat16") if code == "bf16" else short(code.encode())
    order = b"|" if code == "i1" else b"<"
    made = named(b"numpy.core.multiarray", b"_reconstruct") + named(b"numpy", b"ndarray") + b"K\0\x85C\x01b\x87R"
    dtype = named(b"numpy", b"dtype") + dtype + b"\x89\x88\x87R(K\x03" + short(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    sizes = b"(" + b"".join(map(integer, shape)) + b"t"
    return made + b"(K\x01" + sizes + dtype + b"\x94\x89B" + struct.pack("<I", len(numbers)) + numbers + b"tb"


def of(count, size):
    return bytes(i * 5 % 120 for i in range(count * size))


def quantised(weight, scales):
    def count(shape):
        product = 1
        for size in shape:
            product *= size
        return product
    state = short(b"weight") + pickled(weight, "i1", of(count(weight), 1))
    state += short(b"scales") + pickled(scales, "bf16", b"\x80\x3f" * count(scales))
    return named(b"__main__", b"QuantizedWeight8bit") + b")\x81}(" + state + b"ub"


def write_pickles():
    def whole(body):
        return b"\x80\x04\x95" + struct.pack("<Q", len(body) + 1) + body + b"."
    save("pickle", "good-norm", whole(pickled([D], "f4", f32(D))))
    save("pickle", "good-embedding", whole(pickled([VOCAB, D], "f4", f32(VOCAB * D))))
    save("pickle", "good-router", whole(pickled([D, EXPERTS], "f4", f32(D * EXPERTS))))
    save("pickle", "good-moe", whole(quantised([EXPERTS, D, F], [EXPERTS, 1, F])))
    save("pickle", "good-moe-down", whole(quantised([EXPERTS, F, D], [EXPERTS, GROUPS, D])))
    save("pickle", "good-key", whole(quantised([D, KV], [1, KV])))
    save("pickle", "good-output", whole(quantised([Q, D], [GROUPS, D])))
    save("pickle", "good-empty", whole(pickled([0], "f4", b"")))
    save("pickle", "memo", b"\x80\x04" + short(b"a") + b"\x94h\0\x85\x86M\1\2J\0\0\0\0}(h\0h\0uh\0C\1aB\1\0\0\0a.")
    save("pickle", "call", b"\x80\x04" + named(b"os", b"system") + short(b"true") + b"\x85R.")


# --- tokenizers

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def pieces():
    found = [(b"[PAD]", 0, CONTROL), (b"[UNK]", 0, UNKNOWN), (b"[EOS]", 0, CONTROL), (b"\n", 0, USER), (b"<|a|>", 0, USER),
             (b"aa", 0, USER)]
    found += [(b"<0x%02X>" % byte, 0, BYTE) for byte in range(256)]
    learned = ["a", "b", "ab", "c", "\u2581", "\u2581ab", "\u2581\u2581", "abab", "é", "\u2581The"]
    return found + [(piece.encode(), -rank, NORMAL) for rank, piece in enumerate(learned)] + [(b"x", 0, UNUSED)]


def field(number, data):
    length = len(data)
    assert length < 1 << 14
    return bytes([number << 3 | 2, length & 127 | 128, length >> 7]) + data


def write_tokenizers():
    trainer, normaliser = b"\x18\x02\x98\x02\x01", b"\x20\x00\x18\x01\x28\x01"

    def piece(text, score, kind):
        return field(1, bytes([10, len(text)]) + text + b"\x15" + struct.pack("<f", score) + bytes([24, kind]))
    listed = b"".join(piece(*one) for one in pieces())
    save("tokenizer", "good-model", listed + field(2, trainer) + field(3, normaliser) + field(4, b"\x09" + bytes(8)))
    save("tokenizer", "unigram", listed + field(2, b"\x18\x01"))
    save("tokenizer", "pieces", b"".join(piece(*one) for one in pieces()[:8]) + field(2, trainer) + field(3, normaliser))
    lists = [("tokenizer.ggml.model", TEXT, b"llama"),
             ("tokenizer.ggml.tokens", ARRAY, array(TEXT, [one[0] for one in pieces()])),
             ("tokenizer.ggml.scores", ARRAY, array(F32, [one[1] for one in pieces()])),
             ("tokenizer.ggml.token_type", ARRAY, array(I32, [one[2] for one in pieces()]))]
    save("tokenizer", "good-gguf", gguf(lists, []))
    save("tokenizer", "good-no-space", gguf(lists + [("tokenizer.ggml.add_space_prefix", BOOL, False)], []))
    save("tokenizer", "other-gguf", gguf([("tokenizer.ggml.model", TEXT, b"gpt2")], []))


if __name__ == "__main__":
    write_gguf()
    write_safetensors()
    write_pickles()
    write_tokenizers()
