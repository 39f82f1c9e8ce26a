"""Outputs reach their requests, in order, with few wake-ups of the event loop."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from api.relay import Inbox, Relay
from tars_jax.engine.request import Output


class CountedLoop:
    """An event loop whose wake-ups from other threads are counted; they happen when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.calls.append(call)


def text(number: int) -> Output:
    return Output(text=str(number))


def test_one_wake_up_takes_all_that_is_there() -> None:
    loop: Any = CountedLoop()
    relay, inboxes = Relay(loop), [Inbox() for _ in range(64)]
    for inbox in inboxes:
        relay.send(inbox, text(1))
    assert len(loop.calls) == 1
    loop.calls[0]()
    assert [asyncio.run(inbox.get()) for inbox in inboxes] == [text(1)] * 64
    relay.send(inboxes[0], text(2))
    assert len(loop.calls) == 2


def test_outputs_of_threads_arrive_in_order() -> None:
    async def run() -> list[list[str]]:
        relay, inboxes = Relay(asyncio.get_running_loop()), [Inbox() for _ in range(4)]

        def produce(inbox: Inbox) -> None:
            for number in range(500):
                relay.send(inbox, text(number))

        threads = [threading.Thread(target=produce, args=(inbox,)) for inbox in inboxes]
        for thread in threads:
            thread.start()
        got = await asyncio.gather(*(read(inbox) for inbox in inboxes))
        for thread in threads:
            thread.join()
        return got

    async def read(inbox: Inbox) -> list[str]:
        return [(await inbox.get()).text for _ in range(500)]

    assert asyncio.run(run()) == [[str(number) for number in range(500)]] * 4


def test_a_loop_that_has_ended_hears_nothing() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Relay(loop).send(Inbox(), text(1))


def test_a_reader_that_was_cancelled_leaves_the_rest() -> None:
    async def run() -> str:
        inbox = Inbox()
        reader = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0)
        reader.cancel()
        inbox.add(text(7))
        return (await inbox.get()).text

    assert asyncio.run(run()) == "7"
