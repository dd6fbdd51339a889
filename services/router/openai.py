"""What clients send: OpenAI's request bodies with vLLM's extensions, checked, and turned into `Ask`s. A null is as if it was not sent.
Fields that would change the answer and are not served are refused; others that are unknown are tolerated."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from baton.errors import InvalidRequest
from baton.tokenizer import Tokenizer
from baton.types import SamplingParams
from services.router.generation import Ask, allowance

MAX_LOGPROBS = 20
MAX_N = 64
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI's; null: as many as fit
_TIERS = {"priority": -1, "default": 0, "flex": 1}  # auto and scale: as the tenant has it
_NOT_SERVED = frozenset(
    {
        *("tools", "functions", "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("web_search_options", "audio", "documents", "chat_template", "suffix", "best_of", "use_beam_search", "bad_words"),
        *("allowed_token_ids", "truncate_prompt_tokens", "logits_processors", "prompt_embeds"),
    }
)
B = TypeVar("B", bound=BaseModel)


class _Sent(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: object) -> object:
        """Of a completion, null for max_tokens is all that fits, and nothing is its default."""
        if not isinstance(sent, dict):
            return sent
        fields = cast("dict[str, Any]", sent)
        return {name: value for name, value in fields.items() if value is not None or name == "max_tokens"}


class _Body(_Sent):
    kind: ClassVar[str] = "text_completion"  # of the answer
    asks_with: ClassVar[str] = "prompt"  # the field
    operation: ClassVar[str] = "text_completion"

    model: str | None = None
    stream: bool = False
    stream_options: "StreamOptions | None" = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int | None = Field(default=None, ge=0)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: dict[int, float] | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    cache_salt: str = ""
    priority: int | None = None  # vLLM's: lower is served earlier
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None  # OpenAI's

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """Every text has it."""
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("a stop string must not be empty; leave it out")
        return stop

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """`defaults` are the model's generation_config.json."""
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed; leave out one of the two", param="prompt_logprobs")
        if (self.min_tokens or 0) > max_tokens:
            raise InvalidRequest(f"min_tokens must be at most max_tokens ({max_tokens}), not {self.min_tokens}", param="min_tokens")

        def pick(name: str, fallback: float) -> Any:
            value = getattr(self, name)
            return value if value is not None else defaults.get(name) if defaults.get(name) is not None else fallback

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=pick("temperature", 1.0),
            top_k=max(pick("top_k", 0), 0),
            top_p=pick("top_p", 1.0),
            min_p=pick("min_p", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    @property
    def urgency(self) -> int | None:
        """The priority it asks for, if any."""
        tier = None if self.service_tier is None else _TIERS.get(self.service_tier)
        return tier if self.priority is None else self.priority

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def ask(self, request_id: str, token_ids: list[int], sampling: SamplingParams) -> Ask:
        return Ask(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            seed=self.seed,
            n=self.n or 1,
            stop=self.stops,
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            salt=self.cache_salt,
            operation=self.operation,
        )


class StreamOptions(_Sent):
    include_usage: bool = False


class CompletionBody(_Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def silent(self) -> bool:
        """What is generated was not asked for."""
        return self.max_tokens == 0

    def prompts(self, tokenizer: Tokenizer, max_model_len: int) -> list[list[int]]:
        """Each prompt as tokens."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        several = cast("list[str | list[int]]", prompt)
        if not several:
            raise InvalidRequest("prompt is empty; send text, token ids, or a list of either", param="prompt")
        return [
            tokenizer.encode(each, add_special_tokens=self.add_special_tokens, limit=max_model_len) if isinstance(each, str) else each
            for each in several
        ]

    def asks(self, request_id: str, prompts: list[list[int]], defaults: Mapping[str, Any], max_model_len: int) -> list[Ask]:
        """Of prompts that are known to fit."""
        if self.silent and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1, unless echo is set", param="max_tokens")
        asked = None if self.max_tokens is None else max(self.max_tokens, 1)
        default = None if "max_tokens" in self.model_fields_set else _DEFAULT_TOKENS
        prompt_logprobs = self.logprobs if self.echo else self.prompt_logprobs
        asks: list[Ask] = []
        for place, ids in enumerate(prompts):
            most = allowance(asked, len(ids), max_model_len, default)
            asks.append(self.ask(f"{request_id}-{place}", ids, self.sampling(defaults, most, self.logprobs, prompt_logprobs)))
        return asks


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        """Or calls tools, where it is an answer of before."""
        extra = self.model_extra or {}
        if self.content is None and not (self.role == "assistant" and (extra.get("tool_calls") or extra.get("function_call"))):
            raise ValueError("content is missing; send text, or a list of text parts")
        return self

    def for_template(self) -> dict[str, Any]:
        message = self.model_dump()
        if isinstance(self.content, list):
            parts = [part for part in self.content if part.get("type") != "text"]
            if parts:
                raise InvalidRequest(f"this model takes text only, not content parts of type {parts[0].get('type')!r}", param="messages")
            message["content"] = "\n".join(str(part.get("text", "")) for part in self.content)
        return {**{key: value for key, value in message.items() if value is not None}, "content": message["content"] or ""}


class ChatBody(_Body):
    kind: ClassVar[str] = "chat.completion"
    asks_with: ClassVar[str] = "messages"
    operation: ClassVar[str] = "chat"
    echo: ClassVar[bool] = False
    silent: ClassVar[bool] = False
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])

    def prompts(self, tokenizer: Tokenizer, max_model_len: int) -> list[list[int]]:
        """The one that the messages make."""
        messages = [message.for_template() for message in self.messages]
        text = tokenizer.render_chat(messages, add_generation_prompt=self.add_generation_prompt, extra=self.chat_template_kwargs)
        if self.continue_final_message:
            text = self._open_ended(text, messages[-1]["content"])
        return [tokenizer.encode(text, add_special_tokens=False, limit=max_model_len)]

    def _open_ended(self, text: str, last: str) -> str:
        """The prompt up to where the last message's content ends, so that the answer goes on with it."""
        if self.add_generation_prompt:
            raise InvalidRequest("continue_final_message needs add_generation_prompt=false", param="continue_final_message")
        for content in (last, last.strip()):  # templates may strip it
            if content and content in text:
                return text[: text.rindex(content) + len(content)]
        raise InvalidRequest("the last message has no content that could be continued", param="continue_final_message")

    def asks(self, request_id: str, prompts: list[list[int]], defaults: Mapping[str, Any], max_model_len: int) -> list[Ask]:
        """Of the prompt, which is known to fit."""
        (prompt,) = prompts
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
        most = allowance(self.max_completion_tokens or self.max_tokens, len(prompt), max_model_len)
        sampling = self.sampling(defaults, most, (self.top_logprobs or 0) if self.logprobs else None, self.prompt_logprobs)
        return [self.ask(request_id, prompt, sampling)]


class TokenizeBody(_Sent):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        if self.prompt is not None:
            return tokenizer.encode(self.prompt, add_special_tokens=self.add_special_tokens)
        messages = [message.for_template() for message in self.messages or ()]
        text = tokenizer.render_chat(messages, add_generation_prompt=self.add_generation_prompt)
        return tokenizer.encode(text, add_special_tokens=False)


class DetokenizeBody(BaseModel):
    model: str | None = None
    tokens: list[int]


def parse(cls: type[B], body: object) -> B:
    """Raises InvalidRequest that names the first wrong field."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    if issubclass(cls, _Body):
        _refuse_not_served(cast("dict[str, Any]", body))
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{where}: {first['msg'].removeprefix('Value error, ')}", param=field) from error


def _refuse_not_served(body: Mapping[str, Any]) -> None:
    """Better no answer than another one than was asked for. What asks for nothing is as if it was not sent."""
    for name in sorted(_NOT_SERVED & body.keys()):
        value = body[name]
        nothing = (
            not value
            or (name in ("tools", "functions") and body.get({"tools": "tool_choice", "functions": "function_call"}[name]) == "none")
            or (name == "response_format" and value == {"type": "text"})
            or (name == "best_of" and value == (body.get("n") or 1))
        )
        if not nothing:
            raise InvalidRequest(f"{name} is not supported here; leave it out", param=name)
