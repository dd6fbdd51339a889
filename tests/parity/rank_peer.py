"""One rank of test_ranks.py: rank, size, address of the group's store (rank 0: file descriptor of its listener), then models, each
as folder:load_format:dtype. Rank 0 answers with a line of JSON for each: the logits of a prompt, in two chunks, and what is seen of one
that is scored."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.config import EngineConfig
from baton.models.decoder import Look, unseen
from baton.parallel.group import Group, TorchGroup
from baton.runtime.crew import Solo
from baton.runtime.loaded import LoadedModel, load

LENGTH = 50
CUT = 35
SCORED = 300  # tokens of a prompt, which begins like the other


class Joined(Solo):
    def __init__(self, group: Group) -> None:
        self._group = group

    def join(self, device: torch.device) -> Group:
        return self._group


def logits(loaded: LoadedModel) -> list[list[float]]:
    """Of all of the prompt's positions from CUT on; the first chunk wants none."""
    none = np.array([], np.int64)
    first = chunk(loaded, 0, CUT, logits_rows=none, logits_owners=none)
    return [*first.tolist(), *chunk(loaded, CUT, LENGTH).tolist()]


def seen(loaded: LoadedModel) -> list[list[float]]:
    """Of a long prompt's scored positions, some of them, and of its last."""
    found: list[torch.Tensor] = []
    last = chunk(loaded, 0, SCORED, found.append, logits_rows=np.array([SCORED - 1]), scored_rows=np.arange(SCORED - 1))
    return [*torch.cat(found)[::20].tolist(), *last.tolist()]


def chunk(loaded: LoadedModel, start: int, end: int, look: Look = unseen, **rows: np.ndarray) -> torch.Tensor:
    positions = np.arange(start, end)
    arrays: dict[str, Any] = {
        "token_ids": (7 * positions + 3) % 250,
        "positions": positions,
        "slots": positions + 16,  # from block 1 on
        "query_start": np.array([0, end - start], np.int32),
        "context_lens": np.array([end], np.int32),
        "block_tables": np.arange(1, 2 - (-end // 16), dtype=np.int32)[None],
    }
    found, _ = loaded.runner.compute(arrays | rows, False, look)
    return found


def load_named(name: str, size: int, team: Solo | None = None) -> LoadedModel:
    """`name`: folder:load_format:dtype."""
    path, load_format, dtype = name.rsplit(":", 2)
    values = {"device": "cpu", "num_blocks": 32, "num_threads": 1, "tensor_parallel_size": size}
    return load(Path(path), EngineConfig.model_validate({**values, "load_format": load_format, "dtype": dtype}), team)


def answer(loaded: LoadedModel) -> list[list[float]]:
    return [*logits(loaded), *seen(loaded)]


def main() -> None:
    rank, size, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    server = socket.socket(fileno=int(sys.argv[4])) if rank == 0 else None
    group = Joined(TorchGroup(rank, size, address, torch.device("cpu"), server))
    for name in sys.argv[5:]:
        found = answer(load_named(name, size, group))
        if rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
