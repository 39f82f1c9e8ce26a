"""Progress of pulls and loads, on stderr: bars on a terminal; elsewhere a line a status for a pull, nothing for a load."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tars_jax.errors import PullError


def show_pull(events: Iterable[Mapping[str, Any]]) -> None:
    """Follow a pull to its end.

    Raises:
        PullError: an event is an error.
    """
    if sys.stderr.isatty():
        _bars(events)
        return
    last = ""
    for event in events:
        if (status := _status(event)) != last:
            print(status, file=sys.stderr, flush=True)
            last = status


def _status(event: Mapping[str, Any]) -> str:
    if "error" in event:
        raise PullError(str(event["error"]))
    return str(event.get("status", ""))


def _bars(events: Iterable[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}
        for event in events:
            status = _status(event)
            if "total" not in event:
                bars.console.print(status, markup=False, highlight=False)
                continue
            if status not in tasks:
                tasks[status] = bars.add_task(status, total=event["total"])
            bars.update(tasks[status], completed=event.get("completed", 0))


@contextlib.contextmanager
def load_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar that goes when its work is done, to be fed (bytes done, bytes in all); None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def share_bar(label: str) -> Iterator[Callable[[float, str], None]]:
    """A bar to be fed the share that is done and what to say about it; where there is no terminal, a line for every new text."""
    if not sys.stderr.isatty():
        said = [label]

        def say(_: float, text: str) -> None:
            if text != said[-1]:
                print(text, file=sys.stderr, flush=True)
                said.append(text)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=1.0)
        yield lambda share, text: bars.update(task, completed=min(max(share, 0.0), 1.0), description=text)


@contextlib.contextmanager
def count_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar that counts to ``total``, or on and on; to be fed the count. Nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bars:
        task = bars.add_task(label, total=total)
        yield lambda done: bars.update(task, completed=done)
