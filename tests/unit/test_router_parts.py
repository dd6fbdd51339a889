"""The router's pure parts: index, policies, text, bodies, routes."""

import itertools
import json
import random
from dataclasses import replace
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import pytest

from baton.errors import InvalidRequest, NoWorkers
from baton.hashing import block_hashes
from baton.tokenizer import Detokenizer, Tokenizer
from baton.types import (
    BlocksRemoved,
    BlocksStored,
    Digest,
    FinishReason,
    GenerateOutput,
    OutputToken,
    Pace,
    Role,
    SamplingParams,
    Tier,
    TokenLogprobs,
)
from services.router.answers import Answers
from services.router.dispatch import Route
from services.router.generation import Ask, Choice
from services.router.index import OWN_TIERS, PrefixIndex
from services.router.openai import ChatBody, CompletionBody, parse
from services.router.policies import POLICIES
from services.router.policy import Facts, WorkerView
from services.router.predicted import predicted
from services.router.text import Piece, TextStream


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


# -- index


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
    pools = {"a": ("f", 1), "b": ("f", 1), "c": ("f", 2), "d": ("g", 1)}
    held: dict[str, dict[Tier, set[bytes]]] = {}
    pooled = {pool: set[bytes]() for pool in pools.values()}
    sent, coming = dict[str, dict[str, list[bytes]]](), dict[str, set[bytes]]()
    for step in range(400):
        name = rng.choice(list(pools))
        if name not in held:
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


# -- policies


def worker(name: str, role: Role, **changes: Any) -> WorkerView:
    fields = {"fingerprint": "f", "block_size": 16, "num_requests": 0, "pending_tokens": 0, "matched_tokens": 0}
    return WorkerView(id=name, role=role, **{**fields, **changes})


def place(policy: str, workers: list[WorkerView], turn: int = 0, prompt: int = 1000) -> tuple[str, tuple[str, ...]]:
    placement = POLICIES[policy](Facts(num_prompt_tokens=prompt, turn=turn), workers)
    assert placement.reason
    return placement.decode, placement.prefills


def test_round_robin_takes_turns() -> None:
    workers = [worker("p1", Role.PREFILL), worker("p0", Role.PREFILL), *(worker(f"d{i}", Role.DECODE) for i in range(3))]
    chosen = [place("round_robin", workers, turn) for turn in range(6)]
    assert [decode for decode, _ in chosen] == ["d0", "d1", "d2"] * 2
    assert [prefills[0] for _, prefills in chosen] == ["p0", "p1"] * 3


def test_least_load_goes_to_the_idle_pair() -> None:
    workers = [
        worker("p0", Role.PREFILL, pending_tokens=500),
        worker("p1", Role.PREFILL),
        worker("d0", Role.DECODE, num_requests=9),
        worker("d1", Role.DECODE, num_requests=1),
    ]
    assert place("least_load", workers) == ("d1", ("p1", "p0"))


def test_prefix_aware_weighs_cached_tokens_against_queued_ones() -> None:
    def workers(pending: int) -> list[WorkerView]:
        return [
            worker("p0", Role.PREFILL, matched_tokens=800, pending_tokens=pending),
            worker("p1", Role.PREFILL),
            worker("d0", Role.DECODE),
        ]

    assert place("prefix_aware", workers(700))[1] == ("p0", "p1")
    assert place("prefix_aware", workers(900))[1] == ("p1", "p0")


