"""Reading a request: its key, and its body, of which neither size nor time is without bound."""

from __future__ import annotations

import asyncio
import hmac

from starlette.requests import ClientDisconnect, Request

from headprof.integrations.server.errors import ApiError
from headprof.utils.units import human_bytes


def check_key(request: Request, key: str | None) -> None:
    """
    Raises:
        ApiError: the request does not carry the server's key.
    """
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    sent, own = given.strip().encode("latin-1"), key.strip().encode("utf-8", "surrogateescape")  # bytes as they came
    right = hmac.compare_digest(sent, own)
    if scheme.lower() != "bearer" or not right:
        raise ApiError(
            401,
            "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_data(request: Request, most: int, seconds: float) -> bytes:
    """All of a request's body.

    Args:
        request: of which nothing has been read.
        most: bytes that it may have.
        seconds: that it may take to come.

    Raises:
        ApiError: it is larger, or slower, or the client has left in the middle.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise _too_large(most)
    except TimeoutError:
        message = f"The body has not come within {seconds:g} seconds: send it faster, or raise --timeout."
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "The body ends too early: send all of it.", code="invalid_json") from None
    return bytes(data)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body has more than {human_bytes(most)}: send less, or raise --max-request-bytes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )
