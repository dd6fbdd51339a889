"""Traces in Mooncake's format (FAST'25): a JSON object a line, timestamp (ms), input_length, output_length, hash_ids (one for each 512
tokens of the prompt); and how they are played, on simulated workers or on real ones.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError

TRACE_BLOCK = 512  # tokens
_BUCKET_S = 3.0  # the trace's times are known so well


@dataclass(frozen=True, slots=True)
class Line:
    """A request of a trace. Equal ids are equal blocks behind equal prefixes."""

    at: float
    num_prompt_tokens: int
    num_output_tokens: int
    ids: tuple[int, ...]  # of the prompt's full blocks


def read_trace(path: Path) -> list[Line]:
    """Raises ConfigError, naming the line."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    lines: list[Line] = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            item = json.loads(row)
            prompt, output = int(item["input_length"]), int(item["output_length"])
            ids = tuple(int(each) for each in item["hash_ids"])
            at = item["timestamp"] / 1e3
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: not a request of a trace ({type(error).__name__}: {error}); a line is a JSON object with "
                "timestamp, input_length, output_length and hash_ids"
            ) from error
        if prompt < 1 or output < 0 or len(ids) < prompt // TRACE_BLOCK:
            raise ConfigError(f"{path}, line {number}: input_length {prompt} and {len(ids)} hash_ids of {TRACE_BLOCK} tokens do not fit")
        lines.append(Line(at, prompt, max(output, 1), ids[: prompt // TRACE_BLOCK]))
    if not lines:
        raise ConfigError(f"the trace {path} is empty")
    return sorted(lines, key=lambda line: line.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How a trace is played: `length` times its tokens; `seconds` of it, from a point that the seed draws; `copies` of it at once, each
    from a point of its own, and about other things; at `speed` times its pace."""

    length: float = 1.0
    seconds: float = 0.0  # 0: all
    copies: int = 1
    speed: float = 1.0
    longest: int = 0  # longer requests, in tokens of prompt and output, are left out; 0: none is

    def block(self) -> int:
        """Tokens of a block of the trace, scaled. Raises ConfigError."""
        if not 0 < self.length <= 1 or TRACE_BLOCK * self.length != int(TRACE_BLOCK * self.length):
            raise ConfigError(f"--length-scale {self.length:g} makes no whole blocks of {TRACE_BLOCK} tokens: take 1, 0.5, 0.25, 0.125 …")
        return int(TRACE_BLOCK * self.length)


def play(lines: Sequence[Line], scaling: Scaling, seed: int) -> list[Line]:
    """What a cluster is asked: times from 0 on, jittered within the trace's buckets; ids of copies differ."""
    rng = random.Random(seed)
    block, span = scaling.block(), lines[-1].at - lines[0].at + _BUCKET_S
    seconds = min(scaling.seconds or span, span)
    most = 1 + max((max(line.ids, default=0) for line in lines), default=0)
    played: list[Line] = []
    for copy in range(scaling.copies):
        begin = lines[0].at + (rng.uniform(0, span) if seconds < span or scaling.copies > 1 else 0.0)
        for line in lines:
            at = (line.at + rng.uniform(0, _BUCKET_S) - begin) % span
            if at < seconds:
                rest = max(round(line.num_prompt_tokens % TRACE_BLOCK * scaling.length), 0 if line.ids else 1)
                output = max(round(line.num_output_tokens * scaling.length), 1)
                ids = tuple(copy * most + each for each in line.ids)
                played.append(Line(at / scaling.speed, len(ids) * block + rest, output, ids))
    if scaling.longest:
        played = [line for line in played if line.num_prompt_tokens + line.num_output_tokens <= scaling.longest]
    if not played:
        raise ConfigError("no request of the trace is left: take more of its seconds, or allow longer ones")
    return sorted(played, key=lambda line: line.at)
