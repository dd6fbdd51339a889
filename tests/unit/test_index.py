"""The prefix index: what it finds, against looking at each block of each worker."""

import itertools
import random
from functools import reduce
from operator import xor

import pytest

from baton.hashing import block_hashes
from baton.types import (
    BlocksRemoved,
    BlocksStored,
    Digest,
    Tier,
)
from services.router.index import OWN_TIERS, PrefixIndex, Readers


def depths(index: PrefixIndex, hashes: list[bytes], workers: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    columns = index.reaches(hashes, index.places(workers))[:2]
    held, coming = ({name: int(depth) for name, depth in zip(workers, column, strict=True)} for column in columns)
    return held, coming


def match(index: PrefixIndex, hashes: list[bytes], workers: list[str]) -> dict[str, int]:
    return depths(index, hashes, workers)[0]


def test_index_matches_the_longest_held_prefix_of_each_worker() -> None:
    index = PrefixIndex()
    hashes = block_hashes(range(64), 16)
    index.apply("a", [BlocksStored(tuple(hashes[:3]))])
    index.apply("b", [BlocksStored((hashes[0], hashes[2]))])
    assert match(index, hashes, ["a", "b", "c"]) == {"a": 3, "b": 1, "c": 0}
    index.apply("a", [BlocksRemoved((hashes[1],))])
    assert match(index, hashes, ["a", "b"]) == {"a": 1, "b": 1}


def test_index_forgets_what_a_snapshot_does_not_name_and_workers_that_left() -> None:
    index = PrefixIndex()
    hashes = block_hashes(range(64), 16)
    index.apply("a", [BlocksStored(tuple(hashes))])
    index.apply("a", [BlocksStored(tuple(hashes[:1]))], snapshot=True)
    assert index.blocks("a") == {hashes[0]}
    index.remove("a")
    assert len(index) == 0
    index.apply("b", [BlocksStored(tuple(hashes))])  # takes the bit that is free again
    assert match(index, hashes, ["a", "b"]) == {"a": 0, "b": 4}


def test_removing_an_unknown_block_changes_nothing() -> None:
    index = PrefixIndex()
    index.apply("a", [BlocksStored((b"x" * 16,))])
    index.apply("b", [BlocksRemoved((b"x" * 16,))])
    assert match(index, [b"x" * 16], ["a", "b"]) == {"a": 1, "b": 0}


@pytest.mark.parametrize("seed", range(3))
def test_index_finds_what_looking_at_each_block_of_each_worker_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes and goes, in whichever order."""
    monkeypatch.setattr("services.router.index._STRETCH", 4)
    rng, index = random.Random(seed), PrefixIndex()
    prompts = [[bytes([some, number]) for number in range(12)] for some in range(2)]
    kinds: list[Readers] = [("f", 1), ("f", 2), ("g", 1), ("h", 1)]
    pools = dict[str, Readers]()  # that each reads
    held: dict[str, dict[Tier, set[bytes]]] = {}
    pooled = dict[Readers, set[bytes]]()
    sent, coming = dict[str, dict[str, list[bytes]]](), dict[str, set[bytes]]()
    for step in range(400):
        name = rng.choice("abcd")
        if name not in held:
            pools[name] = rng.choice(kinds)
            if pools[name] not in pooled:  # then what nobody reads is forgotten
                pooled = {pool: blocks for pool, blocks in pooled.items() if pool in [pools[each] for each in held]} | {pools[name]: set()}
            held[name], sent[name], coming[name] = {tier: set() for tier in OWN_TIERS}, {}, set()
            index.reads(name, pools[name])
        prompt = rng.choice(prompts)
        keys = prompt[: rng.randrange(13)] if rng.random() < 0.6 else rng.sample(prompt, 2)
        action = rng.random()
        if action < 0.5:
            index.apply(name, [BlocksStored(tuple(keys), tier := rng.choice(list(Tier)))])
            (pooled[pools[name]] if tier is Tier.POOL else held[name][tier]).update(keys)
        elif action < 0.7:
            index.apply(name, [BlocksRemoved(tuple(keys), tier := rng.choice(list(Tier)))])
            (pooled[pools[name]] if tier is Tier.POOL else held[name][tier]).difference_update(keys)
        elif action < 0.8:
            index.expect(name, str(step), keys)
            sent[name][str(step)] = keys
            coming[name].update(keys)
        elif action < 0.9 and sent[name]:
            index.settle(name, request := rng.choice(list(sent[name])))
            coming[name].difference_update(sent[name].pop(request))
        elif action < 0.95:
            index.apply(name, [BlocksStored(tuple(keys))], snapshot=True)
            held[name] = {tier: set(keys) if tier is Tier.DEVICE else set() for tier in OWN_TIERS}
        else:
            index.remove(name)
            del held[name], sent[name], coming[name]
        depths = index.reaches(prompt, index.places(held)).T.tolist()
        for (name, tiers), found in zip(held.items(), depths, strict=True):
            has, lengths = set[bytes](), list[int]()
            for some in (tiers[Tier.DEVICE], coming[name], tiers[Tier.HOST], tiers[Tier.FILES], pooled[pools[name]]):
                has.update(some)
                lengths.append(len(list(itertools.takewhile(has.__contains__, prompt))))
            assert found == lengths
            for tier, blocks in tiers.items():
                assert index.blocks(name, tier) == blocks
                assert index.digests(name)[tier] == Digest(tier, len(blocks), reduce(xor, map(int.from_bytes, blocks), 0))


def test_a_pool_outlives_its_only_reader_but_not_its_version() -> None:
    index, blocks = PrefixIndex(), [bytes([number]) * 16 for number in range(8)]

    def reachable(name: str) -> float:
        return index.reaches(blocks, index.places([name]))[-1][0]

    for version in range(50):
        index.reads("w", (str(version), 1))
        assert reachable("w") == 0
        index.apply("w", [BlocksStored(tuple(blocks), Tier.POOL)])
        index.remove("w")
        index.reads("w", (str(version), 1))  # it has started again
        assert reachable("w") == 8
        index.remove("w")
    assert len(index._pools) == 1
    assert len(index._places) + len(index._free) <= 3
    index.reads("w", ("other", 1))
    assert index._table == {}
