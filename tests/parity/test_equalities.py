"""The product's promise: aggregated = chunked = prefix-cached = preempted = disaggregated = migrated, token for token, and greedy output
equals transformers' `generate`. Engines are real, models tiny and random, in fp32."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.config import EngineConfig, FilesConfig, HostConfig, PoolConfig
from baton.kv.store import Buffer, MemoryStore
from baton.kv.tiers import connect_tiers
from baton.kv.transfer import KVTransfer
from baton.runtime.build import build_engine
from baton.runtime.engine import Engine
from baton.runtime.loaded import load
from baton.scheduling import fetching
from baton.types import FinishReason, GenerateOutput, GenerateRequest, OutputToken, SamplingParams
from tests.parity.models import FAMILIES, engine_settings

NEW_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
SAMPLED = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.9, seed=1234, top_p=0.95, top_k=50)
PENALISED = SamplingParams(
    max_tokens=NEW_TOKENS, temperature=0.7, seed=5, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, min_p=0.02
)
KINDS = [pytest.param(GREEDY, id="greedy"), pytest.param(SAMPLED, id="sampled"), pytest.param(PENALISED, id="penalised")]
LENGTHS = (1, 15, 16, 17, 100, 161)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    FAMILIES[0].make(path)
    return path


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist())


def request(length: int, sampling: SamplingParams, name: str = "", **changes: Any) -> GenerateRequest:
    return GenerateRequest(request_id=name or f"r{length}", prompt_token_ids=prompt_of(length), sampling=sampling, **changes)


@asynccontextmanager
async def engine(
    folder: Path,
    store: MemoryStore | None = None,
    settings: EngineConfig | None = None,
    *,
    host: int = 0,
    files: Path | None = None,
    shared: bool = False,
) -> AsyncIterator[Engine]:
    """`host`: bytes of a tier there; `files`: directory of another."""
    settings = settings or engine_settings()
    loaded = load(folder, settings)
    wanted = FilesConfig(path=str(files), bytes=2**30, shared=shared) if files else FilesConfig()
    tiers = connect_tiers(HostConfig(bytes=host), PoolConfig(), wanted, loaded.pool.tensor, loaded.pool.layout.block_bytes)
    if store is not None:
        tiers.insert(bool(host), KVTransfer(store))
    built = build_engine(loaded, tiers, budget_s=5, prefix_caching=settings.prefix_caching)
    built.start()
    try:
        yield built
        assert await built.check_integrity() == []
        async with asyncio.timeout(5):  # saves that nobody waited for
            while built.load.blocks_free != built.load.blocks_total:
                await asyncio.sleep(0.01)
    finally:
        await built.stop()


async def collect(built: Engine, wanted: GenerateRequest, **options: Any) -> list[GenerateOutput]:
    return [output async for output in built.submit(wanted, **options)]


def ids(outputs: Sequence[GenerateOutput]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


async def generate(built: Engine, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    return [ids(outputs) for outputs in await asyncio.gather(*(collect(built, item) for item in requests))]


async def expected(folder: Path, sampling: SamplingParams, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """One at a time, whole prompts, no prefix cache."""
    async with engine(folder, settings=engine_settings(prefix_caching=False, max_num_batched_tokens=2048)) as built:
        return [(await generate(built, [request(length, sampling)]))[0] for length in lengths]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
async def test_greedy_output_is_that_of_transformers(family: Any, tmp_path: Path) -> None:
    model = family.make(tmp_path)
    lengths = (1, 16, 17, 130, 700)
    async with engine(tmp_path, settings=engine_settings(max_num_batched_tokens=100)) as built:
        ours = await generate(built, [request(length, GREEDY) for length in lengths])
    for length, tokens in zip(lengths, ours, strict=True):
        with torch.inference_mode():
            prompt = torch.tensor([prompt_of(length)])
            theirs = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        assert tokens == theirs[0, length:].tolist(), f"a prompt of {length} tokens"


@pytest.mark.parametrize("sampling", KINDS)
@pytest.mark.parametrize("budget", [1, 7, 16, 64])
async def test_chunked_and_batched(folder: Path, sampling: SamplingParams, budget: int) -> None:
    async with engine(folder, settings=engine_settings(max_num_batched_tokens=budget)) as built:
        assert await generate(built, [request(length, sampling) for length in LENGTHS]) == await expected(folder, sampling)


@pytest.mark.parametrize("sampling", KINDS)
async def test_prefix_cached(folder: Path, sampling: SamplingParams) -> None:
    async with engine(folder) as built:
        first = await generate(built, [request(length, sampling) for length in LENGTHS])
        again = [await collect(built, request(length, sampling)) for length in LENGTHS]
    assert first == await expected(folder, sampling)
    assert [ids(outputs) for outputs in again] == first
    reports = [next(o.cache for o in outputs if o.cache is not None) for outputs in again]
    assert [report.num_local_tokens for report in reports] == [(length - 1) // 16 * 16 for length in LENGTHS]


@pytest.mark.parametrize("sampling", KINDS)
async def test_preempted(folder: Path, sampling: SamplingParams) -> None:
    async with engine(folder, settings=engine_settings(num_blocks=16, max_num_batched_tokens=64)) as built:
        results = await generate(built, [request(length, sampling) for length in LENGTHS])
        assert built.scheduler.num_preemptions > 0
    assert results == await expected(folder, sampling)


async def test_what_tokens_are_drawn_by_is_made_once_a_request(folder: Path) -> None:
    """And not taken for that of another request of the same name."""
    penalised = dataclasses.replace(PENALISED, logit_bias={7: 3.0})
    wanted = await expected(folder, penalised, [100, 17])
    async with engine(folder) as built:
        rows: list[Any] = []
        built.on_step = lambda plan, seconds: rows.extend(built.runner._drawing.values())
        for length, tokens in zip((100, 17), wanted, strict=True):
            rows.clear()
            assert ids(await collect(built, request(length, penalised, name="same"))) == tokens
            assert len(rows) == NEW_TOKENS
            assert len(set(map(id, rows))) == 1


@pytest.mark.parametrize("sampling", KINDS)
@pytest.mark.parametrize("push", [True, False], ids=["first token pushed", "blocks only"])
async def test_disaggregated(folder: Path, sampling: SamplingParams, push: bool) -> None:
    store = MemoryStore(2**30)
    results = []
    async with engine(folder, store, engine_settings(max_num_batched_tokens=32)) as prefill, engine(folder, store) as decode:
        for length in LENGTHS:
            wanted = request(length, sampling)
            sequence = decode.submit(wanted, hold=True)
            assert await sequence.matched() == (0, 0)
            first = dataclasses.replace(wanted, sampling=dataclasses.replace(sampling, max_tokens=1))
            async for output in prefill.submit(first, await_saves=True):
                sequence.offer_blocks(output.num_saved_blocks)
                for token in output.tokens:
                    if push:
                        sequence.push_token(token)
                if output.finish_reason is not None:
                    assert output.num_saved_blocks == length // 16
            sequence.release()
            outputs = [output async for output in sequence]
            report = next(o.cache for o in outputs if o.cache is not None)
            assert report.num_prefill_tokens == (length // 16 * 16 if push else (length - 1) // 16 * 16)
            results.append(ids(outputs))
    assert results == await expected(folder, sampling)


@pytest.mark.parametrize("how", ["length", "stop"])
async def test_a_pushed_token_that_is_the_last_comes_with_the_reason(folder: Path, how: str) -> None:
    wanted = (await expected(folder, GREEDY, [100]))[0]
    sampling = dataclasses.replace(GREEDY, max_tokens=1) if how == "length" else dataclasses.replace(GREEDY, stop_token_ids=(wanted[0],))
    async with engine(folder) as built:
        sequence = built.submit(request(100, sampling), hold=True)
        assert await sequence.reserve() is None  # nobody writes here
        sequence.push_token(OutputToken(wanted[0]))
        (output,) = [output async for output in sequence]
    assert ids([output]) == wanted[:1]
    assert (output.finish_reason, output.stop_token_id) == (
        (FinishReason.LENGTH, None) if how == "length" else (FinishReason.STOP, wanted[0])
    )


async def test_a_pushed_token_is_told_once_and_at_once(folder: Path) -> None:
    wanted = (await expected(folder, GREEDY, [100]))[0]
    async with engine(folder) as built:
        sequence = built.submit(request(100, GREEDY), hold=True)
        await sequence.matched()
        sequence.push_token(OutputToken(wanted[0]))
        assert not sequence._outputs.empty()  # before the engine's thread could tell
        sequence.release()
        assert ids([output async for output in sequence]) == wanted
        gone = built.submit(request(100, GREEDY, "gone"), hold=True)
        gone.close()
        gone.push_token(OutputToken(wanted[0]))
        assert ids([output async for output in gone]) == []


@pytest.mark.parametrize("sampling", KINDS)
async def test_from_any_tier(folder: Path, tmp_path: Path, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device forgets the prompt each time; the next engine finds it in the files. All that is found is fetched."""
    monkeypatch.setattr(KVTransfer, "seconds", lambda tier, nbytes: 0.0)
    wanted, store = (await expected(folder, sampling, [161]))[0], MemoryStore(2**30)
    settings = engine_settings(num_blocks=64, max_num_batched_tokens=64)
    hashes = [request_hash(index).hex() for index in range(10)]
    for host, pool, files, known in (
        (2**30, None, tmp_path / "a", False),
        (0, None, tmp_path / "a", True),
        (0, store, None, False),
        (2**30, store, tmp_path / "b", False),
        (0, store, tmp_path / "b", True),
    ):
        async with engine(folder, pool, settings, host=host, files=files) as built:
            for found in (known, True):
                outputs = await collect(built, request(161, sampling))
                assert ids(outputs) == wanted
                report = next(o.cache for o in outputs if o.cache is not None)
                assert (report.num_local_tokens, report.num_pool_tokens) == (0, 160 * found)
                keys = [built._tiers.key(bytes.fromhex(item)) for item in hashes]
                while not all(all(tier._store.contains(keys)) for tier in built._tiers):
                    await asyncio.sleep(0.01)
                await collect(built, request(980, sampling))
            assert built._tiers[0].stats.blocks_loaded >= 10
            assert not any(tier.stats.failures or tier.stats.blocks_missed for tier in built._tiers)


