"""What a population costs: members through `LowRank` leaves against plain weights, the same tokens, in turns.

python tests/bench/evolve.py --model smollm2:135m --rounds 7
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import tars_jax
from tars_jax.evolve.data import encode_examples
from tars_jax.evolve.evolution import Evolution
from tars_jax.evolve.scoring import score
from tars_jax.evolve.sentiment import sentiment_task
from tars_jax.evolve.settings import Settings


def seconds(params: Any, evolution: Evolution, slices: int) -> tuple[float, float]:
    """One population on one batch, in equal slices: seconds by the clock, and of the processors (which other work disturbs less)."""
    _, batch, states = evolution._generation_batch(0)
    members = evolution.settings.population // slices
    begin, work = time.perf_counter(), time.process_time()
    for _ in range(slices):
        fixed = {"config": evolution.model.config, "first": evolution._first, "members": members}
        jax.block_until_ready(score(params, states, batch, **fixed))
    return time.perf_counter() - begin, time.process_time() - work


def compare(evolution: Evolution, slices: int, rounds: int) -> list[tuple[float, float]]:
    """Throughput through `LowRank` leaves as a share of that through plain ones, a round each: by the clock and by processor time."""
    members = evolution.settings.population // slices
    vectors = 0.02 * jax.random.normal(jax.random.key(0), (members, evolution.space.size), jnp.float32)
    both = evolution.params, evolution.space.updated(evolution.params, vectors)
    for params in both:
        seconds(params, evolution, slices)
    shares = []
    for i in range(rounds):
        order = both if i % 2 else both[::-1]
        times = [seconds(params, evolution, slices) for params in order]
        plain, low_rank = times if i % 2 else times[::-1]
        shares.append((plain[0] / low_rank[0], plain[1] / low_rank[1]))
        print(f"  plain {plain[0] * 1e3:6.0f} ms, low-rank {low_rank[0] * 1e3:6.0f} ms, processors {plain[1]:.2f} s, {low_rank[1]:.2f} s")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--layers", default="last:6,all")
    parser.add_argument("--slices", default="1,4")
    options = parser.parse_args()
    model = tars_jax.load(options.model)
    examples = encode_examples(sentiment_task()[0], model)
    for layers in options.layers.split(","):
        settings = Settings(population=options.population, rank=options.rank, layers=layers)
        evolution = Evolution(model, examples, settings)
        tokens = evolution._generation_batch(0)[1].rows.tokens.shape[0] * options.population
        for slices in map(int, options.slices.split(",")):
            print(f"{layers}, population {options.population} in {slices} slices, rank {options.rank}, {tokens} tokens")
            shares = compare(evolution, slices, options.rounds)
            for label, values in zip(("clock", "processor time"), zip(*shares, strict=True), strict=True):
                print(f"  {label}: median {statistics.median(values):.3f}, {min(values):.3f} to {max(values):.3f}", flush=True)


if __name__ == "__main__":
    main()
