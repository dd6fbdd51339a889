"""TextStream: a sequence's tokens become its text, piece by piece, until a stop string, a stop id or the end."""

import dataclasses
from collections.abc import Sequence

from baton.tokenizer import Detokenizer, Tokenizer
from baton.types import FinishReason, GenerateOutput, OutputToken


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What one output added. Text may lag behind tokens: half a character, or what may become a stop string, is held back."""

    text: str
    tokens: tuple[OutputToken, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string, or the id from stop_token_ids, that ended it


class TextStream:
    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
        min_tokens: int,
        eos: frozenset[int],
        prompt: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, prompt=prompt)
        self._stop, self._include_stop, self._min_tokens, self._eos = tuple(stop), include_stop, min_tokens, eos
        self._held = ""
        self._count = 0

    def push(self, output: GenerateOutput) -> Piece:
        if not self._stop and output.finish_reason is None and len(output.tokens) == 1:  # nearly always; nothing is held back then
            self._count += 1
            return Piece(self._detokenizer.push([output.tokens[0].token_id]), output.tokens)
        text = ""
        for index, token in enumerate(output.tokens):
            self._count += 1
            is_last = index == len(output.tokens) - 1
            if not (is_last and output.stop_token_id is not None and not self._include_stop):
                self._held += self._detokenizer.push([token.token_id])
            if is_last and output.finish_reason is not None:
                self._held += self._detokenizer.flush()
            hit = self._find_stop() if self._count > self._min_tokens else None
            if hit is not None:
                end, string = hit
                return Piece(text + self._held[:end], output.tokens[: index + 1], FinishReason.STOP, string)
            keep = 0 if output.finish_reason is not None and is_last else self._num_undecided()
            cut = len(self._held) - keep
            text, self._held = text + self._held[:cut], self._held[cut:]
        if not output.tokens and output.finish_reason is not None:
            text, self._held = self._held + self._detokenizer.flush(), ""
        named = output.stop_token_id if output.stop_token_id not in self._eos else None
        return Piece(text, output.tokens, output.finish_reason, named)

    def _find_stop(self) -> tuple[int, str] | None:
        """Where the text ends, and the stop string that comes first in what is held."""
        found = [(at, string) for string in self._stop if (at := self._held.find(string)) >= 0]
        if not found:
            return None
        at, string = min(found)
        return (at + len(string) if self._include_stop else at), string

    def _num_undecided(self) -> int:
        """Length of the longest tail that may be the beginning of a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(string.startswith(tail) for string in self._stop):
                return size
        return 0
