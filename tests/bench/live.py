"""What evolving a model costs those it serves: time between tokens with and without a job, and what the job comes to.

    python -m tests.bench.live [MODEL] --clients 2 --seconds 60

The server runs in this process, behind HTTP. Phases alternate: no job, a job, no job, ...; the preparation of a job is a phase of its own.
"""

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import serving

from api.app import create_app
from api.settings import Settings
from tars_jax.evolve.sentiment import sentiment_task

PROMPT = "Write a long story about a lighthouse keeper who finds a map."


class Load:
    """Clients that talk without a pause; the gaps between their tokens, by the phase they fall in."""

    def __init__(self, url: str, model: str, clients: int) -> None:
        self._url, self._model, self._clients = url, model, clients
        self.phase = "warm up"
        self.gaps: dict[str, list[float]] = {}
        self.dropped = self.streams = 0
        self._done = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(self._clients) as pool:
            futures = [pool.submit(self._talk, number) for number in range(self._clients)]
            try:
                yield
            finally:
                self._done.set()
            for future in futures:
                future.result()

    def _talk(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while not self._done.is_set():
                options = {"num_predict": 128, "temperature": 1.0, "ignore_eos": True}
                body = {"model": self._model, "prompt": f"{number}: {PROMPT}", "raw": True, "options": options}
                last, chunk = None, {}
                with client.stream("POST", "/api/generate", json=body) as answer:
                    for line in answer.iter_lines():
                        now, chunk = time.perf_counter(), json.loads(line)
                        if last is not None and not chunk.get("done"):
                            self.gaps.setdefault(self.phase, []).append(now - last)
                        last = now
                self.streams += 1
                self.dropped += not chunk.get("done")


def measure(client: httpx.Client, load: Load, args: argparse.Namespace) -> list[dict[str, Any]]:
    train, held_out = sentiment_task(held_out=args.held_out)
    jobs = []
    for _ in range(args.rounds):
        load.phase = "alone"
        time.sleep(args.seconds)
        load.phase = "preparing"
        body = {"model": args.model, "data": train, "eval": held_out, "seconds": args.seconds, "target": 2.0, "seed": len(jobs)}
        with client.stream("POST", "/api/optimize", json=body) as answer:
            for line in answer.iter_lines():
                view = json.loads(line)
                load.phase = {"searching": "searching", "preparing": "preparing"}.get(view.get("status"), "between")
                print(line[:300], flush=True)
        load.phase = "between"
        jobs.append(view)
        client.post("/api/versions/rollback", json={"model": args.model, "version": 1})
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=60)
    args = parser.parse_args()
    with serving(create_app(Settings())) as url, httpx.Client(base_url=url, timeout=3600) as client:
        client.post("/api/generate", json={"model": args.model, "stream": False, "prompt": PROMPT, "options": {"num_predict": 2}})
        load = Load(url, args.model, args.clients)
        with load.running():
            time.sleep(5)
            jobs = measure(client, load, args)
        metrics = client.get("/metrics").text
    for phase, gaps in load.gaps.items():
        cut = statistics.quantiles(gaps, n=100)
        print(f"{phase:10} tokens {len(gaps):6}  inter-token ms: p50 {1e3 * cut[49]:.1f}  p90 {1e3 * cut[89]:.1f}  p99 {1e3 * cut[98]:.1f}")
    print(f"p50 searching / alone: {statistics.median(load.gaps['searching']) / statistics.median(load.gaps['alone']):.3f}")
    print(f"streams {load.streams}, dropped {load.dropped}")
    for job in jobs:
        print(json.dumps({name: job[name] for name in ("status", "generation", "version", "result")}))
    print("\n".join(line for line in metrics.splitlines() if line.startswith("tars_optimization") and "created" not in line))


if __name__ == "__main__":
    main()
