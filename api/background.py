"""Work of other threads, for the event loop: in the background, or in an engine's idle time."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from tars_jax.engine.threads import start_deep, step_back

if TYPE_CHECKING:
    from tars_jax.engine.engine import Engine

T = TypeVar("T")
SWITCH = 0.0005  # seconds that a thread in the background keeps the interpreter when another one waits for it


async def in_background(work: Callable[[], T]) -> T:
    """The result of ``work``, done in a thread of its own, of low priority where threads can have one; it may compile. From then
    on, threads of this process that want the interpreter, as an engine's does between two steps, get it soon."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            step_back()
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH))
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    start_deep(run, "background", daemon=True)
    return await asyncio.wrap_future(done)


async def in_idle_time(engine: "Engine", slices: Iterator[T | None], share: float, count: Callable[[], None]) -> AsyncGenerator[T, None]:
    """What an iterator gives, None left out. It runs in the engine's thread, a step at a time: while nobody waits for tokens, and for a
    ``share`` of the time in which somebody does. ``count`` is called after every step, there."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[T | Exception | None]()

    def put(item: T | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> bool:
        try:
            item = next(slices)
        except StopIteration:
            put(None)
            return False
        except Exception as error:
            put(error)
            return False
        count()
        if item is not None:
            put(item)
        return True

    await asyncio.to_thread(engine.work_when_idle, work, share)
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        await asyncio.to_thread(engine.work_when_idle, None)