@pytest.mark.parametrize("policy", POLICIES)
def test_only_equal_fingerprints_are_paired(policy: str) -> None:
    old = [worker("p0", Role.PREFILL, fingerprint="old"), worker("d0", Role.DECODE, fingerprint="old")]
    new = [worker("p1", Role.PREFILL, fingerprint="new"), worker("d1", Role.DECODE, fingerprint="new")]
    for turn in range(4):
        decode, prefills = place(policy, [*old, *new], turn)
        assert prefills == (("p0",) if decode == "d0" else ("p1",))
    with pytest.raises(NoWorkers, match="no prefill worker has the KV fingerprint"):
        place(policy, [old[0], new[1]])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_set_of_workers_gives_a_placement_or_a_reason(policy: str) -> None:
    everyone = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE), worker("u0", Role.UNIFIED)]
    for size in range(4):
        for workers in itertools.combinations(everyone, size):
            names = {w.id for w in workers}
            if names >= {"p0", "d0"} or "u0" in names:
                decode, prefills = place(policy, list(workers))
                assert (decode, prefills) in {("u0", ()), ("d0", ("p0",)), ("d0", ())}
            else:
                with pytest.raises(NoWorkers, match="is ready; start one"):
                    place(policy, list(workers))


PACE = Pace(base_s=0.01, token_s=0.001, row_s=0.0005)


def placed(workers: list[WorkerView], *, prompt: int = 1000, output: int = 50, local: bool = True) -> tuple[str, tuple[str, ...]]:
    facts = Facts(num_prompt_tokens=prompt, turn=0, num_output_tokens=output, local_prefill=local)
    placement = predicted(facts, workers)
    return placement.decode, placement.prefills


def one_and_one(queued: int, running: int, *, pace: Pace = PACE, prompt: int = 1000) -> list[WorkerView]:
    """A prefill worker with `queued` prompts, a decode worker with `running` requests."""
    return [
        worker("p0", Role.PREFILL, num_requests=queued, num_waiting=queued, pending_tokens=queued * prompt, pace=pace),
        worker("d0", Role.DECODE, num_requests=running, context_tokens=running * prompt, pace=pace),
    ]


def test_a_decode_worker_computes_prompts_where_that_costs_everybody_less() -> None:
    assert placed(one_and_one(0, 0)) == ("d0", ("p0",))  # a tie
    assert placed(one_and_one(3, 1)) == ("d0", ())
    assert placed(one_and_one(3, 1), local=False) == ("d0", ("p0",))
    assert placed(one_and_one(3, 20)) == ("d0", ("p0",))  # it would hold up twenty
    p0, d0 = one_and_one(3, 20)
    assert placed([p0, replace(d0, num_waiting=19, num_held=19, context_tokens=1000)]) == ("d0", ())  # who wait for others are not held up


def on_one_device(views: list[WorkerView]) -> list[WorkerView]:
    return [replace(view, device="m/0,1") for view in views]


def test_on_cores_that_both_use_a_prompt_is_computed_where_it_is_done_first() -> None:
    """A prefill worker that takes the decode worker's cores holds up its requests as much as the decode worker itself would."""
    for queued, running in [(3, 20), (1, 20), (0, 20), (0, 1)]:
        apart = one_and_one(queued, running)
        assert placed(apart) == placed([replace(view, device=f"m{view.id}/0,1") for view in apart]) == ("d0", ("p0",))
        assert placed(on_one_device(apart)) == ("d0", ())
        assert placed(on_one_device(apart), local=False) == ("d0", ("p0",))
    p0, d0 = on_one_device(one_and_one(0, 0))
    assert placed([p0, d0]) == ("d0", ("p0",))  # nobody is held up
    full = replace(d0, num_requests=4, num_waiting=4, pending_tokens=4000, batched_tokens=512)
    assert placed([p0, full]) == ("d0", ("p0",))  # it has others to compute


