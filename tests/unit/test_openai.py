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
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop"),
    ],
)
def test_wrong_bodies_name_the_field(body: Any, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(CompletionBody, body)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "wizard", "content": "x"}, r"^messages\.1\.role: .*'assistant'"),
        ({"role": "user"}, r"^messages\.1: content is missing"),
        ({"role": "user", "content": None}, "content is missing"),
        ({"role": "assistant", "tool_calls": []}, "content is missing"),
    ],
)
def test_a_message_has_a_role_that_there_is_and_a_content(message: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        parse(ChatBody, {"messages": [{"role": "user", "content": "x"}, message]})
    assert caught.value.param == "messages"


def test_unknown_fields_are_tolerated_and_defaults_come_from_the_model() -> None:
    body = parse(ChatBody, {"messages": [{"role": "user", "content": "x", "name": "me"}], "parallel_tool_calls": True, "top_k": -1})
    (ask,) = body.asks("id", [[1, 2, 3]], {"temperature": 0.6, "top_p": None}, 10)
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
        assert parse(CompletionBody, {"prompt": prompt}).prompts(tokenizer, 100) == expected


def test_a_null_is_as_if_it_was_not_sent() -> None:
    nulls = {
        "stream": None,
        "logprobs": None,
        "stream_options": {"include_usage": None},
        "top_logprobs": 0,
        "cache_salt": None,
        "tools": None,
    }
    body = parse(ChatBody, {"messages": [{"role": "user", "content": "x"}], **nulls})
    assert (body.stream, body.logprobs, body.cache_salt) == (False, False, "")
    assert body.asks("id", [[1]], {}, 10)[0].sampling.logprobs is None
    assert parse(CompletionBody, {"prompt": "x", "echo": None}).echo is False


@pytest.mark.parametrize(
    "sent",
    [
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"best_of": 3},
        {"bad_words": ["x"]},
    ],
    ids=lambda sent: "+".join(sent),
)
def test_what_would_change_the_answer_and_is_not_served_is_refused(sent: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not supported here") as caught:
        parse(ChatBody, {"messages": [{"role": "user", "content": "x"}], **sent})
    assert caught.value.param == next(iter(sent))


@pytest.mark.parametrize(
    "sent",
    [{"tools": []}, {"tools": [{}], "tool_choice": "none"}, {"response_format": {"type": "text"}}, {"best_of": 2, "n": 2}, {"suffix": ""}],
)
def test_what_asks_for_nothing_is_taken(sent: dict[str, Any]) -> None:
    parse(CompletionBody, {"prompt": "x", **sent})


def test_parts_are_lines_and_a_call_of_tools_may_have_no_content(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "Summarise:"}, {"type": "text", "text": "Baton is"}]
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    messages = parse(ChatBody, {"messages": [{"role": "user", "content": parts}, called]}).messages
    assert [message.for_template()["content"] for message in messages] == ["Summarise:\nBaton is", ""]


def test_the_last_message_is_gone_on_with(tokenizer: Tokenizer) -> None:
    sent = {
        "messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two, "}],
        "continue_final_message": True,
    }
    text = tokenizer.decode(parse(ChatBody, {**sent, "add_generation_prompt": False}).prompts(tokenizer, 100)[0], skip_special_tokens=False)
    assert text.rstrip().endswith("one, two,")
    with pytest.raises(InvalidRequest, match="add_generation_prompt=false"):
        parse(ChatBody, sent).prompts(tokenizer, 100)


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        parse(CompletionBody, {"prompt": "\ud83d"}).prompts(tokenizer, 100)


def test_a_text_that_cannot_fit_is_refused_unread(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptTooLong, match="characters"):
        parse(CompletionBody, {"prompt": "word " * 100_000}).prompts(tokenizer, 100)


def test_content_parts_other_than_text_are_refused(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidRequest, match="image_url"):
        parse(ChatBody, {"messages": [{"role": "user", "content": parts}]}).prompts(tokenizer, 100)
    joined = parse(ChatBody, {"messages": [{"role": "user", "content": parts[:1]}]}).prompts(tokenizer, 100)
    assert joined == parse(ChatBody, {"messages": [{"role": "user", "content": "a"}]}).prompts(tokenizer, 100)


