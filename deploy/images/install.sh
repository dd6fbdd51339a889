#!/usr/bin/env bash
# What an image holds of Python: install.sh VARIANT WHEEL FOLDER makes a virtual environment. VARIANT: router, worker-cpu, worker-cuda, kvstore.
# Versions are those of constraints.txt beside the wheel's checkout (CONSTRAINTS), of everything; TORCH_INDEX is where a torch without CUDA comes from.
set -euo pipefail
variant=$1 wheel=$2 folder=$3
constraints=${CONSTRAINTS:-constraints.txt}
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check install --no-cache-dir --quiet)
case $variant in
router) "${pip[@]}" --constraint "$constraints" "$wheel[otel]" ;;
kvstore) "${pip[@]}" --constraint "$constraints" "$wheel[mooncake]" ;;
worker-cpu)
    torch=$(grep '^torch==' "$constraints")
    "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
    "${pip[@]}" --constraint "$constraints" "$wheel[engine,mooncake,otel]"
    ;;
worker-cuda) "${pip[@]}" --constraint "$constraints" "$wheel[gpu,otel,ray]" ;;
*)
    echo "there is no variant $variant; there are router, worker-cpu, worker-cuda and kvstore" >&2
    exit 2
    ;;
esac
