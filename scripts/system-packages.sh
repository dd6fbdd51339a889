#!/usr/bin/env bash
# What pip can't install: etcd, the libraries that Mooncake links to, a compiler for the CPU kernels, openssl for the tests' certificates; with the argument `browser` Chromium, too. Debian's packages, where they are missing and can be had.
set -euo pipefail
missing=()
command -v etcd >/dev/null || missing+=(etcd-server)
command -v g++ >/dev/null || missing+=(g++)
command -v openssl >/dev/null || missing+=(openssl)
[ "${1-}" != browser ] || command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
for pair in libibverbs.so.1:libibverbs1 libnuma.so.1:libnuma1 libcurl.so.4:libcurl4; do
    ldconfig -p 2>/dev/null | grep -q "${pair%%:*}" || /sbin/ldconfig -p 2>/dev/null | grep -q "${pair%%:*}" || missing+=("${pair##*:}")
done
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
[ ${#missing[@]} -eq 0 ] && exit 0
if command -v apt-get >/dev/null; then
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
    if "${as_root[@]}" apt-get update -qq && DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq "${missing[@]}" >/dev/null; then
        exit 0
    fi
fi
echo "These packages are missing and could not be installed: ${missing[*]}" >&2
echo "Install them (Debian: apt-get install ${missing[*]}) and run make again." >&2
exit 1
