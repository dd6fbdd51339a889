"""Two ranks on two GPUs, over NCCL, with captured steps: the tokens are those of one; KV goes between workers of different degrees; a
rank's death ends its worker, and the other way round."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.models.registry import read_config
from tests.cluster import running_cluster
from tests.e2e.test_direct_push import complete
from tests.e2e.test_tensor_parallel import (
    a_rank_that_dies_ends_its_worker,
    a_worker_that_dies_ends_its_ranks,
    expected,
    metric,
    prompt,
)

pytestmark = [pytest.mark.gpu, pytest.mark.gpus, pytest.mark.timeout(300)]
BLOCK_SIZE = 64


def generate(model: Path, size: int, budget: int) -> list[list[int]]:
    command = [sys.executable, "-m", "tests.kernels.parallel_peer", str(model), str(size), "cuda", str(budget)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=250, check=True).stdout)


@pytest.mark.parametrize("budget", [100, 1024], ids=["called", "captured between attentions"])
def test_two_ranks_give_the_tokens_of_one(tiny_model: Path, budget: int) -> None:
    assert torch.cuda.device_count() >= 2
    alone = generate(tiny_model, 1, budget)
    assert generate(tiny_model, 2, budget) == alone


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2)])
def test_kv_goes_between_workers_of_any_degrees(tiny_model: Path, prefill: int, decode: int) -> None:
    """Who pushes what, by whatever protocol this machine has; both workers use the first GPU."""
    prompts = [prompt(length, length) for length in (65, 80, 300, 700)]
    answers, config = expected(tiny_model, prompts), read_config(tiny_model)
    block_bytes = config.num_layers * 2 * config.num_kv_heads * BLOCK_SIZE * config.head_dim * 4
    settings = ["all.cluster.lease_s=3", "router.local_prefill=false"]
    for role, degree in (("prefill", prefill), ("decode", decode)):
        engine = {"tensor_parallel_size": degree, "num_blocks": 100, "max_num_seqs": 8, "max_num_batched_tokens": 256}
        settings += [f"{role}.engine.{key}={value}" for key, value in engine.items()]
    options = [part for setting in settings for part in ("--set", setting)]
    with running_cluster(model=tiny_model, prefill=1, decode=1, kvstore=0, options=options) as cluster:
        for token_ids, answer in zip(prompts, answers, strict=True):
            tokens, route = complete(cluster, token_ids)
            assert "prefill=prefill-0" in route
            assert tokens == answer
        print([line for line in (cluster.logs / "prefill-0.log").read_text().splitlines() if "push to" in line])
        blocks = sum(-(-len(each) // BLOCK_SIZE) for each in prompts)
        assert metric(cluster, "prefill-0", "kv_push_bytes_total") == blocks * block_bytes
        cluster.assert_clean()
        if prefill == 2:
            a_rank_that_dies_ends_its_worker(cluster, tiny_model)
        else:
            a_worker_that_dies_ends_its_ranks(cluster, tiny_model)


def test_a_checkpoint_that_ranks_cannot_read_ends_them_all(tiny_model: Path, tmp_path: Path) -> None:
    """While NCCL's threads run."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    settings = [f"model={folder}", "role=unified", "engine.tensor_parallel_size=2", "engine.device=cuda"]
    ran = subprocess.run([sys.executable, "-m", "services.decode", *settings], stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "download it again" in ran.stderr
