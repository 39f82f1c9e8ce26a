"""Sending a workload and noting when things come back.

The load generator shares the machine with the server, so it does little: it counts lines where a token comes and reads only the last.
"""

import asyncio
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from tars_jax.errors import ModelNotFound, TarsError
from tars_jax.load_test.workload import Workload

PROBE_WORDS = 128
Progress = Callable[[int], None]  # hears how many requests have ended


@dataclasses.dataclass(slots=True)
class Exchange:
    """What became of one request. Times in seconds, time.perf_counter()."""

    sent: float
    ended: float = 0.0
    arrivals: list[float] = dataclasses.field(default_factory=list)  # of the lines that carry tokens
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent

    @property
    def latency(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in itertools.pairwise(self.arrivals)]

    @property
    def per_token(self) -> float | None:
        """Mean seconds of the tokens after the first; None when there are none."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1) if self.output_tokens > 1 and self.arrivals else None


def open_client(url: str, timeout: float) -> httpx.AsyncClient:
    """A client with as many connections as it needs. ``timeout``: seconds without a byte after which a request has failed."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False)


async def exchange(client: httpx.AsyncClient, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Exchange:
    """Send a generate request and follow its answer. Whatever goes wrong is in the result's ``error``."""
    content = json.dumps(body).encode()
    result = Exchange(time.perf_counter())
    try:
        async with client.stream("POST", "/api/generate", content=content, headers=headers) as response:
            if response.is_error:
                result.error = _refusal(response.status_code, await response.aread())
            else:
                await _follow(response, result)
    except httpx.TimeoutException:
        result.error = "timeout: no byte came for too long"
    except httpx.HTTPError as error:
        result.error = f"connection: {error or type(error).__name__}"
    result.ended = time.perf_counter()
    return result


async def _follow(response: httpx.Response, result: Exchange) -> None:
    """Note the arrival of every line; the last one says what the answer cost."""
    tail = b""
    async for data in response.aiter_raw():
        if lines := data.count(b"\n"):
            result.arrivals += [time.perf_counter()] * lines
        cut = data.rfind(b"\n", 0, -1) + 1
        tail = data[cut:] if cut or tail.endswith(b"\n") else tail + data  # from the last line's beginning
    try:
        measures = json.loads(tail)
    except ValueError:
        measures = {}
    if "error" in measures or not measures.get("done"):
        result.error = f"stream: {measures.get('error', 'it ended early')}"
        return
    result.arrivals.pop()
    result.prompt_tokens, result.output_tokens = measures.get("prompt_eval_count", 0), measures.get("eval_count", 0)
    if measures.get("done_reason") == "timeout":
        result.error = "stream: the request's time ended"


def _refusal(status: int, data: bytes) -> str:
    try:
        text = json.loads(data)["error"]
    except (ValueError, TypeError, KeyError):
        text = data.decode("utf-8", "replace")
    return f"{status}: {text}"


async def probe(client: httpx.AsyncClient, workload: Workload) -> float:
    """Load the model and return the tokens of a word of its prompts.

    Raises:
        ModelNotFound, TarsError: the server does not answer such requests.
    """
    one = dataclasses.replace(workload, input=dataclasses.replace(workload.input, kind="fixed", low=PROBE_WORDS, high=PROBE_WORDS))
    body = dataclasses.replace(one, shared_prefix=0).body("probe", 1.0)
    body["options"]["num_predict"] = 1
    answer = await exchange(client, body)
    if answer.error:
        raise (ModelNotFound if answer.error.startswith("404: ") else TarsError)(answer.error.removeprefix("404: "))
    return max(answer.prompt_tokens, 1) / PROBE_WORDS


async def send_all(
    client: httpx.AsyncClient, workload: Workload, tokens_per_word: float, progress: Progress = lambda _: None
) -> list[Exchange]:
    """Send a workload's requests as they arrive and wait for the last answer."""
    places = asyncio.Semaphore(workload.clients or 1_000_000)
    start = time.perf_counter()
    end = start + (math.inf if workload.seconds is None else workload.seconds)
    results: list[Exchange] = []

    async def one(number: int) -> None:
        try:
            results.append(await exchange(client, workload.body(number, tokens_per_word), workload.headers(number)))
        finally:
            places.release()
        progress(len(results))

    async with asyncio.TaskGroup() as group:
        for number, at in enumerate(workload.arrivals()):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            await places.acquire()
            if time.perf_counter() >= end:
                break
            group.create_task(one(number))
    return results


async def warm_up(client: httpx.AsyncClient, workload: Workload, tokens_per_word: float, requests: int) -> None:
    """Send requests of the same kind that are not measured."""
    if requests:
        other = dataclasses.replace(workload, requests=requests, seconds=None, rate=math.inf, seed=~workload.seed)
        await send_all(client, other, tokens_per_word)
