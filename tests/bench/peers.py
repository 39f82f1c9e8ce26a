"""TARS beside llama.cpp and OpenVINO GenAI on the same files: python tests/bench/peers.py MODEL.gguf [--types Q4_1,Q4_0] [--rounds 5]

Every engine runs in a process of its own and is idle while another is measured; the engines take turns, round by round, so
that whatever else the machine does hits all of them. Printed are medians and the ratio of each round's pair, with its range.
Peers are installed apart: llama-cpp-python built natively (CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python
llama-cpp-python) and openvino-genai; name that environment's interpreter with --peer-python.

What is timed: "prefill" is one prompt of 512 random tokens, up to its first token (llama.cpp: without sampling); "decode N" is
N streams of 64 tokens after prompts of 16, total tokens per second (llama.cpp: without sampling, as llama-bench does it).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, NEW, START = 512, 64, 16
THREADS = 2
FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}


class Llama:
    """llama.cpp through its C interface."""

    def __init__(self, path: str) -> None:
        import llama_cpp as lib
        import numpy as np

        self.lib, self.random = lib, np.random.default_rng(0)
        lib.llama_backend_init()
        self.silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.silence, None)
        self.model = lib.llama_load_model_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 512, 512, 16
        params.n_threads = params.n_threads_batch = THREADS
        params.kv_unified = True
        self.context = lib.llama_new_context_with_model(self.model, params)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def decode(self, entries: list[tuple[int, int, bool]]) -> None:
        """Run (sequence, position, wants logits) with random tokens."""
        batch = self.lib.llama_batch_init(len(entries), 0, 1)
        for i, (sequence, position, wants) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(self.random.integers(self.vocab)), position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants
        batch.n_tokens = len(entries)
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.lib.llama_synchronize(self.context)
        self.lib.llama_batch_free(batch)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def prefill(self) -> float:
        self.clear()
        begin = time.perf_counter()
        self.decode([(0, i, i == PROMPT - 1) for i in range(PROMPT)])
        return PROMPT / (time.perf_counter() - begin)

    def streams(self, count: int) -> float:
        self.clear()
        for sequence in range(count):
            self.decode([(sequence, i, i == START - 1) for i in range(START)])
        begin = time.perf_counter()
        for step in range(NEW):
            self.decode([(sequence, START + step, True) for sequence in range(count)])
        return count * NEW / (time.perf_counter() - begin)


class OpenVino:
    """OpenVINO GenAI, which reads GGUF itself. One stream only."""

    def __init__(self, path: str) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self.ov, self.genai, self.np, self.random = ov, genai, np, np.random.default_rng(0)
        self.pipe = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=THREADS)

    def run(self, prompt: int, new: int) -> Any:
        ids = self.random.integers(3, 49000, (1, prompt)).astype(self.np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(self.np.ones_like(ids)))
        return self.pipe.generate(inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True).perf_metrics

    def prefill(self) -> float:
        return PROMPT / (self.run(PROMPT, 2).get_ttft().mean / 1e3)

    def streams(self, count: int) -> float:
        if count > 1:
            raise RuntimeError("one stream only")
        return 1e3 / self.run(START, NEW).get_tpot().mean


class Tars:
    """This project's engine, as `tars bench` runs it: without guessing, which the peers do not do either."""

    def __init__(self, path: str) -> None:
        import numpy as np

        from tars_jax import Engine, EngineConfig, load

        self.engine = Engine(load(path), EngineConfig(max_context=1024, max_rows=16, prompt_lookup=False), warm_up=True)
        self.engine.settle()  # requests come in groups of any size, and a size that is new would be compiled while it is timed
        self.random = np.random.default_rng(0)

    def prefill(self) -> float:
        from tars_jax.bench import _prefill

        return _prefill(self.engine, self.random, PROMPT)

    def streams(self, count: int) -> float:
        from tars_jax.bench import _decode

        rate = _decode(self.engine, self.random, count, NEW)
        self.engine.settle()
        return rate


