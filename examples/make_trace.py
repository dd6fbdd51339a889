"""Writes examples/trace.jsonl: five minutes of the agents that `baton simulate` makes, in the format of Mooncake's traces. At an eighth of
their lengths (`--length-scale 0.125`) all of them fit into the demo model's context.

    python examples/make_trace.py > examples/trace.jsonl
"""

import json

from baton.cli.trace import TRACE_BLOCK
from services.router.simulation.workload import Agents, agents

AGENTS = Agents(rate=0.05, seconds=300.0, num_tools=6, tool_tokens=(2048, 8192), turns=(4, 10))
SEED = 3


def main() -> None:
    asks = agents(AGENTS, TRACE_BLOCK, SEED)
    named = [[int.from_bytes(name, "little") for name in ask.hashes[: ask.num_prompt_tokens // TRACE_BLOCK]] for ask in asks]
    fresh = 1 + max(map(max, filter(None, named)))
    for number, (ask, ids) in enumerate(zip(asks, named, strict=True)):
        if ask.num_prompt_tokens % TRACE_BLOCK:  # a block that is not full is its own
            ids.append(fresh + number)
        lengths = {"input_length": ask.num_prompt_tokens, "output_length": ask.num_output_tokens}
        print(json.dumps({"timestamp": round(1e3 * ask.at), **lengths, "hash_ids": ids}))


if __name__ == "__main__":
    main()
