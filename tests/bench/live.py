"""What evolving a model costs those it serves: the time between tokens without a job and in each phase of one.

    python -m tests.bench.live [MODEL] --clients 2 --seconds 8 --rounds 3 [--cold]

The server runs in this process, its clients in another. A round is: nobody searches ("alone"), a job ("preparing", "searching", and "swap",
the second before and after each change of weights), its result served ("improved"), and back to the file's weights ("alone" again). A
phase's ratio is its seconds a letter (a piece has one or more tokens) over those of the round's own two "alone" phases. ``--cold``: a job
finds no compiled programs, and is stopped after the seconds of a phase, so that all of its time is spent on compiling (what earlier rounds
have compiled stays).
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import serving

from api.app import create_app
from api.models import Models
from api.settings import Settings
from tars_jax.engine.step import buckets
from tars_jax.evolve.sentiment import sentiment_task
from tars_jax.store import Store

PROMPT = "Write a long story about a lighthouse keeper who finds a map."
SWAP = 1.0  # seconds before and after a change of weights
PHASES = ("alone", "preparing", "searching", "swap", "improved")

Gap = tuple[float, float, int]  # when a piece came (time.perf_counter), how long after the one before it, and its letters


def talk(url: str, model: str, number: int, done: threading.Event, gaps: list[Gap], ended: list[bool]) -> None:
    """One client that asks again and again; ``ended``: whether each stream came to its end."""
    with httpx.Client(base_url=url, timeout=600) as client:
        for turn in itertools.count():
            if done.is_set():
                return
            options = {"num_predict": 128, "temperature": 1.0, "ignore_eos": True}
            body = {"model": model, "prompt": f"{number} {turn}: {PROMPT}", "raw": True, "options": options}
            last, chunk = None, {}
            with client.stream("POST", "/api/generate", json=body) as answer:
                for line in answer.iter_lines():
                    now, chunk = time.perf_counter(), json.loads(line)
                    if last is not None and not chunk.get("done"):
                        gaps.append((now, now - last, len(chunk["response"])))
                    last = now
            ended.append(bool(chunk.get("done")))


def clients(url: str, model: str, count: int, pipe: Connection) -> None:
    """A process of clients; sends their gaps when it is told to stop."""
    done, gaps, ended = threading.Event(), list[Gap](), list[bool]()
    threads = [threading.Thread(target=talk, args=(url, model, number, done, gaps, ended)) for number in range(count)]
    for thread in threads:
        thread.start()
    pipe.recv()
    done.set()
    for thread in threads:
        thread.join()
    pipe.send((gaps, ended))


class Clock:
    """Which phase it was when."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, int, str]] = []  # time, round, phase from then on
        self.swaps: list[float] = []

    def begin(self, number: int, phase: str) -> None:
        if not self.changes or self.changes[-1][1:] != (number, phase):
            self.changes.append((time.perf_counter(), number, phase))

    def sort(self, gaps: list[Gap]) -> dict[tuple[int, str], list[tuple[float, int]]]:
        """Gaps in seconds and letters by round and phase."""
        found: dict[tuple[int, str], list[tuple[float, int]]] = {}
        for at, gap, letters in gaps:
            number, phase = next(((n, p) for start, n, p in reversed(self.changes) if start <= at), (-1, ""))
            if any(abs(at - swap) < SWAP for swap in self.swaps):
                phase = "swap"
            found.setdefault((number, phase), []).append((gap, letters))
        return found


def run_round(client: httpx.Client, clock: Clock, number: int, args: argparse.Namespace) -> dict[str, Any]:
    clock.begin(number, "alone")
    time.sleep(args.seconds)
    train, held_out = sentiment_task(held_out=args.held_out)
    body = {"model": args.model, "data": train, "eval": held_out, "seconds": args.seconds, "target": 2.0, "seed": number}
    version, started = None, time.perf_counter()
    if args.cold:
        timer = threading.Timer(args.seconds, stop_all, [str(client.base_url)])
        timer.start()
    with client.stream("POST", "/api/optimize", json=body) as answer:
        for line in answer.iter_lines():
            view = json.loads(line)
            if "error" in view:
                sys.exit(view["error"])
            if view["version"] != version:
                version = view["version"]
                clock.swaps.append(time.perf_counter())
            clock.begin(number, "searching" if view["status"] == "searching" else "preparing" if not view["done"] else "after")
    times = {phase: at for at, n, phase in clock.changes if n == number}
    print(f"round {number}: prepared in {times.get('searching', time.perf_counter()) - started:.1f} s,", end=" ")
    print(f"{view['generation']} generations, {view['result']}", flush=True)
    clock.begin(number, "improved" if version else "alone")
    time.sleep(args.seconds / 2)
    if version:
        clock.swaps.append(time.perf_counter())
        client.post("/api/versions/rollback", json={"model": args.model, "version": 1}).raise_for_status()
    clock.begin(number, "alone")
    time.sleep(args.seconds / 2)
    return view


def stop_all(url: str) -> None:
    """Stop the jobs of a server."""
    with httpx.Client(base_url=url, timeout=600) as client:
        for job in client.get("/api/optimize").json()["jobs"]:
            client.delete(f"/api/optimize/{job['id']}")


def forget_programs() -> None:
    """Let what is compiled from now on be compiled anew."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())


def per_letter(gaps: list[tuple[float, int]]) -> float:
    return sum(gap for gap, _ in gaps) / max(sum(letters for _, letters in gaps), 1)


def report(found: dict[tuple[int, str], list[tuple[float, int]]], rounds: int) -> None:
    for phase in PHASES:
        gaps = sorted(itertools.chain(*(found.get((n, phase), []) for n in range(rounds))))
        if len(gaps) < 20:
            continue
        there = [n for n in range(rounds) if found.get((n, phase))]
        means = [per_letter(found[n, phase]) / per_letter(found[n, "alone"]) for n in there]
        p50, p90, p99 = (1e3 * gaps[int(len(gaps) * share)][0] for share in (0.5, 0.9, 0.99))
        ratio = f"{statistics.median(means):.3f} ({min(means):.3f}-{max(means):.3f})"
        mean = 1e3 * per_letter(gaps)
        print(f"{phase:10} pieces {len(gaps):6}  ms p50 {p50:6.1f}  p90 {p90:6.1f}  p99 {p99:6.1f}  a letter {mean:6.2f}  / alone {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    settings = Settings.from_environ()
    models, clock = Models(Store(settings.models), settings), Clock()
    with serving(create_app(settings, models)) as url, httpx.Client(base_url=url, timeout=3600) as client:
        client.post("/api/generate", json={"model": args.model, "stream": False, "prompt": PROMPT, "options": {"num_predict": 2}})
        engine = models.loaded()[0].engine
        while len(engine.stats().compiled_steps) < len(buckets(engine.config)):
            time.sleep(0.1)
        print(f"steps of up to {engine.config.max_step_tokens} tokens are compiled", flush=True)
        if args.cold:
            forget_programs()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=clients, args=(url, args.model, args.clients, theirs))
        process.start()
        time.sleep(3)
        for number in range(args.rounds):
            run_round(client, clock, number, args)
        ours.send(None)
        gaps, ended = ours.recv()
        process.join()
        metrics = client.get("/metrics").text
    report(clock.sort(gaps), args.rounds)
    print(f"streams {len(ended)}, dropped {ended.count(False)}, swaps {len(clock.swaps)}")
    print("\n".join(line for line in metrics.splitlines() if line.startswith("tars_optimization") and "created" not in line))


if __name__ == "__main__":
    main()
