#!/usr/bin/env bash
# Generates the gRPC stubs from proto/; with --check, compares them with those that are committed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.
[ "${1:-}" = --check ] && out=$(mktemp -d)
.venv/bin/python -m grpc_tools.protoc -Iproto "--python_out=$out" "--pyi_out=$out" "--grpc_python_out=$out" proto/baton/rpc/v1/*.proto
[ "$out" = . ] && exit 0
for file in "$out"/baton/rpc/v1/*; do
    cmp -s "$file" "baton/rpc/v1/$(basename "$file")" || { echo "$(basename "$file") is not what proto/ gives: run make proto" >&2; exit 1; }
done
rm -rf "$out"
