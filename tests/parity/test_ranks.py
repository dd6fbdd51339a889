"""Ranks that share a model, in processes of their own, give the logits of one that has it whole."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import torch

from baton.models.create import create_model
from tests.parity import rank_peer
from tests.parity.models import FAMILIES, Family

# A vocabulary that two ranks share unequally, and biases of sums, which are added once.
ODD = Family("odd", "Llama", {"num_key_value_heads": 4, "vocab_size": 319, "attention_bias": True, "mlp_bias": True})


def run(size: int, names: list[str]) -> list[torch.Tensor]:
    """For each model (see `rank_peer.load_named`), rank 0's logits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "tests.parity.rank_peer"]
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), address, str(server.fileno()), *names], stdout=subprocess.PIPE,
                             pass_fds=[server.fileno()] if rank == 0 else [])
            for rank in range(size)
        ]  # fmt: skip
    try:
        answers = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size
    return [torch.tensor(json.loads(line)) for line in answers[0].splitlines()]


def alone(name: str) -> torch.Tensor:
    return torch.tensor(rank_peer.answer(rank_peer.load_named(name, 1)))


def test_logits_are_those_of_one_rank(tmp_path: Path) -> None:
    names: list[str] = []
    for family in [*FAMILIES, ODD]:
        family.make(tmp_path / family.name, shard="40KB")
        names.append(f"{tmp_path / family.name}:safetensors:float32")
    create_model(tmp_path / "dummy", "qwen2", num_kv_heads=4)
    names.append(f"{tmp_path / 'dummy'}:dummy:float32")
    rounded = [f"{tmp_path / family.name}:safetensors:bfloat16" for family in (FAMILIES[0], ODD)]
    found = dict(zip([*names, *rounded], run(2, [*names, *rounded]), strict=True))
    for name in names:
        whole = alone(name)
        assert found[name].shape == whole.shape
        torch.testing.assert_close(found[name], whole, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for name in rounded:  # sums of rounded parts are others, and no worse
        exact = alone(name.replace("bfloat16", "float32"))
        assert (found[name] - exact).abs().mean() <= 1.5 * (alone(name) - exact).abs().mean(), name
