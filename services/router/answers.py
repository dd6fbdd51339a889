"""What clients get: OpenAI's response bodies and stream chunks, made from `Choice`s and `Piece`s."""

import json
import time
from collections.abc import Sequence
from typing import Any

from baton.tokenizer import Tokenizer
from baton.types import OutputToken, TokenLogprobs
from services.router.generation import Ask, Choice
from services.router.text import Piece

Json = dict[str, Any]
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Answers:
    """One request's answers. `kind` is text_completion or chat.completion."""

    def __init__(self, kind: str, request_id: str, model: str, tokenizer: Tokenizer, asks: Sequence[Ask], *, token_ids: bool) -> None:
        self._kind, self._id, self._model, self._tokenizer = kind, request_id, model, tokenizer
        self._asks, self._token_ids, self._created = asks, token_ids, int(time.time())
        self._chat = kind == "chat.completion"
        self._head = to_json(self._frame(self._chunk_kind))[:-1] + ',"choices":[{"index":'  # of each chunk's JSON

    def whole(self, choices: Sequence[Choice], *, echo: bool = False, silent: bool = False) -> Json:
        """The body of an answer that is not streamed. `silent`: what was generated was not asked for (max_tokens 0 with echo)."""
        body = self._frame(self._kind)
        body["choices"] = [self._choice(choice, echo=echo, silent=silent) for choice in sorted(choices, key=lambda c: c.index)]
        body["usage"] = self.usage(choices, silent=silent)
        return body

    def line(self, choice: Choice, piece: Piece, *, echo: bool = False) -> str | None:
        """`chunk` as JSON: for a piece in the midst of a sequence, which nearly all are, without making objects of it first."""
        if piece is choice.pieces[0] or piece.finish_reason is not None or self._wants_logprobs(choice):
            chunk = self.chunk(choice, piece, echo=echo)
            return None if chunk is None else to_json(chunk)
        if not piece.text and not self._token_ids:
            return None
        text = to_json(piece.text)
        told = f'"delta":{{"content":{text}}}' if self._chat else f'"text":{text}'
        ids = f',"token_ids":[{",".join([str(token.token_id) for token in piece.tokens])}]' if self._token_ids else ""
        return f'{self._head}{choice.index},"finish_reason":null,{told},"logprobs":null{ids}}}]}}'

    def chunk(self, choice: Choice, piece: Piece, *, echo: bool = False) -> Json | None:
        """A chunk of the stream; None where a piece has nothing to tell yet. A sequence's first chunk carries its first token."""
        first = piece is choice.pieces[0]  # more may have come before this one is told
        if not (
            piece.text or first or piece.finish_reason is not None or self._token_ids or (piece.tokens and self._wants_logprobs(choice))
        ):
            return None
        text = piece.text
        if echo and first:
            text = self._tokenizer.decode(self._ask(choice).prompt_token_ids) + text
        entry: Json = {"index": choice.index, "finish_reason": None if piece.finish_reason is None else str(piece.finish_reason)}
        if self._chat:
            entry["delta"] = {"role": "assistant", "content": text} if first else {"content": text}
        else:
            entry["text"] = text
        entry["logprobs"] = self._logprobs(choice, piece.tokens) if self._wants_logprobs(choice) else None
        if piece.finish_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        if self._token_ids:
            entry["token_ids"] = [token.token_id for token in piece.tokens]
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

    def usage(self, choices: Sequence[Choice], *, silent: bool = False) -> Json:
        """Tokens of all prompts and sequences; cached ones are those that the first sequence of each prompt found."""
        prompt = sum(len(ask.prompt_token_ids) for ask in self._asks)
        completion = 0 if silent else sum(choice.num_tokens for choice in choices)
        firsts = [choice for choice in choices if choice.index % self._asks[0].n == 0]
        cached = sum(choice.cache.num_cached_tokens for choice in firsts if choice.cache)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _choice(self, choice: Choice, *, echo: bool, silent: bool) -> Json:
        ask = self._ask(choice)
        tokens = () if silent else tuple(token for piece in choice.pieces for token in piece.tokens)
        text = "" if silent else choice.text
        entry: Json = {"index": choice.index, "finish_reason": "length" if silent else str(choice.finish_reason)}
        if self._chat:
            entry["message"] = {"role": "assistant", "content": text}
        else:
            entry["text"] = self._tokenizer.decode(ask.prompt_token_ids) + text if echo else text
        entry["logprobs"] = self._logprobs(choice, tokens, echo=echo) if self._wants_logprobs(choice) else None
        entry["stop_reason"] = choice.stop_reason
        if self._token_ids:
            entry["token_ids"] = [token.token_id for token in tokens]
            entry["prompt_token_ids"] = list(ask.prompt_token_ids)
        if choice.prompt_logprobs and not echo:
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
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
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

    def _ask(self, choice: Choice) -> Ask:
        return self._asks[choice.index // self._asks[0].n]

    def _wants_logprobs(self, choice: Choice) -> bool:
        return self._ask(choice).sampling.logprobs is not None


def error_body(message: str, code: str, status: int, param: str | None = None) -> Json:
    """OpenAI's error object."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
