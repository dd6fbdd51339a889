"""The tokens of a disaggregated cluster are those of transformers' `generate` on the same folder, in one process."""

import random
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cluster import RunningCluster

LENGTHS = (3, 64, 65, 100, 512, 513, 1200)  # below and above what a decode worker computes itself; one, two and three chunks


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_through_the_cluster(cluster: RunningCluster, demo_model: Path, length: int) -> None:
    rng = random.Random(length)
    prompt = [rng.randrange(4, 2000) for _ in range(length)]
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    with torch.inference_mode():
        inputs = torch.tensor([prompt])
        reference = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=48, eos_token_id=None)
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    cluster.wait_ready()  # beside a decode worker that has something to do on the same cores, it may compute a prompt itself
    for way in ("cold", "cached"):
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["token_ids"] == reference[0, length:].tolist(), way
        remote = "prefill=prefill-0" in answer.headers["x-baton-route"]
        assert remote == (way == "cold" and length > 64)
