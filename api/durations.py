"""Durations and times as Go writes them: ``"1h30m"``, RFC 3339 stamps, integer nanoseconds."""

import datetime
import math
import re

FOREVER = math.inf  # a keep_alive that never ends

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)", re.ASCII)
_LONGEST = 2.0**63 / 1e9  # seconds that fit Go's int64 nanoseconds, about 292 years


def parse_duration(text: str) -> float:
    """Seconds in a Go duration. Raises ValueError with the text of Go's ``time.ParseDuration``."""
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text[text.startswith("+") :])
    if rest == "0":
        return 0.0
    parts = list(_PART.finditer(rest))
    if not parts or "".join(part.group() for part in parts) != rest:
        raise ValueError(f'time: invalid duration "{text}"')
    return sign * sum(_part_seconds(part[1], part[2], text) for part in parts)


def _part_seconds(number: str, unit: str, text: str) -> float:
    if not unit:
        raise ValueError(f'time: missing unit in duration "{text}"')
    if unit not in _SECONDS:
        raise ValueError(f'time: unknown unit "{unit}" in duration "{text}"')
    return float(number) * _SECONDS[unit]


def keep_alive_seconds(seconds: float) -> float:
    """Ollama's rule: negative means forever, and so does what no clock can count."""
    return FOREVER if seconds < 0 or seconds >= _LONGEST else seconds


def nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def timestamp(moment: datetime.datetime | None = None) -> str:
    """RFC 3339 in UTC; now when no moment is given."""
    moment = moment or datetime.datetime.now(datetime.UTC)
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def expiry(seconds_left: float) -> str:
    """The stamp of a moment some seconds away; forever is 292 years, as Go clients know it."""
    now = datetime.datetime.now(datetime.UTC)
    return timestamp(now + datetime.timedelta(seconds=min(seconds_left, _LONGEST - 1)))
