"""Reading a request: who sends it, and its body, of which neither size nor time is without bound."""

from __future__ import annotations

import asyncio
import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from headprof.integrations.server.errors import ApiError
from headprof.utils.units import human_bytes


def check_key(request: Request, key: str | None) -> None:
    """
    Raises:
        ApiError: the request does not carry the server's key, or, where there is none, comes from a page of another
            site.
    """
    if key is None:
        _check_page(request)
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


def _check_page(request: Request) -> None:
    """Of a server for this machine alone, whose browser any page of the web can have ask it.

    Raises:
        ApiError: the request comes from such a page, or by a name that is not this machine's.
    """
    if not _is_here((request.scope.get("server") or ("",))[0]):
        return
    addresses = (request.headers.get(name) for name in ("host", "origin"))
    if not all(_is_here(address) for address in addresses if address is not None):
        raise ApiError(
            403,
            "This server asks for no key, so pages of other sites, and other names of it, are refused: start it with "
            "--api-key.",
            code="foreign_origin",
        )


def _is_here(address: str) -> bool:
    """Whether an address, a host with or without a port, or an origin is this machine, seen from itself."""
    try:
        if not any(mark in address for mark in "/[") and address.count(":") > 1:
            return ip_address(address).is_loopback
        name = urlsplit(address if "//" in address else f"//{address}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


async def read_data(request: Request, most: int, seconds: float) -> bytes:
    """All of a request's body.

    Args:
        request: of which nothing has been read.
        most: bytes that it may have.
        seconds: that it may take to come.

    Raises:
        ApiError: it is larger, or slower, or compressed, or the client has left in the middle.
    """
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        message = f"A body in the coding {coding[:40]!r} is not read: send it as it is."
        raise ApiError(415, message, code="unsupported_encoding")
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
