"""What the device loses of a request after it was looked up is fetched from tiers again, not computed."""

import asyncio
from pathlib import Path

import pytest

from baton.hashing import block_hashes
from baton.types import Pace, SamplingParams
from tests.parity.models import FAMILIES, engine_settings
from tests.parity.test_equalities import collect, engine, expected, ids, prompt_of, request

LENGTHS = range(990, 1002)  # twelve prompts
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    FAMILIES[0].make(path)
    return path


async def test_a_burst_that_does_not_fit_together(folder: Path) -> None:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    wanted = await expected(folder, sampling, LENGTHS)
    settings = engine_settings(num_blocks=210, max_num_batched_tokens=512)  # room for three of them
    computed: list[int] = []
    async with engine(folder, host=2**30, settings=settings) as built:
        built.loader._pace = lambda: Pace(token_s=1.0)  # fetching is faster
        (tier,) = built._tiers
        for length in LENGTHS:
            await collect(built, request(length, sampling))
            keys = [built._tiers.key(key) for key in block_hashes(prompt_of(length), 16)]
            while not all(tier._store.contains(keys)):
                await asyncio.sleep(0.01)
        built.on_step = lambda plan, seconds: computed.append(plan.num_tokens)
        outputs = await asyncio.gather(*(collect(built, request(length, sampling, f"again{length}")) for length in LENGTHS))
    assert [ids(each) for each in outputs] == wanted
    assert sum(computed) < 3000  # 480 new tokens, ends of prompts, what a preemption may cost; 12,000 known ones
