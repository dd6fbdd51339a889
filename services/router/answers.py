"""What clients get: OpenAI's response bodies and stream chunks, made from `Choice`s and `Piece`s."""

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from baton.tokenizer import Tokenizer
from baton.types import FinishReason, OutputToken, TokenLogprobs
from services.router.generation import Ask, Choice
from services.router.openai import ChatBody, CompletionBody
from services.router.text import Piece

Json = dict[str, Any]
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Answers:
    """One request's answers."""

    def __init__(self, body: ChatBody | CompletionBody, request_id: str, model: str, tokenizer: Tokenizer, asks: Sequence[Ask]) -> None:
        self._id, self._model, self._tokenizer, self._asks = request_id, model, tokenizer, asks
        self._kind, self._chat, self._created = body.kind, body.kind == ChatBody.kind, int(time.time())
        self._token_ids, self._echo, self._silent = body.return_token_ids, body.echo, body.silent
        self._told = dict.fromkeys(range(sum(ask.n for ask in asks)), 0)  # of each sequence: characters whose logprobs were streamed
        self._head = to_json(self._frame(self._chunk_kind))[:-1] + ',"choices":[{"index":'  # of each chunk's JSON

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The body of an answer that is not streamed."""
        body = self._frame(self._kind)
        body["choices"] = [self._choice(choice) for choice in sorted(choices, key=lambda c: c.index)]
        body["usage"] = self.usage(choices)
        return body

    def line(self, choice: Choice, piece: Piece) -> str | None:
        """`chunk` as JSON: for a piece in the midst of a sequence, which nearly all are, without making objects of it first."""
        if piece is choice.pieces[0] or piece.finish_reason is not None or self._wants_logprobs(choice):
            chunk = self.chunk(choice, piece)
            return None if chunk is None else to_json(chunk)
        if not piece.text and not self._token_ids:
            return None
        text = to_json(piece.text)
        told = f'"delta":{{"content":{text}}}' if self._chat else f'"text":{text}'
        ids = f',"token_ids":[{",".join([str(token.token_id) for token in piece.tokens])}]' if self._token_ids else ""
        return f'{self._head}{choice.index},"finish_reason":null,{told},"logprobs":null{ids}}}]}}'

    def chunk(self, choice: Choice, piece: Piece) -> Json | None:
        """A chunk of the stream; None where a piece has nothing to tell yet. A sequence's first chunk carries its first token."""
        first = piece is choice.pieces[0]  # more may have come before this one is told
        if not (
            piece.text or first or piece.finish_reason is not None or self._token_ids or (piece.tokens and self._wants_logprobs(choice))
        ):
            return None
        text, tokens = ("", ()) if self._silent else (piece.text, piece.tokens)
        echo = self._echo and first
        if echo:
            text = self._prompt(choice) + text
        entry: Json = {"index": choice.index, "finish_reason": self._reason(piece.finish_reason)}
        if self._chat:
            entry["delta"] = {"role": "assistant", "content": text} if first else {"content": text}
        else:
            entry["text"] = text
        entry["logprobs"] = self._logprobs(choice, tokens, echo=echo) if self._wants_logprobs(choice) else None
        if piece.finish_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        if self._token_ids:
            entry["token_ids"] = [token.token_id for token in tokens]
            if first:
                entry["prompt_token_ids"] = list(self._ask(choice).prompt_token_ids)
        body = self._frame(self._chunk_kind)
        body["choices"] = [entry]
        if piece.finish_reason is not None:
            body["baton"] = {"route": str(choice.route), "moves": choice.route.moves}
        return body

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        body = self._frame(self._chunk_kind)
        return body | {"choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens of all prompts and sequences; cached ones are those that the first sequence of each prompt found."""
        prompt = sum(len(ask.prompt_token_ids) for ask in self._asks)
        completion = 0 if self._silent else sum(choice.num_tokens for choice in choices)
        firsts = [choice for choice in choices if choice.index % self._asks[0].n == 0]
        cached = sum(choice.cache.num_cached_tokens for choice in firsts if choice.cache)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _choice(self, choice: Choice) -> Json:
        ask = self._ask(choice)
        tokens = () if self._silent else tuple(token for piece in choice.pieces for token in piece.tokens)
        text = "" if self._silent else choice.text
        entry: Json = {"index": choice.index, "finish_reason": self._reason(choice.finish_reason)}
        if self._chat:
            entry["message"] = {"role": "assistant", "content": text}
        else:
            entry["text"] = self._prompt(choice) + text if self._echo else text
        entry["logprobs"] = self._logprobs(choice, tokens, echo=self._echo) if self._wants_logprobs(choice) else None
        entry["stop_reason"] = choice.stop_reason
        if self._token_ids:
            entry["token_ids"] = [token.token_id for token in tokens]
            entry["prompt_token_ids"] = list(ask.prompt_token_ids)
        if choice.prompt_logprobs and not self._echo:
            entry["prompt_logprobs"] = [
                None if item is None else self._prompt_entry(token_id, item)
                for token_id, item in zip(ask.prompt_token_ids, choice.prompt_logprobs, strict=True)
            ]
        return entry

    def _prompt_entry(self, token_id: int, item: TokenLogprobs) -> Json:
        entries = {token_id: (item.logprob, item.rank)}
        for rank, (other, logprob) in enumerate(item.top, 1):
            entries.setdefault(other, (logprob, rank))
        return {
            str(key): {"logprob": logprob, "rank": rank, "decoded_token": self._tokenizer.token(key)}
            for key, (logprob, rank) in entries.items()
        }

    def _logprobs(self, choice: Choice, tokens: Sequence[OutputToken], *, echo: bool = False) -> Json:
        if self._chat:
            return {"content": [self._chat_logprob(token) for token in tokens]}
        pairs: list[tuple[int, TokenLogprobs | None]] = [(token.token_id, token.logprobs) for token in tokens]
        if echo:
            pairs = [*zip(self._ask(choice).prompt_token_ids, choice.prompt_logprobs, strict=True), *pairs]
        texts = [self._tokenizer.token(token_id) for token_id, _ in pairs]
        offsets = list(itertools.accumulate(map(len, texts), initial=self._told[choice.index]))
        self._told[choice.index] = offsets[-1]
        return {
            "tokens": texts,
            "token_logprobs": [None if item is None else item.logprob for _, item in pairs],
            "top_logprobs": [None if item is None else self._top(token_id, item) for token_id, item in pairs],
            "text_offset": offsets[:-1],
        }

    def _top(self, token_id: int, item: TokenLogprobs) -> Json:
        top = {self._tokenizer.token(other): logprob for other, logprob in item.top}
        top.setdefault(self._tokenizer.token(token_id), item.logprob)
        return top

    def _chat_logprob(self, token: OutputToken) -> Json:
        assert token.logprobs is not None
        entry = self._spelled(token.token_id, token.logprobs.logprob)
        return entry | {"top_logprobs": [self._spelled(other, logprob) for other, logprob in token.logprobs.top]}

    def _spelled(self, token_id: int, logprob: float) -> Json:
        text = self._tokenizer.token(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _frame(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    @property
    def _chunk_kind(self) -> str:
        return self._kind + ".chunk" if self._chat else self._kind

    def _prompt(self, choice: Choice) -> str:
        return self._tokenizer.decode(self._ask(choice).prompt_token_ids)

    def _reason(self, reason: FinishReason | None) -> str | None:
        return None if reason is None else str(FinishReason.LENGTH if self._silent else reason)

    def _ask(self, choice: Choice) -> Ask:
        return self._asks[choice.index // self._asks[0].n]

    def _wants_logprobs(self, choice: Choice) -> bool:
        return self._ask(choice).sampling.logprobs is not None


def error_body(message: str, code: str, status: int, param: str | None = None) -> Json:
    """OpenAI's error object."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
