"""What the CPU kernels reach on this machine, against its own limits: python tests/bench/kernels.py [--rows 1,16,512]

Shapes are SmolLM2-135M's. Weights of 30 layers stand in memory, so that one row's time is the memory's and not a cache's.
Every number is the best of several runs; other programs on the machine lower it.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import kernels, quant
from tars_jax.cache import RaggedBatch, write_slots

LAYERS, D, F, HEADS, KV_HEADS, HD, VOCAB, PAGE = 30, 576, 1536, 9, 3, 64, 49152, 16
EPS = 1e-5
LIMITS = r"""
#include <immintrin.h>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>
template <class F> double best(int threads, F f) {
  double best = 1e9;
  for (int i = 0; i < 12; ++i) {
    auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back(f, t);
    for (auto& t : pool) t.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}
int main() {
  const size_t bytes = 256u << 20;
  char* memory = static_cast<char*>(std::aligned_alloc(64, bytes));
  std::memset(memory, 1, bytes);
  static volatile int sink[2];
  auto read = [=](int t) {
    __m512i s[4] = {};
    for (char *p = memory + bytes / 2 * t, *end = p + bytes / 2; p < end; p += 256)
      for (int i = 0; i < 4; ++i) s[i] = _mm512_add_epi32(s[i], _mm512_load_si512(p + 64 * i));
    sink[t] = _mm512_reduce_add_epi32(s[0] + s[1] + s[2] + s[3]);
  };
  const long rounds = 3000000;
  auto dot = [=](int t) {
    __m512i a[12], w = _mm512_set1_epi32(0x01020304 + t);
    for (auto& x : a) x = w;
    for (long i = 0; i < rounds; ++i) {
      for (auto& x : a) x = _mm512_dpbusd_epi32(x, w, w);
      __asm__ volatile("" ::"v"(a[0]));
    }
    for (int i = 1; i < 12; ++i) a[0] += a[i];
    sink[t] = _mm512_reduce_add_epi32(a[0]);
  };
  std::printf("%f %f\n", bytes / best(2, read) / 1e9, 2 * rounds * 12.0 * 64 / best(2, dot) / 1e9);
}
"""


def limits() -> tuple[float, float]:
    """Memory bandwidth in GB/s and 8-bit dot products in GMAC/s, on two threads; zeros where there is no AVX512-VNNI."""
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory) / "limits.cc", Path(directory) / "limits"
        source.write_text(LIMITS)
        flags = ["-O3", "-mavx512f", "-mavx512vnni", "-pthread"]
        try:
            subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(program)], check=True, capture_output=True)
            bandwidth, macs = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            return 0.0, 0.0
    return float(bandwidth), float(macs)


def best(f: Callable[..., Any], *args: Any, repeat: int = 15, carry: bool = False) -> float:
    """Seconds of the fastest call. carry: the first argument is donated and comes back as the result's last part."""
    times = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        out = jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - begin)
        if carry:
            args = (out[-1], *args[1:])
    return min(times)