ENGINES: dict[str, Any] = {"tars": Tars, "llama.cpp": Llama, "openvino": OpenVino}


def work(name: str, path: str) -> None:
    """A worker: reads work from stdin, answers with tokens per second."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    engine = ENGINES[name](path)
    print("ready", file=answers)
    for line in sys.stdin:
        what, count = json.loads(line)
        rate = engine.prefill() if what == "prefill" else engine.streams(count)
        print(json.dumps(rate), file=answers)


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, path: Path, python: str) -> None:
        command = [python, __file__, str(path), "--worker", name]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.is_ready = self.process.stdout.readline().strip() == "ready"  # not so where an engine cannot read the file

    def ask(self, what: str, count: int) -> float | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps([what, count]), file=self.process.stdin, flush=True)
            return float(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            return None

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status")  # without that line where the process has died
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def make_variants(source: Path, folder: Path, types: list[str], python: str) -> dict[str, Path]:
    """The model in other quantisations, by llama.cpp's own quantiser."""
    made = {name: source if name in source.name else folder / f"{source.stem}.{name}.gguf" for name in types}
    code = (
        "import ctypes, sys, llama_cpp as lib; lib.llama_backend_init(); p = lib.llama_model_quantize_default_params();"
        "p.ftype = int(sys.argv[3]); p.allow_requantize = True; p.nthread = 2;"
        "sys.exit(lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
    )
    for name, path in made.items():
        if not path.exists():
            subprocess.run([python, "-c", code, str(source), str(path), str(FTYPES[name])], check=True, capture_output=True)
    return made


def compare(path: Path, label: str, engines: list[str], rounds: int, batches: list[int], peer_python: str) -> None:
    started = [Worker(name, path, sys.executable if name == "tars" else peer_python) for name in engines]
    workers = [worker for worker in started if worker.is_ready]
    for worker in started:
        if not worker.is_ready:
            print(f"{label:<8}{worker.name} does not start with this file")
    for what, count in [("prefill", 1), *(("decode", batch) for batch in batches)]:
        able = [worker for worker in workers if worker.name != "openvino" or count == 1]
        for worker in able:
            worker.ask(what, count)  # every shape once, untimed
        runs: dict[str, list[float]] = {worker.name: [] for worker in able}
        for _ in range(rounds):
            for worker in able:
                if (rate := worker.ask(what, count)) is not None:
                    runs[worker.name].append(rate)
        report(label, f"{what} {PROMPT if what == 'prefill' else count}", runs)
    print(f"{label:<8}{'resident MB':<14}" + "".join(f"{worker.name} {worker.resident_mb():.0f}   " for worker in workers))
    for worker in started:
        worker.process.kill()
        worker.process.wait()


def report(label: str, what: str, runs: dict[str, list[float]]) -> None:
    ours, line = runs["tars"], f"{label:<8}{what:<14}tars {statistics.median(runs['tars']):8.1f}"
    for name, rates in runs.items():
        if name != "tars" and rates:
            ratios = [a / b for a, b in zip(ours, rates, strict=True)]
            line += (
                f"   {name} {statistics.median(rates):8.1f}  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            )
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", default="Q4_1,Q4_0,Q8_0,Q4_K_M,BF16", help="quantisations to compare on")
    parser.add_argument("--engines", default="tars,llama.cpp,openvino")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-b", "--batches", default="1,16")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the quantised variants are made")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, str(options.model))
        return
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model_name = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), platform.processor())
    print(f"{model_name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.rounds} rounds")
    for name, path in make_variants(options.model, options.folder, options.types.split(","), options.peer_python).items():
        compare(
            path,
            name,
            options.engines.split(","),
            options.rounds,
            [int(batch) for batch in options.batches.split(",")],
            options.peer_python,
        )


if __name__ == "__main__":
    main()
