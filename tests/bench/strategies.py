"""Strategies beside each other on SmolLM2-135M and the sentiment task, at exactly equal evaluations.

python tests/bench/strategies.py --strategies eggroll,random --seeds 0,1,2 --generations 12
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import tars_jax
from tars_jax.evolve.data import encode_examples
from tars_jax.evolve.evaluation import Evaluation, refusal
from tars_jax.evolve.evolution import Evolution, HeldOut
from tars_jax.evolve.sentiment import sentiment_task
from tars_jax.evolve.settings import Settings


class Counted(Evolution):
    """Counts what the search is told: members, and members times examples. Held-out evaluations, of one member, are not among them."""

    members = evaluations = 0

    def _fitness(self, *args: Any) -> Any:
        examples, members = args[1], args[4]
        if members > 1:
            self.members += members
            self.evaluations += members * len(examples)
        return super()._fitness(*args)


def run(evolution: Counted, held_out: HeldOut, generations: int, every: int) -> Iterator[tuple[int, Evaluation, float]]:
    """After every so many generations: how many there were, the update on held-out examples, processor seconds of the search alone."""
    state, spent = evolution.init(), 0.0
    for generation in range(1, generations + 1):
        began = time.process_time()
        state, _ = evolution.generation(state)
        spent += time.process_time() - began
        if generation % every == 0 or generation == generations:
            yield generation, evolution.evaluate(evolution.centre(state), held_out), spent


def line(label: str, found: Evaluation, before: Evaluation) -> str:
    low, high = found.interval
    rise = found.general_loss / before.general_loss - 1
    return f"{label}: {found.exact:.1%} ({low:.1%}-{high:.1%}), held-out loss {found.loss:.2f}, other text {rise:+.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--strategies", default="eggroll,genetic,annealing,montecarlo,hybrid,random")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--sigma", type=float, default=Settings.sigma)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    options = parser.parse_args()
    model = tars_jax.load(options.model)
    for seed in map(int, options.seeds.split(",")):
        train, held = (encode_examples(lines, model) for lines in sentiment_task(seed=seed))
        space: Any = None
        for name in options.strategies.split(","):
            chosen: dict[str, Any] = {"strategy": name, "sigma": options.sigma, "batch": options.batch, "horizon": options.generations}
            evolution = Counted(model, train, Settings(**chosen, seed=seed))
            evolution._space = space = space or evolution.space  # the same for all, found once
            held_out = evolution.hold_out(held)
            before = evolution.evaluate(evolution.start(), held_out)
            print(line(f"seed {seed}, {name}, before", before, before), flush=True)
            best: tuple[int, Evaluation] | None = None
            for generation, found, seconds in run(evolution, held_out, options.generations, options.every):
                told = f"{evolution.members} members, {evolution.evaluations} evaluations, {seconds:.0f} processor s"
                print(line(f"  {generation}", found, before), told, flush=True)
                if not refusal(before, found) and (best is None or found.better_than(best[1])):
                    best = generation, found
            print(line(f"  best within the guard, at {best[0]}", best[1], before) if best else "  none within the guard", flush=True)


if __name__ == "__main__":
    main()