class SlowStore(MemoryStore):
    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        time.sleep(0.5)
        return super().get(keys, buffers)


async def test_what_is_found_in_a_slow_tier_is_computed_until_it_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = (await expected(folder, GREEDY, [161]))[0]
    async with engine(folder, SlowStore(2**30), engine_settings(num_blocks=64, max_num_batched_tokens=64)) as built:
        (tier,), results = built._tiers, []
        for half_life_s, found in ((30, 0), (30, 160), (30, 0), (0.001, 160)):
            monkeypatch.setattr(fetching, "HALF_LIFE_S", half_life_s)
            outputs = await collect(built, request(161, GREEDY))
            results.append(ids(outputs))
            assert next(o.cache for o in outputs if o.cache is not None).num_pool_tokens == found
            await collect(built, request(980, dataclasses.replace(GREEDY, prompt_logprobs=0)))  # which takes no block from anywhere
        assert results == [wanted] * 4
        assert (tier.stats.blocks_loaded, tier.stats.blocks_declined) == (20, 10)


async def test_disaggregated_through_a_shared_directory(folder: Path, tmp_path: Path) -> None:
    wanted = request(161, GREEDY)
    async with engine(folder, files=tmp_path, shared=True) as prefill, engine(folder, host=2**30, files=tmp_path, shared=True) as decode:
        sequence = decode.submit(wanted, hold=True)
        assert await sequence.matched() == (0, 0)
        async for output in prefill.submit(
            dataclasses.replace(wanted, sampling=dataclasses.replace(GREEDY, max_tokens=1)), await_saves=True
        ):
            sequence.offer_blocks(output.num_saved_blocks)
            for token in output.tokens:
                sequence.push_token(token)
        assert output.num_saved_blocks == 10
        sequence.release()
        outputs = [output async for output in sequence]
        assert next(o.cache for o in outputs if o.cache is not None).num_prefill_tokens == 160
    assert ids(outputs) == (await expected(folder, GREEDY, [161]))[0]


