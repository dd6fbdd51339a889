"""Reading a router's server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from baton.errors import BatonError, Unavailable


async def stream_events(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of one streamed answer; response headers are added to `headers`. Raises BatonError with what the server said."""
    try:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            headers.update(response.headers)
            if response.status_code != 200:
                raise BatonError(_message(await response.aread(), response.status_code))
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise BatonError(chunk["error"]["message"])
                yield chunk
    except httpx.HTTPError as error:
        raise Unavailable(f"the router at {client.base_url} does not answer ({type(error).__name__}); is `baton up` running?") from error


def _message(data: bytes, status: int) -> str:
    try:
        return json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
