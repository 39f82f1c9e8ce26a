"""What the command line writes: tables, sizes, times, wrapped text."""

import datetime
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB"))
_AGES = ((31_536_000, "year"), (2_592_000, "month"), (604_800, "week"), (86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, four blanks apart."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("    ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *rows))
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """Decimal units, as Ollama: 4.7 GB, 230 MB."""
    for unit, name in _SIZES:
        if count >= unit:
            value = count / unit
            return f"{value:.1f} {name}" if value < 10 and value != int(value) else f"{value:.0f} {name}"
    return f"{count} B"


def human_time(moment: datetime.datetime, now: datetime.datetime | None = None) -> str:
    """``3 days ago``, ``4 minutes from now``, ``Forever`` for what is beyond a lifetime."""
    seconds = ((now or datetime.datetime.now(datetime.UTC)) - moment).total_seconds()
    if seconds < -100 * 365 * 86_400:
        return "Forever"
    for unit, name in _AGES:
        if count := int(abs(seconds) / unit):
            return f"{count} {name}{'s' if count > 1 else ''} {'ago' if seconds > 0 else 'from now'}"
    return "Less than a second ago"


def human_duration(nanoseconds: int) -> str:
    """A duration as Go prints it: 1m2.5s, 130.079ms, 12µs."""
    seconds = nanoseconds / 1e9
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or name == "µs":
            minutes, rest = divmod(seconds, 60)
            shown = rest if name == "s" and minutes else seconds / unit
            return (f"{int(minutes)}m" if name == "s" and minutes else "") + f"{shown:.12g}{name}"
    raise AssertionError("microseconds take all that is left")


def timings(last: Mapping[str, Any]) -> str:
    """The measures of a final chunk, as ``ollama run --verbose`` prints them."""
    lines = [
        ("total duration", human_duration(last.get("total_duration", 0))),
        ("load duration", human_duration(last.get("load_duration", 0))),
    ]
    for label in ("prompt eval", "eval"):
        key = label.replace(" ", "_")
        count, nanoseconds = last.get(f"{key}_count", 0), last.get(f"{key}_duration", 0)
        lines.append((f"{label} count", f"{count} token(s)"))
        lines.append((f"{label} duration", human_duration(nanoseconds)))
        lines.append((f"{label} rate", f"{count / nanoseconds * 1e9 if nanoseconds else 0:.2f} tokens/s"))
    return "\n".join(f"{label + ':':<22}{value}" for label, value in lines)


def note(text: str, end: str = "\n") -> None:
    """To stderr: whatever is not the answer."""
    print(text, end=end, file=sys.stderr, flush=True)


class AnswerWriter:
    """Writes an answer as it comes; on a terminal, words are not broken at its edge."""

    def __init__(self, stream: TextIO | None = None, *, wraps: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._width = shutil.get_terminal_size().columns - 1 if wraps and self._stream.isatty() else 0
        self._column, self._word = 0, ""
        self._ends_line = True  # nothing was written, or a line break

    def write(self, text: str) -> None:
        if not text:
            return
        if not self._width:
            self._put(text)
            return
        for character in text:
            self._word += character
            if character.isspace():
                self._put_word()

    def end(self) -> None:
        """Write what is held back, and a line break unless there is one."""
        self._put_word()
        if not self._ends_line:
            self._put("\n")
        self._column = 0

    def _put_word(self) -> None:
        word, self._word = self._word, ""
        if self._column and self._column + len(word.rstrip()) > self._width:
            self._put("\n")
            self._column = 0
        self._column = 0 if word.endswith("\n") else self._column + len(word)
        self._put(word)

    def _put(self, text: str) -> None:
        if text:
            self._ends_line = text.endswith("\n")
            self._stream.write(text)
            self._stream.flush()