def random_weight(rng: np.random.Generator, outputs: int, inputs: int, kind: str) -> kernels.Tiled:
    if kind == "bf16":
        return kernels.pack_tiles(jnp.asarray(rng.normal(size=(outputs, inputs)) * inputs**-0.5, jnp.bfloat16))
    bits, affine = (4, True) if kind == "q4_1" else (4, False) if kind == "q4_0" else (8, False)
    low, high = (0, 16) if affine else (-(1 << (bits - 1)), 1 << (bits - 1))
    codes = rng.integers(low, high, (outputs, inputs), dtype=np.int8)
    scales = np.full((outputs, inputs // 32), inputs**-0.5 / high, np.float16)
    mins = -scales * np.float16(8) if affine else None
    return kernels.pack_tiles(quant.pack(codes, scales, mins, bits=bits, group=32))


def make_layers(rng: np.random.Generator, kind: str) -> list[dict[str, Any]]:
    kv, shapes = KV_HEADS * HD, {}
    shapes = {"q": (D, D), "k": (kv, D), "v": (kv, D), "o": (D, D), "gate": (F, D), "up": (F, D), "down": (D, F)}
    norms = {"attention_norm": np.ones(D, np.float32), "mlp_norm": np.ones(D, np.float32)}
    layers = [{name: random_weight(rng, *shape, kind) for name, shape in shapes.items()} | norms for _ in range(LAYERS)]
    return jax.tree.map(jnp.asarray, layers)


def qkv(layer: dict[str, Any], x: jax.Array, at: jax.Array | None) -> tuple[jax.Array, ...]:
    return kernels.norm_linear(x, layer["attention_norm"], EPS, [layer["q"], layer["k"], layer["v"]], prompts_at=at)


def gate_up(layer: dict[str, Any], x: jax.Array, at: jax.Array | None) -> jax.Array:
    return kernels.gated(x, layer["mlp_norm"], EPS, layer["gate"], layer["up"], "silu", prompts_at=at)


def report(name: str, rows: int, seconds: float, weights: Sequence[kernels.Tiled], limit: tuple[float, float]) -> None:
    gigabytes = sum(w.nbytes for w in weights) / seconds / 1e9
    gmacs = sum(w.shape[0] * w.shape[1] for w in weights) * rows / seconds / 1e9
    share = max(gigabytes / limit[0] if limit[0] else 0, gmacs / limit[1] if limit[1] else 0)
    print(f"{name:10} {rows:4} rows {seconds * 1e6:9.1f} us {gigabytes:6.1f} GB/s {gmacs:7.1f} GMAC/s {share:6.0%} of the limit")


def bench_products(layers: list[dict[str, Any]], head: kernels.Tiled, rows: Sequence[int], limit: tuple[float, float]) -> None:
    cases: dict[str, tuple[int, Callable[..., Any], tuple[str, ...]]] = {
        "qkv": (D, lambda layer, x, at: sum(y.sum() for y in qkv(layer, x, at)), ("q", "k", "v")),
        "o": (D, lambda layer, x, at: kernels.linear_add(x, layer["o"], None, x, at), ("o",)),
        "gate_up": (D, gate_up, ("gate", "up")),
        "down": (F, lambda layer, x, at: kernels.linear_add(x, layer["down"], None, x[:, :D], at), ("down",)),
    }
    for name, (inputs, call, used) in cases.items():
        run = jax.jit(lambda layers, x, at, call=call: [call(layer, x, at) for layer in layers])
        for n in rows:
            x = jnp.asarray(np.random.default_rng(0).normal(size=(n, inputs)), jnp.float32)
            at = jnp.zeros(1, jnp.int32) if n > 16 else None  # many rows are a prompt's
            report(name, n, best(run, layers, x, at) / LAYERS, [layers[0][w] for w in used], limit)
    run = jax.jit(lambda head, x: kernels.norm_linear(x, None, EPS, [head])[0])
    for n in (n for n in rows if n <= 64):
        report("head", n, best(run, head, jnp.ones((n, D), jnp.float32)), [head], limit)


def make_batch(rows: int, new: int, cached: int) -> RaggedBatch:
    """``rows`` sequences with ``new`` tokens each after ``cached`` others."""
    width = -(-(cached + new) // PAGE)
    positions = np.tile(np.arange(cached, cached + new), rows).astype(np.int32)
    tables = np.arange(1, 1 + rows * width).reshape(rows, width).astype(np.int32)
    starts, lengths = np.arange(rows + 1) * new, np.full(rows, cached + new)
    arrays = (np.zeros(rows * new), positions, starts, lengths, tables, [0 if new > 1 else rows])
    return RaggedBatch(*(jnp.asarray(a, jnp.int32) for a in arrays))


def make_pages(batch: RaggedBatch, layers: int) -> list[tuple[jax.Array, jax.Array]]:
    shape = (int(batch.page_tables.max()) + 1, KV_HEADS, PAGE, HD)
    dtype = jnp.bfloat16 if kernels.multiplies_bf16() else jnp.float16  # as an engine's
    return [(jnp.ones(shape, dtype), jnp.ones(shape, dtype)) for _ in range(layers)]


def bench_attention(cases: Sequence[tuple[int, int, int]]) -> None:
    for rows, new, cached in cases:
        batch = make_batch(rows, new, cached)
        pages = make_pages(batch, LAYERS)
        q = jnp.ones((rows * new, HEADS, HD), jnp.float32)
        run = jax.jit(lambda pages, q, batch: [kernels.attention(q, k, v, batch, scale=HD**-0.5) for k, v in pages])
        seconds = best(run, pages, q, batch) / LAYERS
        seen = rows * (cached * new + new * (new + 1) / 2)
        gmacs, gigabytes = seen * HEADS * HD * 2 / seconds / 1e9, rows * (cached + new) * KV_HEADS * HD * 4 / seconds / 1e9
        what = f"attention, {rows} rows, {new} new tokens after {cached}:"
        print(f"{what:50} {seconds * 1e6:9.1f} us {gmacs:6.1f} GMAC/s {gigabytes:6.1f} GB/s")


def step(pages: Any, layers: Any, head: Any, norm: jax.Array, embed: Any, batch: RaggedBatch, tables: Any) -> Any:
    x = kernels.take_rows(embed, batch.tokens)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    blocks = [
        kernels.Block((w["attention_norm"], None, None, w["mlp_norm"]), [w[name] for name in names], [None] * len(names)) for w in layers
    ]
    x, k_pages, v_pages = kernels.blocks(
        *(blocks, x, tables, write_slots(batch, PAGE), batch, *pages),
        first_pages=[i * (len(pages[0]) // LAYERS) for i in range(LAYERS)],
        rotates=[True] * LAYERS,
        heads=HEADS,
        head_dim=HD,
        activation="silu",
        eps=EPS,
        scale=HD**-0.5,
    )
    logits = kernels.norm_linear(x[batch.last_tokens], norm, EPS, [head])[0]
    return logits, (k_pages, v_pages)  # XLA's argmax over 49,152 logits takes 0.5 ms a row: sampling is measured elsewhere


def bench_model(layers: list[dict[str, Any]], head: kernels.Tiled, cases: Sequence[tuple[int, int, int]], bandwidth: float) -> None:
    nbytes = head.nbytes + sum(w.nbytes for layer in layers for w in layer.values())
    run = jax.jit(step, donate_argnums=0)
    for rows, new, cached in cases:
        batch = make_batch(rows, new, cached)
        angles = np.asarray(batch.positions)[:, None, None] * 0.01 * np.ones((1, 1, HD // 2))
        tables = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
        pages = tuple(jnp.concatenate(part) for part in zip(*make_pages(batch, LAYERS), strict=True))
        args = (pages, layers, head, jnp.ones(D, jnp.float32), head, batch, tables)
        seconds = best(run, *args, repeat=40 if new == 1 else 8, carry=True)
        share = f"{nbytes / bandwidth / 1e9 / seconds:4.0%} of the memory's" if bandwidth else ""
        what = f"30 blocks + head, {rows} rows, {new} new tokens after {cached}:"
        print(f"{what:50} {seconds * 1e3:8.2f} ms {rows * new / seconds:8.0f} tokens/s {share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,4,16,64,512")
    parser.add_argument("--kind", default="q4_1", choices=["q4_1", "q4_0", "q8_0", "bf16"])
    parser.add_argument("--only", default="limits,products,attention,model")
    arguments = parser.parse_args()
    rng, parts = np.random.default_rng(0), arguments.only.split(",")
    print(f"kernels: {kernels.isa() if kernels.available() else kernels.unavailable_reason()}")
    limit = limits() if "limits" in parts else (0.0, 0.0)
    print(f"limits of two threads: {limit[0]:.1f} GB/s, {limit[1]:.0f} GMAC/s")
    layers = make_layers(rng, arguments.kind)
    head = jax.tree.map(jnp.asarray, random_weight(rng, VOCAB, D, "bf16" if arguments.kind == "bf16" else "q8_0"))
    if "products" in parts:
        bench_products(layers, head, [int(n) for n in arguments.rows.split(",")], limit)
    if "attention" in parts:
        bench_attention([(1, 1, 64), (1, 1, 512), (1, 1, 4096), (16, 1, 64), (16, 1, 512), (1, 512, 0)])
    if "model" in parts:
        bench_model(layers, head, [(1, 1, 64), (1, 1, 512), (16, 1, 64), (16, 1, 512), (1, 512, 0)], limit[0])


if __name__ == "__main__":
    main()
