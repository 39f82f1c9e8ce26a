"""Who asks, how urgently and for how long: what the engine is told about a request beside its prompt."""

import dataclasses
import hashlib
import ipaddress
import math
import re
from typing import Any

from starlette.requests import Request

from tars_jax.errors import InvalidRequest


@dataclasses.dataclass(frozen=True)
class Terms:
    """How a request stands among others; see `tars_jax.engine.request.Request`."""

    client: str = ""
    priority: int = 0
    deadline: float | None = None  # seconds, time.monotonic()


def client_key(request: Request) -> str:
    """Who shares the engine fairly with others: an API key if the request carries one, else the address it comes from.

    A key is hashed at once: what is kept and logged does not open anything. The 64-bit networks of IPv6 count as one client each,
    because whoever has one address has all of them. Behind a trusted proxy the server has put the right address there already.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else ""
    if key := key or request.headers.get("x-api-key", "").strip():
        return "key:" + hashlib.sha256(key.encode()).hexdigest()[:32]
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket has no address
        return f"address:{host}"
    if isinstance(address, ipaddress.IPv6Address):
        return f"address:{address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64))}"
    return f"address:{address}"


def header_options(request: Request) -> dict[str, Any]:
    """The ``options`` that headers carry; a gateway can so overrule what a body says.

    Raises:
        InvalidRequest: a header that is no number.
    """
    options: dict[str, Any] = {}
    if (priority := request.headers.get("x-request-priority")) is not None:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", priority, re.ASCII):
            raise InvalidRequest(f"X-Request-Priority must be a whole number, got {priority!r}")
        options["priority"] = int(priority)
    if (timeout := request.headers.get("x-request-timeout")) is not None:
        options["timeout"] = _seconds(timeout)
    return options


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"X-Request-Timeout must be a number of seconds above 0, got {text!r}")
    return seconds
