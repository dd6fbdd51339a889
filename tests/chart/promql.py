"""Run by the interpreter of .tools/venv: Prometheus expressions. JSON list on stdin; what is wrong with them on stdout."""

import json
import sys

import promql_parser

problems = []
for expression in json.load(sys.stdin):
    try:
        promql_parser.parse(expression.replace("$__rate_interval", "1m"))
    except ValueError as error:
        problems.append(f"{expression}: {error}")
print(json.dumps(problems))
