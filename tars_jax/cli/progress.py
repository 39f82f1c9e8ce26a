"""Progress of pulls, on stderr: bars on a terminal, a line a status elsewhere."""

import sys
from collections.abc import Iterable, Mapping
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
