"""`baton chat`: a conversation in the terminal, with what each answer cost."""

import asyncio
import time
from typing import Any

from rich.console import Console

from baton.cli.stream import connect, stream_events


class Conversation:
    def __init__(self, url: str, system: str | None = None, options: dict[str, Any] | None = None, api_key: str = "") -> None:
        self._url, self._api_key = url, api_key
        self._options = {key: value for key, value in (options or {}).items() if value is not None}
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._console = Console(highlight=False)

    def ask(self, question: str) -> dict[str, Any]:
        """Prints the answer as it comes; returns text, ttft_s, prompt_tokens, cached_tokens, completion_tokens and route."""
        self._messages.append({"role": "user", "content": question})
        answer = asyncio.run(self._stream())
        self._messages.append({"role": "assistant", "content": answer["text"]})
        self._console.print(
            f"\n[dim]first token after {answer['ttft_s'] * 1e3:.0f} ms, {answer['completion_tokens']} tokens; "
            f"{answer['cached_tokens']} of {answer['prompt_tokens']} prompt tokens from cache[/dim]\n[dim]{answer['route']}[/dim]",
            soft_wrap=True,
        )
        return answer

    async def _stream(self) -> dict[str, Any]:
        headers: dict[str, str] = {}
        text, usage, ttft, started = "", {}, 0.0, time.monotonic()
        body = {"messages": self._messages, "stream_options": {"include_usage": True}, **self._options}
        async with connect(self._url, self._api_key, timeout_s=300) as client:
            async for chunk in stream_events(client, "/v1/chat/completions", body, headers):
                for choice in chunk["choices"]:
                    ttft = ttft or time.monotonic() - started
                    text += choice["delta"].get("content") or ""
                    self._console.print(choice["delta"].get("content") or "", end="", markup=False, soft_wrap=True)
                usage = chunk.get("usage") or usage
        return {
            "text": text,
            "ttft_s": ttft,
            "prompt_tokens": usage.get("prompt_tokens", 0),
            "completion_tokens": usage.get("completion_tokens", 0),
            "cached_tokens": usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
            "route": headers.get("x-baton-route", ""),
        }
