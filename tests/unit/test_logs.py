"""Logs: each line of JSON is one record, whatever is in it, to the last one of a process that cannot start."""

import json
import logging
import subprocess
import sys

import grpc.aio
import pytest

from baton.errors import InternalError, RequestCancelled
from baton.hosting.logs import JsonLines
from baton.hosting.worker import as_ours


def test_a_record_is_a_line_with_its_request_and_its_exception() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("a.b").makeRecord(
            "a.b", logging.ERROR, "f", 1, "%s failed:\n%s", ("r-1", "ä"), sys.exc_info(), extra={"request_id": "r-1"}
        )
    text = JsonLines("decode").format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["service"], line["logger"], line["request_id"]) == ("ERROR", "decode", "a.b", "r-1")
    assert line["message"] == "r-1 failed:\nä"
    assert "ValueError: two\nlines" in line["exception"]
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_process_that_cannot_start_says_so_in_the_form_that_was_asked_for(form: str) -> None:
    command = [sys.executable, "-m", "services.router", f"server.log_format={form}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (text,) = done.stderr.splitlines()
    said = json.loads(text)["message"] if form == "json" else text.removeprefix("router: ")
    assert said.startswith("model is not set")


def test_a_caller_that_is_gone_while_it_is_told_something_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """grpc.aio's write fails by its own InternalError then."""
    assert isinstance(as_ours(grpc.aio.InternalError("Failed execute_batch")), RequestCancelled)
    assert not caplog.records
    assert isinstance(as_ours(KeyError("a bug")), InternalError)
    assert [record.message for record in caplog.records] == ["a call failed"]