def test_who_shares_cores_with_a_busy_worker_has_half_of_them() -> None:
    def ttft(views: list[WorkerView], local: bool) -> float:
        placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=local), views)
        assert placement.prefills == (() if local else ("p0",))
        assert placement.ttft_s is not None
        return placement.ttft_s

    work = 1000 * PACE.token_s + PACE.base_s
    assert ttft(on_one_device(one_and_one(0, 0)), local=False) == pytest.approx(work)
    step = PACE.base_s + PACE.decode_s(4, 4000)  # that a hand-over waits for
    assert ttft(on_one_device(one_and_one(0, 4)), local=False) == pytest.approx(2 * work + step)  # no end is seen to decoding
    p0, d0 = on_one_device(one_and_one(1, 4))
    beside = work + PACE.decode_s(4, 4000)
    assert ttft([p0, d0], local=True) == pytest.approx(beside + 1.0)  # until the prefill worker has done its own
    assert ttft([replace(p0, pending_tokens=5000), d0], local=True) == pytest.approx(2 * beside)


def test_a_worker_that_waits_for_its_cores_is_slower_by_the_clock() -> None:
    slow = replace(PACE, crowded=1.0)
    alone = predicted(Facts(num_prompt_tokens=1000, turn=0), [worker("u0", Role.UNIFIED, pace=slow)])
    assert alone.ttft_s == pytest.approx(2 * (1000 * PACE.token_s + PACE.base_s))
    pair = [worker("u0", Role.UNIFIED, pace=slow), worker("u1", Role.UNIFIED, pace=PACE, num_requests=1, num_waiting=1)]
    assert placed(pair)[0] == "u1"
    mates = on_one_device([worker("u0", Role.UNIFIED, pace=slow), worker("u1", Role.UNIFIED, pace=slow)])
    beside = predicted(Facts(num_prompt_tokens=1000, turn=0), mates)
    assert beside.ttft_s == pytest.approx(alone.ttft_s)  # the other is idle now, but was not lately


def test_seconds_not_tokens_decide() -> None:
    slow = replace(PACE, token_s=0.01)
    pair = [worker("p0", Role.PREFILL, pace=slow), worker("p1", Role.PREFILL, pending_tokens=3000, pace=PACE), worker("d0", Role.DECODE)]
    assert placed(pair, local=False) == ("d0", ("p1", "p0"))
    cached = replace(pair[0], matched_tokens=900)
    assert placed([cached, *pair[1:]], local=False) == ("d0", ("p0", "p1"))


def test_who_has_not_met_a_prompt_yet_is_taken_for_the_average() -> None:
    """A decode worker that only decoded so far is not thought to compute prompts in no time."""
    p0, d0 = one_and_one(0, 4)
    assert placed([p0, replace(d0, pace=Pace(base_s=0.01, row_s=0.0005))]) == ("d0", ("p0",))
    unknown = one_and_one(0, 0, pace=Pace())
    assert placed(unknown) == ("d0", ("p0",))
    assert predicted(Facts(num_prompt_tokens=10, turn=0), unknown).ttft_s is None


def test_the_time_to_the_first_token_is_predicted() -> None:
    views = one_and_one(2, 0)
    placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), [replace(v, batched_tokens=512) for v in views])
    assert placement.ttft_s == pytest.approx(3 * 1000 * PACE.token_s + 6 * PACE.base_s)
    slow_link = [replace(views[0], pace=replace(PACE, push_token_s=0.005)), views[1]]
    placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), slow_link)
    assert placement.ttft_s == pytest.approx(5.0)


def test_a_hand_over_waits_for_the_decode_workers_step() -> None:
    def ttft(d0: WorkerView) -> float:
        views = [worker("p0", Role.PREFILL, pace=PACE), replace(d0, batched_tokens=512, pace=PACE)]
        placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), views)
        assert placement.ttft_s is not None
        return placement.ttft_s - 1000 * PACE.token_s - PACE.base_s

    d0 = worker("d0", Role.DECODE)
    assert ttft(d0) == pytest.approx(0.0)
    decoding = replace(d0, num_requests=8)
    assert ttft(decoding) == pytest.approx(PACE.base_s + 8 * PACE.row_s)
    assert ttft(replace(decoding, pending_tokens=2048)) == pytest.approx(PACE.base_s + 8 * PACE.row_s + 512 * PACE.token_s)