def test_a_sequences_first_chunk_says_who_speaks_also_when_more_has_come_by_then(tokenizer: Tokenizer) -> None:
    ask = Ask(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=9))
    body = parse(ChatBody, {"messages": [{"role": "user", "content": "x"}], "return_token_ids": True})
    answers = Answers(body, "r", "m", tokenizer, [ask])
    choice = Choice(0, Route("round_robin"))
    choice.pieces += [Piece("a", (OutputToken(5),)), Piece("b", (OutputToken(6),))]
    first, second = (answers.chunk(choice, piece) for piece in choice.pieces)
    assert first is not None
    assert second is not None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert first["choices"][0]["prompt_token_ids"] == [1, 2]
    assert second["choices"][0]["delta"] == {"content": "b"}


@pytest.mark.parametrize("body", [(ChatBody, {"messages": [{"role": "user", "content": "x"}]}), (CompletionBody, {"prompt": "x"})])
@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_chunks_line_is_its_json(tokenizer: Tokenizer, body: Any, token_ids: bool, logprobs: int | None) -> None:
    ask = Ask(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=9, logprobs=logprobs), n=2)
    made = parse(body[0], {**body[1], "return_token_ids": token_ids})
    answers, other = (Answers(made, 'r"1', "m\n\u00e9", tokenizer, [ask]) for _ in range(2))
    choice = Choice(1, Route("round_robin"))
    score = None if logprobs is None else TokenLogprobs(-0.5, 1)
    texts = ["a", 'b"\\\n\t\x00\x7f', "", "\u00fc\u2028\U0001f600", "end"]
    choice.pieces += [Piece(text, (OutputToken(5 + i, score), OutputToken(9, score))) for i, text in enumerate(texts)]
    choice.pieces.append(Piece("", (), FinishReason.LENGTH))
    for piece in choice.pieces:
        chunk = other.chunk(choice, piece)
        expected = None if chunk is None else json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        assert answers.line(choice, piece) == expected


@pytest.mark.parametrize(
    "sent",
    [{"logprobs": 1}, {"echo": True, "logprobs": 1}, {"echo": True, "max_tokens": 0, "logprobs": 0}, {"echo": True, "max_tokens": 0}],
)
def test_a_stream_joined_is_the_whole_answer(tokenizer: Tokenizer, sent: dict[str, Any]) -> None:
    body = parse(CompletionBody, {"prompt": "x", "return_token_ids": True, **sent})
    prompt, ids = tokenizer.encode("The router"), tokenizer.encode(" is here", add_special_tokens=False)
    if body.silent:
        ids = ids[:1]
    (ask,) = body.asks("r", [prompt], {}, 100)
    score = TokenLogprobs(-0.5, 1, ((7, -0.5),)) if body.logprobs is not None else None
    choice = Choice(0, Route("round_robin"), prompt_logprobs=(None, *[score] * (len(prompt) - 1)) if score and body.echo else ())
    for place, token_id in enumerate(ids):
        last = FinishReason.STOP if place == len(ids) - 1 else None
        choice.pieces.append(Piece(tokenizer.token(token_id), (OutputToken(token_id, score),), last))
        choice.text += choice.pieces[-1].text
    choice.finish_reason, choice.num_tokens = FinishReason.STOP, len(ids)
    streamed, whole = Answers(body, "r", "m", tokenizer, [ask]), Answers(body, "r", "m", tokenizer, [ask])
    chunks = [json.loads(line)["choices"][0] for piece in choice.pieces if (line := streamed.line(choice, piece))]
    expected = whole.whole([choice])
    (entry,) = expected["choices"]
    assert "".join(chunk["text"] for chunk in chunks) == entry["text"]
    assert [token_id for chunk in chunks for token_id in chunk["token_ids"]] == entry["token_ids"]
    assert chunks[-1]["finish_reason"] == entry["finish_reason"]
    assert streamed.usage_chunk([choice])["usage"] == expected["usage"]
    for name, values in (entry["logprobs"] or {}).items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == json.loads(json.dumps(values)), name


def test_logprobs_of_a_prompt_cannot_be_streamed() -> None:
    with pytest.raises(InvalidRequest, match="cannot be streamed"):
        parse(CompletionBody, {"prompt": "x", "stream": True, "prompt_logprobs": 1}).asks("r", [[1]], {}, 100)
