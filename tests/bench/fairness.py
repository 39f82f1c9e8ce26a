"""What a greedy client costs a light one: python -m tests.bench.fairness MODEL [--greedy 60] [--rounds 5]

Time to first token of single requests under one API key, on an idle server and while another key has so many requests under way or
waiting; alternating, on a server of its own. The goal is a ratio of at most 2.
"""

import argparse
import asyncio
import dataclasses
import random
import statistics

import httpx

from tars_jax.cli.load_test import started_server
from tars_jax.load_test.client import exchange, open_client, probe, send_all, warm_up
from tars_jax.load_test.workload import Lengths, Workload

LIGHT = {"Authorization": "Bearer light"}


async def measure(url: str, model: str, greedy: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds to the light key's first token: alone, and beside the greedy key."""
    many = Workload(model, Lengths.parse("64"), Lengths.parse("64"), requests=greedy, api_keys=1, seed=random.getrandbits(31))
    one = dataclasses.replace(many, requests=1, output=Lengths.parse("8"), seed=many.seed + 1)
    alone, beside = [], []
    async with open_client(url, timeout=600) as client:
        tokens_per_word = await probe(client, one)
        await warm_up(client, many, tokens_per_word, greedy)
        for number in range(rounds):
            alone.append(await first_token(client, one.body(f"alone {number}", tokens_per_word)))
            load = asyncio.create_task(send_all(client, dataclasses.replace(many, seed=many.seed + 2 + number), tokens_per_word))
            await asyncio.sleep(random.uniform(1.5, 2.5))  # all are sent by then, and many steps done
            beside.append(await first_token(client, one.body(f"beside {number}", tokens_per_word)))
            failed = [result.error for result in await load if result.error]
            assert not failed, failed[0]
    return alone, beside


async def first_token(client: httpx.AsyncClient, body: dict[str, object]) -> float:
    result = await exchange(client, body, LIGHT)
    assert not result.error, result.error
    return result.first_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--greedy", type=int, default=60, help="requests of the greedy key")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with started_server() as url:
        alone, beside = asyncio.run(measure(url, arguments.model, arguments.greedy, arguments.rounds))
    ratios = [after / before for before, after in zip(alone, beside, strict=True)]
    for name, values in (("alone", alone), (f"beside {arguments.greedy} requests", beside)):
        print(f"{name:<22}{1e3 * statistics.median(values):>8.0f} ms ({1e3 * min(values):.0f}-{1e3 * max(values):.0f})")
    print(f"{'ratio':<22}{statistics.median(ratios):>8.2f}    ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
