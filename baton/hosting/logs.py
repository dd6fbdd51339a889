"""What a process writes to standard error: text for people, or JSON for collectors, an object a line.

A record about one request carries its id (`extra={"request_id": …}`), which begins with the `x-request-id` that the client was told. Not in
here: what libraries in other languages write by themselves (Mooncake, NCCL), and the line of a process whose configuration cannot be read.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]


class JsonLines(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start_logging(service: str, form: LogFormat = "text") -> None:
    """Instead of what was begun before."""
    text = logging.Formatter(f"%(asctime)s %(levelname)s {service}[{os.getpid()}] %(name)s: %(message)s")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(service) if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
