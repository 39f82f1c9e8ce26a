"""What the HTTP layer costs: python -m tests.bench.streaming [--streams 64] [--tokens 200] [--step 0.05]

Microseconds of processor time per token, of the server's process and of the load generator's, while an engine that computes nothing
gives every stream a token a step, as a real one does. Time on the clock does not matter, so other work on the machine hardly does.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from api.app import create_app
from tars_jax.engine.request import Output, Request, Usage
from tests.fakes import FakeEngine, FakeLoader, make_store, serving

CLIENT = "from tars_jax.cli import main; main()"


class SteppingEngine(FakeEngine):
    """One thread gives a token to every request, again and again."""

    step_seconds = 0.05

    def __init__(self, model: Any, config: Any) -> None:
        super().__init__(model, config)
        self._left: dict[int, tuple[Request, int]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request) -> None:
        with self._lock:
            self._left[request.id] = (request, request.params.max_tokens or 1)

    def _run(self) -> None:
        while not self.is_closed:
            time.sleep(self.step_seconds)
            with self._lock:
                for request_id, (request, left) in list(self._left.items()):
                    request.sink(Output(text=" word", token_ids=(left,)))
                    self._left[request_id] = request, left - 1
                    if left == 1:
                        del self._left[request_id]
                        request.sink(Output(finish_reason="length", usage=Usage(10, request.params.max_tokens or 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step", type=float, default=SteppingEngine.step_seconds, help="seconds")
    arguments = parser.parse_args()
    SteppingEngine.step_seconds = arguments.step
    loader = FakeLoader()
    loader.make_engine = SteppingEngine  # type: ignore[method-assign,assignment]
    with tempfile.TemporaryDirectory() as folder:
        models = loader.models(make_store(Path(folder)))
        with serving(create_app(models.settings, models)) as url:
            words = f"bench serve -m fake --host {url} --requests {arguments.streams} --clients {arguments.streams}"
            words += f" --input 20 --output {arguments.tokens} --warmup 2 --json"
            server, client = time.process_time(), _children()
            result = subprocess.run([sys.executable, "-c", CLIENT, *words.split()], stdout=subprocess.PIPE, check=True)
            server, client = time.process_time() - server, _children() - client
    report = json.loads(result.stdout)
    tokens = report["output_tokens"]
    print(f"{tokens} tokens, {report['failed']} failed, {report['output_tokens_per_second']:.0f} tokens/s")
    print(f"inter-token latency p50 {report['itl_ms']['p50']:.1f} ms, p99 {report['itl_ms']['p99']:.1f} ms")
    print(f"server {1e6 * server / tokens:.1f} us/token, client {1e6 * client / tokens:.1f} us/token (with its start-up)")


def _children() -> float:
    """Processor seconds of the child processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
