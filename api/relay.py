"""Outputs on their way from the engines' threads to the requests of one event loop."""

import asyncio
import contextlib
from collections import deque

from tars_jax.engine.request import Output


class Inbox:
    """The outputs of one request, for one reader."""

    def __init__(self) -> None:
        self._outputs: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def get(self) -> Output:
        """The next output."""
        while not self._outputs:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._outputs.popleft()

    def add(self, output: Output) -> None:
        """Deliver an output, on the event loop."""
        self._outputs.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Relay:
    """Takes outputs over from other threads. The loop is woken once for all that are there by then: a step gives every stream a token,
    and a wake-up costs a system call on either side."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pending: deque[tuple[Inbox, Output]] = deque()
        self._is_scheduled = False

    def send(self, inbox: Inbox, output: Output) -> None:
        """From any thread. Nothing happens when the loop has ended, and with it whoever listened."""
        self._pending.append((inbox, output))
        if not self._is_scheduled:
            self._is_scheduled = True
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False  # first: what is sent from now on schedules again
        while self._pending:
            inbox, output = self._pending.popleft()
            inbox.add(output)
