"""Text ↔ tokens, and chat messages → prompt, from a Hugging Face folder, without torch or transformers. Used by the router alone."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.sandbox
import tokenizers
import tokenizers.decoders

from baton.errors import InvalidRequest, ModelError, PromptTooLong

_MOST_CONTEXT = 24  # tokens of a prompt


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        """Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there (AutoTokenizer…save_pretrained)")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}") from error
        self._settings = read_settings(folder / "tokenizer_config.json")
        self._template = _chat_template(folder, self._settings)
        self._special_ids = {index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = self._tokenizer.get_vocab_size()
        self._longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        decoder: Any = self._tokenizer.decoder
        self._apart = isinstance(decoder, tokenizers.decoders.ByteLevel)  # a text's tokens are its bytes, and nothing else
        self._ascii: dict[int, str | None] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True, limit: int | None = None) -> list[int]:
        """Other threads run meanwhile. Raises InvalidRequest; PromptTooLong, at once, for a text that cannot be `limit` tokens or fewer."""
        if limit is not None and len(text) > limit * self._longest:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters; this model takes at most {limit} tokens, prompt and output together: shorten it",
                param="prompt",
            )
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # no Rust string can hold it
            raise InvalidRequest("the text is not valid Unicode: it has half of a surrogate pair", param="prompt") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """One token as text, as it shows in logprobs. Bytes of a split character become U+FFFD."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def alone(self, token_id: int) -> str | None:
        """What an ordinary token says wherever it stands; None where that depends on its neighbours."""
        if token_id not in self._ascii:
            text = self.token(token_id) if self._apart and token_id not in self._special_ids else ""
            self._ascii[token_id] = text if text and text.isascii() else None
        return self._ascii[token_id]

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling."""
        return self._tokenizer.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, extra: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt's text, special tokens included. Raises InvalidRequest where the template refuses the messages."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions, or add chat_template to tokenizer_config.json")
        special = {name: _text(self._settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **{**special, **(extra or {})})
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template cannot render these messages: {error}", param="messages") from error


class Detokenizer:
    """Turns a growing sequence of tokens into text, piece by piece; never emits half a character.

    Decodes a short window that starts at the last safe border: a token's text may depend on those before it (leading spaces, bytes of
    one character), and not on more. `prompt`: what comes before, whose text is not told. The first token of all has no leading space.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window = self._context(prompt)
        self._emitted = len(self._window)  # tokens of the window whose text is out

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain by these tokens."""
        if len(token_ids) == 1 and self._emitted == len(self._window) and (text := self._tokenizer.alone(token_ids[0])) is not None:
            self._window.clear()
            self._emitted = 0
            return text
        self._window += token_ids
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._new()
        self._emitted = len(self._window)
        return text

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """As much of a prompt's end as says something and begins with a whole character; nothing where that is not to be found."""
        for size in range(1, min(len(prompt), _MOST_CONTEXT) + 1):
            end = list(prompt[-size:])
            text = self._decode(end).rstrip("\ufffd")
            if text and "\ufffd" not in text:
                return end
        return []

    def _new(self) -> str:
        """What the window says beyond what is out."""
        before, now = self._decode(self._window[: self._emitted]), self._decode(self._window)
        told = before if now.startswith(before) else before.rstrip("\ufffd")  # a character that the prompt began is whole now
        return now[len(told) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where the file is missing. Raises ModelError."""
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download the model again") from error
    return cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}


def _text(token: object) -> str:
    """Special tokens are strings, or objects with a `content`."""
    if isinstance(token, dict):
        return str(cast("dict[str, Any]", token).get("content", ""))
    return token if isinstance(token, str) else ""


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> jinja2.Template | None:
    """chat_template.jinja wins over tokenizer_config.json; of several named templates, `default` is taken."""
    path = folder / "chat_template.jinja"
    source: Any = path.read_text() if path.is_file() else settings.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in cast("list[dict[str, str]]", source)}
        source = named.get("default") or next(iter(named.values()), None)
    if not source:
        return None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    untyped: Any = environment
    untyped.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    untyped.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{folder}: the chat template is not valid jinja: {error}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(spec: str) -> str:
    return datetime.datetime.now().strftime(spec)


def _tojson(value: object, indent: int | None = None) -> str:
    """As Hugging Face's: without HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
