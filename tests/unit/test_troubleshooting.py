"""docs/troubleshooting.md quotes errors as users see them: each is still said somewhere. `…` and `NAME`s stand for what differs."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of Helm, Kubernetes, etcd and the shell.
OTHERS = (
    "Additional property",
    "additional properties",
    "got null, want",
    "Expected: …, given: null",
    "chart requires kubeVersion",
    "updates to statefulset spec",
    "no matches for kind",
    "Insufficient ",
    "unbound immediate",
    "Multi-Attach error",
    "MountVolume",
    'secret "…" not found',
    "Startup probe failed",
    "helm test",
    "database space exceeded",
)


def quoted() -> Iterator[str]:
    """What stands in the first column of the tables, where it is a message: of several words."""
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines():
        for text in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if line.startswith("| ") else ():
            if " " in text and not any(other in text for other in OTHERS):
                yield text


def said() -> str:
    """The code and the chart, with `…` for what is filled in, and strings that are put together as one."""
    code = "\n".join(path.read_text() for folder in ("baton", "services") for path in (ROOT / folder).rglob("*.py"))
    chart = "\n".join(path.read_text() for path in (ROOT / "deploy/helm/baton/templates").glob("*.*"))
    return re.sub(r"%[.\d]*[a-z]", "…", re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", code)) + chart)


def test_every_error_that_is_explained_is_still_said() -> None:
    texts, messages = said(), list(quoted())
    assert len(messages) > 25
    parts = {message: [part for part in re.split(r"'?…'?|\b[A-Z]\b", message) if len(part.strip()) > 3] for message in messages}
    assert not [message for message in messages if not parts[message] or any(part not in texts for part in parts[message])]
