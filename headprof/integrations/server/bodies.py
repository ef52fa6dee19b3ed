"""The bodies of requests: what may be asked, and what is refused, since it would be answered otherwise than asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from headprof.compression.generation import check_temperature
from headprof.errors import UsageError
from headprof.integrations.server.errors import ApiError
from headprof.utils.files import without_lone_surrogates
from headprof.utils.records import is_text, parse_object, plain

_MOST = 2**31 - 1
_COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many, as in OpenAI's own interface."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Parameters that are not served, and the values with which they ask for nothing."""
_WITHOUT_EFFECT = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Parameters that say nothing of the answer."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _joined_parts(content: Any) -> Any:
    """A message's text, which may come in parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError("parts of a message must be of type text")
        texts.append(text)
    return "".join(texts)


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    _joined = field_validator("content", mode="before")(_joined_parts)

    @property
    def turn(self) -> tuple[str, str]:
        """Role and text, as chat templates know them."""
        return ("system" if self.role == "developer" else self.role), self.content


class StreamOptions(_Body):
    include_usage: bool = False


class Asking(_Body):
    """What requests for an answer have in common."""

    model: str
    document: str | Literal[False] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @field_validator("document", mode="before")
    @classmethod
    def _named(cls, document: Any) -> Any:
        if not isinstance(document, str) and document is not False:
            raise ValueError("it is the id of a document, or false for none")
        return document

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("temperature")
    @classmethod
    def _divisible(cls, temperature: float) -> float:
        try:
            check_temperature(temperature)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return temperature

    @model_validator(mode="after")
    def _streams(self) -> Asking:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for answers that are streamed: leave them away, or add stream")
        return self

    @property
    def most_new_tokens(self) -> int | None:
        """Most tokens of the answer; `None` where the request does not say."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; `None` for no log-probabilities at all."""
        raise NotImplementedError


class ChatBody(Asking):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are told beside logprobs: add logprobs, or leave them away")
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same: leave one of them away")
        return self

    @property
    def most_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Asking):
    """Of `/v1/completions`."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _single(cls, prompt: Any) -> Any:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt

    @property
    def most_new_tokens(self) -> int | None:
        return self.max_tokens or _COMPLETION_TOKENS

    @property
    def wants_logprobs(self) -> int | None:
        return self.logprobs


class DocumentBody(_Body):
    """Of `/v1/documents`."""

    id: str
    text: Annotated[str, Field(min_length=1)]


Body = TypeVar("Body", bound=BaseModel)


def read_body(kind: type[Body], data: bytes) -> Body:
    """A request's body.

    Args:
        kind: what it should be.
        data: as it came.

    Raises:
        ApiError: it is no JSON object, a field is missing or of the wrong type or out of range, or it asks for
            something that is not served.
    """
    try:
        values = parse_object(data)
    except ValueError as error:
        raise ApiError(
            400,
            f"The body cannot be read as JSON ({error}): send a JSON object in UTF-8 that gives each name once.",
            code="invalid_json",
        ) from None
    _require_text(values)
    given = {name: value for name, value in _without_nulls(values).items() if name not in _WITHOUT_EFFECT}
    for name in given.keys() - kind.model_fields.keys():
        _require_neutral(name, given[name])
    try:
        return kind.model_validate({name: given[name] for name in given.keys() & kind.model_fields.keys()})
    except ValidationError as error:
        raise _explained(error) from None


def _require_text(value: Any) -> None:
    """
    Raises:
        ApiError: there are halves of characters in it, as JSON's escapes can make.
    """
    if isinstance(value, dict):
        for each in (*value.keys(), *value.values()):
            _require_text(each)
    elif isinstance(value, list):
        for each in value:
            _require_text(each)
    elif isinstance(value, str) and not is_text(value):
        raise ApiError(400, "The body holds half a character (a lone surrogate): mend its text.", code="invalid_value")


def _without_nulls(value: Any) -> Any:
    """A value without the fields that are null, which say nothing: the `refusal` of an answer sent back, say."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _require_neutral(name: str, value: Any) -> None:
    """
    Raises:
        ApiError: a parameter that is not served asks for something.
    """
    accepted = _NEUTRAL.get(name, ())
    if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted):
        return
    only = f" with another value than {accepted[0]!r}" if accepted else ""
    shown = plain(name)
    raise ApiError(
        400, f"The parameter {shown} is not served{only}: leave it away.", param=shown, code="unsupported_parameter"
    )


def _explained(error: ValidationError) -> ApiError:
    """The first fault that pydantic found, as a sentence."""
    fault = error.errors(include_url=False, include_input=False)[0]
    param = without_lone_surrogates(".".join(str(part) for part in fault["loc"]))[:100] or None
    if fault["type"] == "missing":
        return ApiError(400, f"The parameter {param} is missing: add it.", param=param, code="missing_parameter")
    what = fault["msg"].removeprefix("Value error, ").replace(" after validation", "").rstrip(".")
    where = f"The parameter {param}" if param else "The body"
    return ApiError(400, f"{where} cannot be used ({what}): mend it.", param=param, code="invalid_value")
