"""Run by the interpreter of .tools/venv: Helm 4's library. JSON on stdin {chart, values, release, namespace}; JSON on stdout."""

import json
import sys

from helm_python import Chart, HelmError, lint

ask = json.load(sys.stdin)
report = lint(ask["chart"], ask["values"], strict=True, kube_version="v1.34.0")
try:
    with Chart.load(ask["chart"]) as chart:
        chart.validate_schema(ask["values"])
        rendered = chart.render(ask["values"], name=ask["release"], namespace=ask["namespace"])
except HelmError as error:
    print(json.dumps({"error": str(error), "lint": report}))
else:
    print(json.dumps({"files": rendered, "lint": report}))
