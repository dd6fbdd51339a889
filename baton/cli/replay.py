"""`baton replay`: a trace against a running cluster, told in the columns of `baton simulate`. Tokens are drawn by the names of their
blocks, so that prompts share what they share in the trace.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from baton.cli.bench import FIRST_ID, Promise, Sample, columns, print_rows, send, vocab_size
from baton.cli.stream import connect
from baton.cli.trace import Line


def run_replay(url: str, lines: Sequence[Line], block: int, seed: int, promise: Promise, api_key: str = "") -> dict[str, Any]:
    """Sends each request at its time, `block` tokens for each of its ids; prints a table. The result is ready for JSON. Raises BatonError
    where no server answers, or refuses to."""
    samples = asyncio.run(_drive(url, lines, block, seed, api_key))
    result = {"seconds": lines[-1].at, **columns(samples, lines[-1].at, promise)}
    result["errors"] = sorted({sample.error for sample in samples if sample.error is not None})[:5]
    console = Console()
    console.print(f"{result['requests']} requests in {result['seconds']:.1f} s, {result['failures']} failed", highlight=False)
    print_rows([result], promise)
    for error in result["errors"]:
        console.print(f"failed: {error}", style="red", markup=False)
    return result


async def _drive(url: str, lines: Sequence[Line], block: int, seed: int, api_key: str) -> list[Sample]:
    async with connect(url, api_key, timeout_s=600) as client:
        vocab = await vocab_size(client)
        prompts = [prompt_of(line, block, vocab, f"{seed}/{number}") for number, line in enumerate(lines)]
        samples = [Sample() for _ in lines]
        begun = time.monotonic()

        async def one(line: Line, prompt: list[int], sample: Sample) -> None:
            await asyncio.sleep(max(begun + line.at - time.monotonic(), 0.0))
            await send(client, (prompt, line.num_output_tokens), sample)

        await asyncio.gather(*(one(*each) for each in zip(lines, prompts, samples, strict=True)))
        return samples


def prompt_of(line: Line, block: int, vocab: int, own: str) -> list[int]:
    """Token ids; those behind the last id's block are the request's own, by its name."""
    tokens: list[int] = []
    for block_id in line.ids:
        tokens += random.Random(f"block {block_id}").choices(range(FIRST_ID, vocab), k=block)
    return tokens + random.Random(f"own {own}").choices(range(FIRST_ID, vocab), k=line.num_prompt_tokens - len(tokens))