@pytest.mark.parametrize("sampling", KINDS)
async def test_a_block_lost_from_the_pool_is_computed(folder: Path, sampling: SamplingParams) -> None:
    store = MemoryStore(2**30)
    async with engine(folder, store) as first, engine(folder, store) as second:
        await collect(first, request(161, dataclasses.replace(sampling, max_tokens=1)), await_saves=True)
        keys = [key for key in store._values if key.endswith(request_hash(160 // 16 - 5).hex())]
        assert len(keys) == 1
        del store._values[keys[0]]
        outputs = await collect(second, request(161, sampling))
    assert ids(outputs) == (await expected(folder, sampling, [161]))[0]
    assert next(o.cache for o in outputs if o.cache is not None).num_pool_tokens == (160 // 16 - 5) * 16


def request_hash(index: int) -> bytes:
    from baton.hashing import block_hashes

    return block_hashes(prompt_of(161), 16)[index]


@pytest.mark.parametrize("sampling", KINDS)
async def test_migrated_at_every_cut(folder: Path, sampling: SamplingParams) -> None:
    wanted = (await expected(folder, sampling, [100]))[0]
    async with engine(folder) as built:
        for cut in range(1, NEW_TOKENS):
            moved = request(100, sampling, name=f"cut{cut}", output_token_ids=tuple(wanted[:cut]))
            assert (await generate(built, [moved]))[0] == wanted[cut:], f"moved after {cut} tokens"


async def test_logprobs_do_not_depend_on_the_way(folder: Path) -> None:
    sampling = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=2)
    async with engine(folder, settings=engine_settings(max_num_batched_tokens=9)) as chunked, engine(folder) as whole:
        results = [await collect(built, request(100, sampling)) for built in (chunked, whole, whole)]
    tokens = [[token for output in outputs for token in output.tokens] for outputs in results]
    prompts = [next(output.prompt_logprobs for output in outputs if output.tokens) for outputs in results]
    for prompt in prompts:
        assert len(prompt) == 100
        assert prompt[0] is None
    for other in (1, 2):
        assert_close(tokens[0], tokens[other])
        flat = [[OutputToken(0, item) for item in prompt[1:]] for prompt in (prompts[0], prompts[other])]
        assert_close(*flat)


def assert_close(first: Sequence[OutputToken], second: Sequence[OutputToken]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.token_id == b.token_id
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert a.logprobs.rank == b.logprobs.rank
        assert [token_id for token_id, _ in a.logprobs.top] == [token_id for token_id, _ in b.logprobs.top]
        assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-4)


async def test_stopping(folder: Path) -> None:
    wanted = (await expected(folder, GREEDY, [100]))[0]
    stop = wanted[10]
    at = wanted.index(stop)
    async with engine(folder) as built:
        stopped = await collect(built, request(100, dataclasses.replace(GREEDY, stop_token_ids=(stop,))))
        later = await collect(built, request(100, dataclasses.replace(GREEDY, stop_token_ids=(stop,), min_tokens=at + 2)))
        biased = await collect(built, request(100, dataclasses.replace(GREEDY, logit_bias={7: 1000.0}, max_tokens=5)))
    assert ids(stopped) == wanted[: at + 1]
    assert (stopped[-1].finish_reason, stopped[-1].stop_token_id) == (FinishReason.STOP, stop)
    assert ids(later)[:at] == wanted[:at]
    assert stop not in ids(later)[: at + 2]
    assert ids(biased) == [7] * 5
    assert biased[-1].finish_reason is FinishReason.LENGTH
