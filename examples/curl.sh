#!/usr/bin/env bash
# What a running cluster says over HTTP, and a generation over gRPC by reflection.
#
#     examples/curl.sh [HTTP-ADDRESS] [GRPC-ADDRESS]
set -euo pipefail
http=${1:-127.0.0.1:8080}
grpc=${2:-127.0.0.1:7070}

echo "# is the process alive?"
curl --silent --show-error "http://$http/livez"; echo
echo "# can it answer requests? 503 names the missing layers"
curl --silent --show-error "http://$http/readyz"; echo
echo "# everything the page shows"
curl --silent --show-error "http://$http/api/v1/cluster"; echo

if command -v buf >/dev/null; then
    echo "# a generation, one message a token"
    buf curl --protocol grpc --http2-prior-knowledge --data '{"text": "The capital of France is", "maxTokens": 8}' \
        "http://$grpc/grokpipe.v1.InferenceService/Generate"
fi