def test_a_prompt_costs_others_its_steps_too_where_nobody_decodes_in_them() -> None:
    """Prefill workers whose steps are all alike cannot tell a step's base from its tokens: their sum is what counts."""
    views = {
        base: worker("p0", Role.PREFILL, num_waiting=4, batched_tokens=1000, pace=Pace(base_s=base, token_s=(1 - base) / 1000))
        for base in (0, 0.6)
    }
    for base, view in views.items():
        other = worker("p1", Role.PREFILL, num_waiting=4, batched_tokens=1000, pace=Pace(base_s=1e-6, token_s=0.0009))
        assert placed([view, other, worker("d0", Role.DECODE)], local=False)[1] == ("p1", "p0"), base


def test_a_slow_path_from_a_prefill_worker_counts_against_it() -> None:
    """And the one that is asked is the one whose time is told."""
    slow_path, busy = replace(PACE, push_token_s=0.02), {"num_requests": 2, "num_waiting": 2, "pending_tokens": 2000}
    views = [
        worker("p0", Role.PREFILL, pace=slow_path),
        worker("p1", Role.PREFILL, pace=PACE, **busy),
        worker("d0", Role.DECODE, pace=PACE),
    ]
    placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), views)
    assert placement.prefills == ("p1", "p0")
    assert placement.ttft_s == pytest.approx(3 * 1000 * PACE.token_s + PACE.base_s)


def test_decode_workers_fill_evenly() -> None:
    busy = worker("d0", Role.DECODE, num_requests=8, context_tokens=8000, pace=PACE)
    assert placed([worker("p0", Role.PREFILL, pace=PACE), busy, worker("d1", Role.DECODE, pace=PACE)]) == ("d1", ("p0",))


# -- text


TEXTS = ["hello world", "naïve café – 東京 🚀🚀 end", "a\n\n  b\tc", "مرحبا", "x" * 50]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_token_by_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def outputs(tokenizer: Tokenizer, text: str, *, stop_id: int | None = None) -> list[GenerateOutput]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    last = FinishReason.LENGTH if stop_id is None else FinishReason.STOP
    items = [GenerateOutput(tokens=(OutputToken(token_id),)) for token_id in ids]
    end = GenerateOutput(tokens=() if stop_id is None else (OutputToken(stop_id),), finish_reason=last, stop_token_id=stop_id)
    return [*items, end]


def run_text(tokenizer: Tokenizer, items: list[GenerateOutput], **options: Any) -> tuple[str, Any, Any, list[str]]:
    defaults = {"stop": (), "include_stop": False, "skip_special_tokens": True, "min_tokens": 0, "eos": frozenset({3})}
    stream = TextStream(tokenizer, **{**defaults, **options})
    pieces = []
    for item in items:
        pieces.append(stream.push(item))
        if pieces[-1].finish_reason is not None:
            break
    return "".join(p.text for p in pieces), pieces[-1].finish_reason, pieces[-1].stop_reason, [p.text for p in pieces]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_spans_tokens_is_never_shown_in_part(tokenizer: Tokenizer, include: bool) -> None:
    items = outputs(tokenizer, "The router chooses workers for each request.")
    text, reason, stop, pieces = run_text(tokenizer, items, stop=("ses work",), include_stop=include)
    assert text == "The router choo" + ("ses work" if include else "")
    assert (reason, stop) == (FinishReason.STOP, "ses work")
    assert not include or "ses work" in "".join(pieces[-2:])


def test_text_that_only_resembles_a_stop_string_comes_out(tokenizer: Tokenizer) -> None:
    text, reason, stop, _ = run_text(tokenizer, outputs(tokenizer, "one two three"), stop=("two four", "threes"))
    assert (text, reason, stop) == ("one two three", FinishReason.LENGTH, None)


