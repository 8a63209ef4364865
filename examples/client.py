#!/usr/bin/env python3
"""Streams a generation over gRPC, with stubs made from proto/ at start.

    pip install grpcio grpcio-tools
    examples/client.py "The capital of France is" [--server 127.0.0.1:7070] [--max-tokens 16] [--temperature 0.7] [--seed 1]

The text goes to standard output as it comes; what the server says besides, to standard error.
"""

import argparse
import importlib
import pathlib
import sys
import tempfile

import grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parent.parent / "proto"


def stubs():
    """The generated modules for inference.proto."""
    out = tempfile.mkdtemp(prefix="grokpipe-stubs-")
    files = [str(path.relative_to(PROTO)) for path in sorted(PROTO.glob("grokpipe/v1/*.proto"))]
    if protoc.main(["protoc", f"-I{PROTO}", f"--python_out={out}", f"--grpc_python_out={out}", *files]) != 0:
        sys.exit("the protocol's files do not compile")
    sys.path.insert(0, out)
    return (importlib.import_module(f"grokpipe.v1.inference_{kind}") for kind in ("pb2", "pb2_grpc"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--server", default="127.0.0.1:7070")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()

    messages, services = stubs()
    sampling = messages.SamplingOptions(temperature=arguments.temperature)
    if arguments.seed is not None:
        sampling.seed = arguments.seed
    request = messages.GenerateRequest(text=arguments.prompt, max_tokens=arguments.max_tokens, sampling=sampling)
    with grpc.insecure_channel(arguments.server) as channel:
        try:
            for answer in services.InferenceServiceStub(channel).Generate(request, timeout=600):
                kind = answer.WhichOneof("event")
                if kind == "accepted":
                    print(f"accepted as {answer.accepted.id}, seed {answer.accepted.seed}", file=sys.stderr)
                elif kind == "token":
                    print(answer.token.text, end="", flush=True)
                elif kind == "finished":
                    print(answer.finished.text, flush=True)
                    timings = answer.finished.timings
                    print(f"{timings.output_tokens} tokens in {timings.total_us / 1e6:.2f} s", file=sys.stderr)
        except grpc.RpcError as error:
            sys.exit(f"{error.code().name}: {error.details()}")


if __name__ == "__main__":
    main()
