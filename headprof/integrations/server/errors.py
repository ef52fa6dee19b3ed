"""What goes wrong with a request, in the form that clients of OpenAI's interface know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headprof.errors import HeadprofError

INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 408: "timeout_error", 504: "timeout_error"}


class ApiError(HeadprofError):
    """A request that is not served.

    Args:
        status: of the HTTP response.
        message: one sentence with the mend.
        param: the request's field that is to blame, if one is.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else INVALID)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """What to answer when this came of a request: what a user can mend is told, anything else is not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HeadprofError):
        return ApiError(400, str(error), code="refused")
    return ApiError(500, "The server failed at this request: its log says how.", code="internal_error")


def too_long(tokens: int, new_tokens: int, most: int, model: str, param: str) -> ApiError:
    """For a prompt and an answer that have no room in the model's context."""
    return ApiError(
        400,
        f"The prompt of {tokens} tokens and {new_tokens} new ones exceed the {most} that {model} can read: shorten the "
        "prompt or lower max_tokens.",
        param=param,
        code="context_length_exceeded",
    )


def about_to_end() -> ApiError:
    """For what comes, or is under way, when the server ends."""
    return ApiError(503, "The server is about to end: ask again when it is back.", code="shutting_down")