def test_eos_is_not_text_and_a_stop_id_is_named(tokenizer: Tokenizer) -> None:
    assert run_text(tokenizer, outputs(tokenizer, "bye", stop_id=3))[:3] == ("bye", FinishReason.STOP, None)
    (token_id,) = tokenizer.encode("x", add_special_tokens=False)[-1:]
    assert run_text(tokenizer, outputs(tokenizer, "bye", stop_id=token_id))[:3] == ("bye", FinishReason.STOP, token_id)


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    items = outputs(tokenizer, "a b a b a b a b")
    assert run_text(tokenizer, items, stop=("b",), min_tokens=0)[0] == "a "
    assert len(run_text(tokenizer, items, stop=("b",), min_tokens=5)[0]) > 4


# -- bodies


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], None),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "x", "logprobs": 99}, "logprobs"),
        ({"prompt": "x", "stop": 3}, "stop"),
    ],
)
def test_wrong_bodies_name_the_field(body: Any, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(CompletionBody, body)
    assert caught.value.param == field


def test_unknown_fields_are_tolerated_and_defaults_come_from_the_model() -> None:
    body = parse(ChatBody, {"messages": [{"role": "user", "content": "x", "name": "me"}], "parallel_tool_calls": True, "top_k": -1})
    (ask,) = body.asks("id", [1, 2, 3], {"temperature": 0.6, "top_p": None}, 10)
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_k, ask.sampling.max_tokens) == (0.6, 1.0, 0, 7)


def test_prompts_may_be_text_ids_or_lists_of_either(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    for prompt, expected in [("hello", [ids]), (ids, [ids]), (["hello", "hello"], [ids, ids]), ([ids, ids], [ids, ids])]:
        assert parse(CompletionBody, {"prompt": prompt}).prompts(tokenizer) == expected


def test_content_parts_other_than_text_are_refused(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidRequest, match="image_url"):
        parse(ChatBody, {"messages": [{"role": "user", "content": parts}]}).prompt(tokenizer)
    joined = parse(ChatBody, {"messages": [{"role": "user", "content": parts[:1]}]}).prompt(tokenizer)
    assert joined == parse(ChatBody, {"messages": [{"role": "user", "content": "a"}]}).prompt(tokenizer)


def test_a_sequences_first_chunk_says_who_speaks_also_when_more_has_come_by_then(tokenizer: Tokenizer) -> None:
    ask = Ask(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=9))
    answers = Answers("chat.completion", "r", "m", tokenizer, [ask], token_ids=True)
    choice = Choice(0, Route("round_robin"))
    choice.pieces += [Piece("a", (OutputToken(5),)), Piece("b", (OutputToken(6),))]
    first, second = (answers.chunk(choice, piece) for piece in choice.pieces)
    assert first is not None
    assert second is not None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert first["choices"][0]["prompt_token_ids"] == [1, 2]
    assert second["choices"][0]["delta"] == {"content": "b"}


@pytest.mark.parametrize("kind", ["chat.completion", "text_completion"])
@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_chunks_line_is_its_json(tokenizer: Tokenizer, kind: str, token_ids: bool, logprobs: int | None) -> None:
    ask = Ask(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=9, logprobs=logprobs), n=2)
    answers = Answers(kind, 'r"1', "m\n\u00e9", tokenizer, [ask], token_ids=token_ids)
    choice = Choice(1, Route("round_robin"))
    score = None if logprobs is None else TokenLogprobs(-0.5, 1)
    texts = ["a", 'b"\\\n\t\x00\x7f', "", "\u00fc\u2028\U0001f600", "end"]
    choice.pieces += [Piece(text, (OutputToken(5 + i, score), OutputToken(9, score))) for i, text in enumerate(texts)]
    choice.pieces.append(Piece("", (), FinishReason.LENGTH))
    for piece in choice.pieces:
        chunk = answers.chunk(choice, piece)
        expected = None if chunk is None else json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        assert answers.line(choice, piece) == expected
