"""Text from tokens: pieces of characters, stop strings, the end of a sequence."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.models
from tokenizers import decoders

from baton.tokenizer import Detokenizer, Tokenizer
from baton.types import (
    FinishReason,
    GenerateOutput,
    OutputToken,
)
from services.router.text import TextStream

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


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Tokenizer:
    """As Llama 2's and Mistral's: words begin with a mark for their space, and a text's first space is not shown."""
    words = ["<unk>", "<s>", "\u2581The", "\u2581capital", "\u2581is", "\u2581Paris", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    made: Any = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [((1, 2, 3, 4), " Paris Paris!"), ((2, 3, 4, 7 + 0xC3), " Paris Paris!"), ((1,), "Paris Paris!"), ((), "Paris Paris!")],
    ids=["a prompt", "half a character", "its beginning alone", "none"],
)
def test_the_first_space_is_shown_after_a_prompt(sentencepiece: Tokenizer, prompt: tuple[int, ...], text: str) -> None:
    detokenizer = Detokenizer(sentencepiece, prompt=prompt)
    assert "".join(detokenizer.push([token_id]) for token_id in (5, 5, 6)) + detokenizer.flush() == text
    if prompt:
        assert sentencepiece.decode([*prompt, 5, 5, 6]).endswith(text)
