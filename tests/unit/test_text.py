"""Text from tokens: pieces of characters, stop strings, the end of a sequence."""

import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import tokenizers.models
from tokenizers import decoders

from baton.tokenizer import Detokenizer, Tokenizer
from baton.types import (
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    OutputToken,
    Role,
    TokenLogprobs,
)
from services.router.app import make_app
from services.router.text import TextStream
from tests.unit.test_gateway import gateway

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


@pytest.fixture(params=["Strip", "Metaspace"])
def sentencepiece(tmp_path: Path, request: pytest.FixtureRequest) -> Tokenizer:
    """As Llama 2's and Mistral's: words begin with a mark for their space, and a text's first space is not shown."""
    words = ["<unk>", "<s>", "\u2581The", "\u2581capital", "\u2581is", "\u2581Paris", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    made: Any = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(spaces if request.param == "Strip" else [decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


def told(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, prompt=prompt, skip_special_tokens=skip)
    pieces = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.flush()]
    assert "".join(pieces) == "".join([(whole := Detokenizer(tokenizer, prompt=prompt, skip_special_tokens=skip)).push(ids), whole.flush()])
    return "".join(pieces)


def of_bytes(text: str, end: int | None = None) -> list[int]:
    """The tokens of a text that is not in the vocabulary of `sentencepiece`."""
    return [7 + byte for byte in text.encode()[:end]]


PROMPTS = [
    ([1, 2, 3, 4], "a prompt"),
    ([1], "its beginning alone"),
    ([], "none"),
    ([1, 2, *[1] * 9], "special tokens at its end, as of a chat"),
    ([1, *of_bytes("東京")], "characters of several tokens"),
    ([1, *of_bytes("京" * 20)], "many of them"),
    ([1, 2, *of_bytes("🚀")], "a character of four"),
]
TOLD = [[5, 5, 6], [*of_bytes("京"), 6], [*of_bytes("京"), 5, *of_bytes("🚀🚀")], [1, 5]]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("prompt", [prompt for prompt, _ in PROMPTS], ids=[name for _, name in PROMPTS])
def test_what_follows_a_prompt_is_what_decoding_them_together_adds(sentencepiece: Tokenizer, prompt: list[int], skip: bool) -> None:
    for ids in TOLD:
        before, both = (sentencepiece.decode(part, skip_special_tokens=skip) for part in (prompt, prompt + ids))
        assert before + told(sentencepiece, prompt, ids, skip=skip) == both


def test_a_word_after_a_prompt_has_its_space(sentencepiece: Tokenizer) -> None:
    assert told(sentencepiece, [1, 2, 3, 4], [5, 6]) == " Paris!"
    assert told(sentencepiece, [1], [5, 6]) == "Paris!"


@pytest.mark.parametrize(
    ("ids", "text"),
    [(of_bytes("京")[1:], "京"), ([*of_bytes("京")[1:], 5], "京 Paris"), ([5], " Paris"), ([6], "!")],
    ids=["is completed", "and goes on", "is given up for a word", "or for less"],
)
def test_a_character_that_the_prompt_began(sentencepiece: Tokenizer, ids: list[int], text: str) -> None:
    assert told(sentencepiece, [1, 2, *of_bytes("京", 1)], ids) == text


def test_a_character_that_the_prompt_began_also_where_tokens_are_bytes(tokenizer: Tokenizer) -> None:
    *prompt, last = tokenizer.encode("x🚀", add_special_tokens=False)
    assert prompt
    assert tokenizer.decode(prompt).endswith("\ufffd")
    assert told(tokenizer, prompt, [last, *tokenizer.encode(" go", add_special_tokens=False)]) == "🚀 go"


@pytest.mark.parametrize("body", [{}, {"echo": True}, {"echo": True, "logprobs": 0}, {"stop": ["ris!"]}, {"skip_special_tokens": False}])
async def test_streamed_and_whole_are_the_text_that_goes_on(
    demo_model: Path, tmp_path: Path, sentencepiece: Tokenizer, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    shutil.copy(demo_model / "config.json", tmp_path)
    made, prompt, ids = gateway(tmp_path, Role.UNIFIED), [1, 2, 3, 4], [5, *of_bytes("京"), 5, 6]

    async def generate(request: GenerateRequest, *others: Any) -> AsyncGenerator[GenerateOutput]:
        score = TokenLogprobs(-0.5, 1) if request.sampling.logprobs is not None else None
        scores = () if request.sampling.prompt_logprobs is None else (None, *[score] * (len(prompt) - 1))
        for place, token_id in enumerate(ids):
            reason = FinishReason.LENGTH if place == len(ids) - 1 else None
            yield GenerateOutput(tokens=(OutputToken(token_id, score),), finish_reason=reason, prompt_logprobs=() if place else scores)

    monkeypatch.setattr(made.dispatcher, "generate", generate)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(made)), base_url="http://router") as http:
        sent = {"prompt": prompt, "max_tokens": 9, **body}
        (whole,) = (await http.post("/v1/completions", json=sent)).json()["choices"]
        *events, _, _ = (await http.post("/v1/completions", json={**sent, "stream": True})).text.split("\n\n")
    streamed = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    said = " Paris京 Pa" if "stop" in body else " Paris京 Paris!"
    assert streamed == whole["text"] == ("The capital is" if "echo" in body else "") + said
