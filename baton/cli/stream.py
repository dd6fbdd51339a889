"""A router's client: its key, its server-sent events, its errors."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from baton.errors import BatonError, ConfigError, Unavailable


def connect(url: str, api_key: str = "", *, timeout_s: float) -> httpx.AsyncClient:
    """`timeout_s` is for each piece of an answer. Any number of requests may be under way. Raises ConfigError for what can be no key."""
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("--api-key (or OPENAI_API_KEY) must be printable ASCII: give the key as its tenant's file has it")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5), limits=limits)


async def stream_events(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of one streamed answer; response headers are added to `headers`. Raises BatonError with what the server said."""
    try:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            headers.update(response.headers)
            if response.status_code != 200:
                await response.aread()
                raise BatonError(message_of(response))
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise BatonError(chunk["error"]["message"])
                yield chunk
    except httpx.HTTPError as error:
        raise Unavailable(f"the router at {client.base_url} does not answer ({type(error).__name__}); is `baton up` running?") from error


def message_of(response: httpx.Response) -> str:
    """Of an answer that is an error."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    return f"{message} (--api-key KEY, or OPENAI_API_KEY)" if response.status_code == 401 else message
