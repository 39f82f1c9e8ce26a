"""How decoding shares the machine: python tests/bench/contention.py MODEL.gguf [--seconds 6] [--rounds 3]

Tokens per second of one process alone, beside as many busy loops as make one core of two (half of them all) unavailable, and of
two such processes at once. Kernels that wait for each other by spinning collapse here; a fair share is 0.5 to 0.75 with half of the
cores busy (two threads on one and a half cores) and 0.5 each for two processes.
"""

import argparse
import os
import statistics
import subprocess
import sys

CHILD = """
import sys, time, queue
from tars_jax import Engine, EngineConfig, SamplingParams, load
engine = Engine(load(sys.argv[1]), EngineConfig(max_context=2048))
params = SamplingParams(temperature=0, ignore_eos=True)
list(engine.generate("Once", SamplingParams(max_tokens=8, temperature=0)))
print("ready", flush=True)
for line in sys.stdin:
    count, end = 0, time.perf_counter() + float(line)
    stream = engine.generate("Once upon a time", params)
    start = time.perf_counter()
    for _ in stream:
        count += 1
        if time.perf_counter() > end:
            break
    print(count / (time.perf_counter() - start), flush=True)
    stream.close()
"""


class Decoder:
    """A process that decodes when told to."""

    def __init__(self, path: str) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", CHILD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def start(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    decoders = [Decoder(arguments.model) for _ in range(2)]
    rates: dict[str, list[float]] = {"alone": [], "beside busy loops": [], "each of two": []}

    def run(count: int) -> float:
        for decoder in decoders[:count]:
            decoder.start(arguments.seconds)
        return statistics.mean(float(decoder.read()) for decoder in decoders[:count])

    for _ in range(arguments.rounds):
        rates["alone"].append(run(1))
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(max((os.cpu_count() or 2) // 2, 1))]
        rates["beside busy loops"].append(run(1))
        for loop in loops:
            loop.kill()
        rates["each of two"].append(run(2))
    for decoder in decoders:
        decoder.close()
    for name, values in rates.items():
        ratios = [value / alone for value, alone in zip(values, rates["alone"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:<20}{statistics.median(values):>8.1f} tokens/s   {spread}")


if __name__ == "__main__":
    main()
