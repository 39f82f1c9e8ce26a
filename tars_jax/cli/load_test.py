"""``tars bench serve``: many clients of a server."""

import asyncio
import contextlib
import json
import math
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated

import typer

from tars_jax.cli.output import note
from tars_jax.cli.progress import count_bar
from tars_jax.errors import TarsError

if TYPE_CHECKING:
    from rich.table import Table

    from tars_jax.load_test.client import Exchange
    from tars_jax.load_test.report import LoadReport
    from tars_jax.load_test.workload import Workload

_START_SECONDS = 60
_DEFAULT_REQUESTS = 64
_DEFAULT_CLIENTS = 16
_SERVE = "from tars_jax.cli import main; main()"


def serve(
    model: Annotated[str, typer.Option("--model", "-m", help="Model, by name.")],
    host: Annotated[str | None, typer.Option(help="The server; default OLLAMA_HOST, or one of its own when none answers.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start a server for the test, on a free port.")] = False,
    requests: Annotated[int | None, typer.Option(help=f"Requests; default {_DEFAULT_REQUESTS} when there is no --duration.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds during which requests are sent.")] = None,
    rate: Annotated[float, typer.Option(help="Arrivals a second (Poisson); inf: all at once, or as clients are free.")] = math.inf,
    clients: Annotated[
        int | None, typer.Option(help=f"Requests under way at once; default {_DEFAULT_CLIENTS}, or no limit with --rate.")
    ] = None,
    input_: Annotated[str, typer.Option("--input", help="Prompt tokens: 128, 32..512 (uniform) or lognormal:32..512.")] = "32..512",
    output: Annotated[str, typer.Option("--output", help="Answer tokens, likewise.")] = "32..256",
    shared_prefix: Annotated[int, typer.Option(help="Tokens before the prompt that requests have in common.")] = 0,
    prefixes: Annotated[int, typer.Option(help="Different ones of these.")] = 1,
    api_keys: Annotated[int, typer.Option(help="API keys the requests are spread over.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 0.8,
    may_stop: Annotated[bool, typer.Option("--may-stop", help="Answers may end before the length that was drawn.")] = False,
    warmup: Annotated[int | None, typer.Option(min=0, help="Requests before those that are measured; default one a client.")] = None,
    goodput: Annotated[str, typer.Option(help="Milliseconds a good request keeps to: ttft:500,itl:100 (also tpot, e2e).")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds without a byte after which a request has failed.")] = 600.0,
    seed: Annotated[int | None, typer.Option(help="Of lengths, prompts and arrivals; default: drawn, so that no cache knows them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a server under load: throughput, time to first token, inter-token latency, goodput, errors."""
    from tars_jax.load_test.report import parse_goodput, summarize
    from tars_jax.load_test.workload import Lengths, Workload

    if requests is None and duration is None:
        requests = _DEFAULT_REQUESTS
    if clients is None and rate == math.inf:
        clients = _DEFAULT_CLIENTS
    workload = Workload(
        model=model,
        input=Lengths.parse(input_),
        output=Lengths.parse(output),
        requests=requests,
        seconds=duration,
        rate=rate,
        clients=clients,
        shared_prefix=shared_prefix,
        prefixes=prefixes,
        api_keys=api_keys,
        temperature=temperature,
        ignore_eos=not may_stop,
        seed=secrets.randbits(31) if seed is None else seed,
    )
    limits = parse_goodput(goodput)
    if warmup is None:
        warmup = min(clients or _DEFAULT_CLIENTS, requests or _DEFAULT_CLIENTS)
    with _server(host, start) as url:
        results = asyncio.run(_measure(url, workload, warmup, timeout))
    _show(summarize(results, limits), as_json)


def _show(report: "LoadReport", as_json: bool) -> None:
    errors = [f"{count} x {error}" for error, count in report.errors.items()]
    if as_json:
        print(json.dumps(report.as_json()))
    elif report.completed:
        from rich.console import Console

        Console().print(_table(report))
        for error in errors:
            note(error)
    if not report.completed:
        raise TarsError(f"no request was answered: {'; '.join(errors)}")


async def _measure(url: str, workload: "Workload", warmup: int, timeout: float) -> "list[Exchange]":
    from tars_jax.load_test.client import open_client, probe, send_all, warm_up

    async with open_client(url, timeout) as client:
        note(f"{workload.model} at {url}: loading and warming up ...")
        tokens_per_word = await probe(client, workload)
        await warm_up(client, workload, tokens_per_word, warmup)
        with count_bar("requests", workload.requests) as progress:
            return await send_all(client, workload, tokens_per_word, progress)


@contextlib.contextmanager
def _server(host: str | None, start: bool) -> Iterator[str]:
    """The URL of the server that is meant; one that is started for the test ends with it."""
    from api.settings import Settings, parse_host
    from tars_jax.cli.backends import find_server

    settings = Settings.from_environ()
    if host is not None and start:
        raise TarsError("--host names a server that runs already; leave out one of --host and --start")
    if host is not None:
        yield parse_host(host).url
    elif not start and (found := find_server(settings)):
        found.close()
        yield settings.address.url
    else:
        with started_server() as url:
            yield url


@contextlib.contextmanager
def started_server() -> Iterator[str]:
    """A server process of this program on a free port of loopback.

    Raises:
        TarsError: it does not start, with what it wrote.
    """
    command = [sys.executable, "-c", _SERVE, "serve", "--host", "127.0.0.1", "--port", "0"]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with us however we end
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            signal.signal(signal.SIGTERM, before)


def _address(process: "subprocess.Popen[bytes]", log: IO[str]) -> str:
    """The URL a starting server names in its log."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        log.seek(0)
        if match := re.search(r"TARS listens on (\S+)", log.read()):
            return match[1]
        time.sleep(0.05)
    log.seek(0)
    raise TarsError(f"the server did not start: {log.read().strip() or 'it said nothing'}")


_LABELS = {
    "ttft": "time to first token, ms",
    "itl": "inter-token latency, ms",
    "tpot": "time per output token, ms",
    "e2e": "end to end, ms",
}


def _table(report: "LoadReport") -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="dim")
    table.add_column()
    for column in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")

    def row(label: str, *values: float, digits: int = 1) -> None:
        table.add_row(label, *(f"{value:,.{digits}f}" for value in values))

    row("seconds", report.seconds)
    row("requests completed", report.completed, digits=0)
    row("requests failed", report.failed, digits=0)
    row("prompt tokens", report.prompt_tokens, digits=0)
    row("output tokens", report.output_tokens, digits=0)
    row("requests/s", report.per_second(report.completed), digits=2)
    if report.good is not None:
        row("goodput, requests/s", report.per_second(report.good), digits=2)
    row("output tokens/s", report.per_second(report.output_tokens))
    row("total tokens/s", report.per_second(report.output_tokens + report.prompt_tokens))
    for name, label in _LABELS.items():
        latency = report.latencies[name]
        row(label, latency.mean, *latency.percentiles.values(), latency.max)
    return table
