"""Run by the interpreter of .tools/venv: objects against Kubernetes' own schemas. JSON on stdin {versions, objects}; problems on stdout."""

import json
import sys

import kubernetes_validate

ask = json.load(sys.stdin)
problems = []
for version in ask["versions"]:
    for thing in ask["objects"]:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.utils.SchemaNotFoundError) as error:
            problems.append(f"{version}: {thing['kind']} {thing['metadata']['name']}: {type(error).__name__} {error}"[:400])
print(json.dumps(problems))
