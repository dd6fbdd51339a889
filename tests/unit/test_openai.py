"""Clients' bodies and the router's chunks, in OpenAI's forms."""

import json
from typing import Any

import pytest

from baton.errors import InvalidRequest, PromptTooLong
from baton.tokenizer import Tokenizer
from baton.types import (
    FinishReason,
    OutputToken,
    SamplingParams,
    TokenLogprobs,
)
from services.router.answers import Answers
from services.router.dispatch import Route
from services.router.generation import Ask, Choice
from services.router.openai import ChatBody, CompletionBody, parse
from services.router.text import Piece


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


@pytest.mark.parametrize(
    ("asked", "given"),
    [({}, [16, 3]), ({"max_tokens": None}, [98, 3]), ({"max_tokens": 3}, [3, 3])],
    ids=["the default, cut to the context", "all that fits", "as many as asked for"],
)
def test_how_many_tokens_a_completion_may_have(asked: Any, given: list[int]) -> None:
    asks = parse(CompletionBody, {"prompt": "x", **asked}).asks("id", [[1, 2], [1] * 97], {}, 100)
    assert [ask.sampling.max_tokens for ask in asks] == given


def test_more_tokens_than_the_context_has_room_for_are_refused() -> None:
    with pytest.raises(PromptTooLong, match="ask for at most 3,") as caught:
        parse(CompletionBody, {"prompt": "x", "max_tokens": 4}).asks("id", [[1, 2], [1] * 97], {}, 100)
    assert caught.value.param == "max_tokens"


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
