"""What makes a router's streams cheap, and that none of it changes what a client reads."""

import random
from pathlib import Path

import pytest

from baton.errors import WorkerLost
from baton.rpc.v1 import common_pb2, decode_pb2
from baton.tokenizer import Detokenizer, Tokenizer
from services.router.sessions import _Inbox


def response(*token_ids: int, prefill: str | None = None, finish: int = 0) -> decode_pb2.GenerateResponse:
    output = common_pb2.SequenceOutput(tokens=[common_pb2.OutputToken(token_id=i) for i in token_ids], finish_reason=finish)  # type: ignore[arg-type]
    news = None if prefill is None else decode_pb2.PrefillDecision(prefill_id=prefill, reason="because")
    return decode_pb2.GenerateResponse(output=output, prefill=news)


async def test_what_has_piled_up_is_one_response_up_to_news_of_a_prefill_and_to_a_failure() -> None:
    inbox = _Inbox()
    for each in (response(1, prefill="p"), response(2), response(3, 4), response(5, prefill=""), response(6)):
        inbox.put(each)
    inbox.put(WorkerLost("gone"))
    first, second = await inbox.take(), await inbox.take()
    assert [token.token_id for token in first.output.tokens] == [1, 2, 3, 4]
    assert first.prefill.prefill_id == "p"
    assert [token.token_id for token in second.output.tokens] == [5, 6]
    assert second.prefill.prefill_id == ""
    with pytest.raises(WorkerLost):
        await inbox.take()


async def test_the_end_is_part_of_what_has_piled_up() -> None:
    inbox = _Inbox()
    inbox.put(response(1))
    inbox.put(response(2, finish=common_pb2.FINISH_REASON_LENGTH))
    assert (await inbox.take()).output.finish_reason == common_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("text", ["plain words, 123", "naïve – 日本語 🙂 done", "🙂🙂", "a🙂b"])
def test_tokens_one_by_one_give_the_text_of_all(demo_model: Path, text: str) -> None:
    tokenizer = Tokenizer(demo_model)
    ids, detokenizer = tokenizer.encode(text, add_special_tokens=False), Detokenizer(tokenizer)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == text
    assert tokenizer.alone(tokenizer.encode("a", add_special_tokens=False)[0]) == "a"


def test_any_tokens_give_what_decoding_them_together_gives(demo_model: Path) -> None:
    tokenizer, draw = Tokenizer(demo_model), random.Random(0)
    for _ in range(200):
        ids, detokenizer = draw.choices(range(tokenizer.vocab_size), k=20), Detokenizer(tokenizer)
        assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == tokenizer.decode(ids)
