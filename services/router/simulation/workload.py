"""Workloads: requests with their times, lengths, and the names of their blocks; equal names are equal prefixes.

`asks_of` takes a trace (`baton.cli.trace`). `agents` makes sessions of short turns behind long tool prompts, which now and then send
siblings that share a new prefix, milliseconds apart.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.cli.trace import Line
from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ask:
    at: float  # seconds
    num_prompt_tokens: int
    num_output_tokens: int
    hashes: tuple[bytes, ...]  # of all blocks that prompt and output fill


def asks_of(lines: Sequence[Line], block: int, block_size: int) -> list[Ask]:
    """With names for blocks of `block_size` tokens, of which a line's blocks have a whole number. Raises ConfigError."""
    if block % block_size:
        raise ConfigError(
            f"--block-size {block_size}: KV blocks do not fit into the trace's, of {block} tokens (512 × --length-scale): "
            f"choose a divisor of {block}"
        )
    each = block // block_size
    names: dict[int, tuple[bytes, ...]] = {}
    asks: list[Ask] = []
    for number, line in enumerate(lines):
        hashes: list[bytes] = []
        for block_id in line.ids:
            if block_id not in names:
                names[block_id] = tuple((block_id * each + part).to_bytes(16, "little") for part in range(each))
            hashes += names[block_id]
        total = (line.num_prompt_tokens + line.num_output_tokens) // block_size
        hashes += (b"own" + number.to_bytes(8, "little") + part.to_bytes(5, "little") for part in range(len(hashes), total))
        asks.append(Ask(line.at, line.num_prompt_tokens, line.num_output_tokens, tuple(hashes)))
    return asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """Sessions begin as a Poisson process for `seconds`. Each has one of `num_tools` tool prompts, its own task, and turns; a turn's prompt
    is everything before it. One turn in `1 / burst` first sends siblings: the same new plan behind the conversation so far, each with
    a task of its own, and turns of its own."""

    rate: float = 1.0  # sessions a second
    seconds: float = 600.0
    num_tools: int = 32
    tool_tokens: tuple[int, int] = (2048, 12288)
    turns: tuple[int, int] = (4, 16)
    input_tokens: tuple[int, int] = (50, 800)
    output_tokens: tuple[int, int] = (20, 300)
    think_s: float = 4.0  # mean, between a turn and the next, beside what the answer is expected to take
    token_s: float = 0.04  # that an answer's token is expected to take
    burst: float = 0.06
    siblings: tuple[int, int] = (4, 12)
    plan_tokens: tuple[int, int] = (1024, 4096)
    sibling_turns: tuple[int, int] = (1, 4)
    apart_s: float = 0.003  # mean, between two siblings


class _Text:
    """A conversation as it grows: the ids of its blocks. Two that began as one share the blocks up to where they parted."""

    def __init__(self, ids: list[int], tokens: int, fresh: Iterator[int], block: int) -> None:
        self.ids, self.tokens, self._fresh, self._block = ids, tokens, fresh, block

    def grow(self, tokens: int) -> None:
        self.tokens += tokens
        while len(self.ids) < self.tokens // self._block:
            self.ids.append(next(self._fresh))

    def copy(self) -> "_Text":
        return _Text(list(self.ids), self.tokens, self._fresh, self._block)


def agents(load: Agents, block_size: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    fresh = iter(range(1 << 60))
    tools = [_Text([], 0, fresh, block_size) for _ in range(load.num_tools)]
    for tool in tools:
        tool.grow(rng.randint(*load.tool_tokens))
    asks: list[Ask] = []

    def ask(at: float, text: _Text) -> float:
        """When the answer is expected to be there."""
        prompt, output = text.tokens, rng.randint(*load.output_tokens)
        text.grow(output)
        asks.append(Ask(at, prompt, output, tuple(each.to_bytes(16, "little") for each in text.ids)))
        return at + output * load.token_s + rng.expovariate(1 / load.think_s)

    def talk(at: float, text: _Text, turns: int, burst: float) -> None:
        for _ in range(turns):
            text.grow(rng.randint(*load.input_tokens))
            if rng.random() < burst:
                plan = text.copy()
                plan.grow(rng.randint(*load.plan_tokens))
                when = at
                for _ in range(rng.randint(*load.siblings)):
                    talk(when, plan.copy(), rng.randint(*load.sibling_turns), 0.0)
                    when += rng.expovariate(1 / load.apart_s)
                at = when + rng.expovariate(1 / load.think_s)
            at = ask(at, text)

    at = 0.0
    while (at := at + rng.expovariate(load.rate)) < load.seconds:
        popular = min(int(rng.paretovariate(1.0)), load.num_tools) - 1
        talk(at, tools[popular].copy(), rng.randint(*load.turns), load.burst)
    return sorted((each for each in asks if each.at < load.seconds), key=lambda each: each.at)
