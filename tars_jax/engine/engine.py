"""The engine: many requests, one device. One thread per engine owns the device state; everybody else sends it messages."""

import dataclasses
import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from tars_jax.adapters import Adapter, check_fits
from tars_jax.config import EngineConfig, SamplingParams
from tars_jax.engine.admission import Admission
from tars_jax.engine.decodes import MOST_STEPS
from tars_jax.engine.idle import IdleWork, Work
from tars_jax.engine.inflight import InFlight
from tars_jax.engine.pages import PageAllocator
from tars_jax.engine.prefixes import PrefixFolder, prefix_key
from tars_jax.engine.request import FinishReason, Output, Request, TokenLogprob, new_request_id
from tars_jax.engine.runner import Runner, Weights
from tars_jax.engine.sampler import read_mu, read_row
from tars_jax.engine.scheduler import Plan, Scheduler, Span
from tars_jax.engine.sequence import Sequence
from tars_jax.engine.sizing import resolve
from tars_jax.engine.stats import EngineStats, Meter
from tars_jax.engine.step import bucket_of
from tars_jax.errors import InvalidRequest, ServerBusy, TarsError
from tars_jax.kernels.build import cache_dir
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder

log = logging.getLogger(__name__)

MIN_STEP_TOKENS = 16  # smaller steps would not save memory worth having
RUN_SECONDS = 0.025  # of decodes that the host starts at once: longer ones would be seen by readers, and by whoever comes meanwhile
LONG_STEP = 0.04  # seconds; the host's part of a step is then small enough for the device to wait for it


class Engine:
    """Runs a model for many requests at once (continuous batching over a paged KV cache)."""

    def __init__(self, model: Model, config: EngineConfig | None = None, *, draft: Model | None = None, warm_up: bool = False) -> None:
        """``draft``: a small model of the same vocabulary that guesses tokens; answers do not change. ``warm_up`` compiles every step in
        the background; otherwise the larger ones wait until they are needed."""
        self.model, self.config = model, resolve(config or EngineConfig(), model, draft)
        self._wake = threading.Condition()
        self._changing = threading.Lock()  # of weights or adapters, by one thread at a time
        self._inbox: list[Callable[[], None]] = []
        self._sequences: dict[tuple[int, int], Sequence] = {}  # by request id and answer
        self._in_flight: InFlight | None = None
        self._idle: IdleWork | None = None
        self._meter = Meter()
        self._deadlines: list[tuple[float, int]] = []  # a heap, with the requests' ids
        self._current: Plan = ()  # whose step is being sent or read
        self._closing = self._draining = False
        self._max_step_tokens = self.config.max_step_tokens
        self._version, self._draft = 1, draft
        self._runner = Runner(model, self.config, draft, observe=self._meter.compiled)
        self._admission = Admission(model, self.config, draft)
        self._scheduler = self._new_scheduler()
        self._runner.compile_ahead(everything=warm_up)
        folder = Path(self.config.prefix_folder or cache_dir() / "prefixes")
        self._prefixes = PrefixFolder(folder, self.config.prefix_bytes) if self.config.prefix_bytes else None
        if self._prefixes:
            self._prefixes.restore(prefix_key(self.model, self._draft, self.config), self._scheduler, self._runner)
        self._thread = threading.Thread(target=self._loop, name=f"engine {model.name}", daemon=True)
        self._thread.start()

    # What other threads call.

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ContextOverflow, InvalidRequest or ServerBusy; later faults go to the request's sink."""
        self._runner.adapters.find(request.adapters)
        sequences = self._admission.sequences(request)
        with self._wake:
            if self._closing or self._draining:
                raise ServerBusy("the engine is shutting down")
            if len(self._scheduler.waiting) + len(self._inbox) >= self.config.max_queue:
                raise ServerBusy("server busy, please try again.  maximum pending requests exceeded")
            self._post(lambda: self._admit(sequences))

    def cancel(self, request_id: int) -> None:
        """Stop a request; its sink gets a last output, unless it has ended already."""
        with self._wake:
            self._post(lambda: self._end(request_id))

    def generate(self, prompt: str | SequenceOf[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Text of one answer, piece by piece; closing the iterator cancels the request."""
        ids = self.model.tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else prompt
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        request = Request(new_request_id(), tuple(ids), dataclasses.replace(params or SamplingParams(), n=1), outputs.put)
        self.submit(request)
        try:
            while True:
                output = outputs.get()
                if output.text:
                    yield output.text
                if output.error:
                    raise TarsError(output.error)
                if output.finish_reason:
                    return
        finally:
            self.cancel(request.id)

    def settle(self) -> None:
        """Wait until nothing is being compiled in the background: what is measured then is the engine at its best."""
        self._runner.settle()

    def stats(self) -> EngineStats:
        """A snapshot; cheap, from any thread."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            num_pages=scheduler.pages.num_pages,
            free_pages=scheduler.pages.num_free,
            nbytes=self._runner.nbytes,
            weights_version=self._version,
            compiled_steps=tuple(self._runner.compiled()),
            kept_pages=scheduler.pages.num_kept,
            evicted_pages=scheduler.pages.num_evictions,
            reused_tokens=scheduler.num_reused,
            missed_tokens=scheduler.num_missed,
            preemptions=scheduler.num_preemptions,
            **self._meter.numbers(),
        )

    def swap(self, params: Decoder, version: int | None = None) -> int:
        """Serve other weights from the next step on, and return their version: the next number, or ``version``, one that this engine
        has not had. No stream is dropped: those under way keep what is cached and go on with the new weights; adapters stay.

        Waits, while the engine goes on, for what must be compiled, as `expect`. Raises InvalidRequest for weights of another model.
        """
        with self._changing:
            self._use(self._runner.prepared(params), self._version + 1 if version is None else version)
            return self._version

    def expect(self, params: Decoder, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compile what a later `swap` to weights of such a structure needs, until it is ``stopped``. Raises InvalidRequest for weights
        of another model."""
        with self._changing:
            self._runner.prepared(params, stopped=stopped)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """From now on requests may name this adapter; those under way with an earlier one of that name go on with it.

        Waits as `swap` does when all ranks are taken (their number doubles) or a weight is updated for the first time. Raises
        InvalidRequest for an adapter of another model, and for norms and steering vectors.
        """
        if adapter.norms or adapter.steering:
            raise InvalidRequest(f"{adapter.source}: requests can choose LoRA adapters; load norms and steering vectors with the model")
        if self.config.tensor_parallel > 1:
            raise InvalidRequest("a model that is split over devices cannot have adapters")
        check_fits(self.model.params, adapter)
        with self._changing:
            used = {share.id for sequence in list(self._sequences.values()) for share in sequence.adapters}
            adapters = self._runner.adapters.adding(name, adapter, used)
            self._use(self._runner.prepared(adapters=adapters), self._version)

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for this adapter; those under way go on with it. Raises InvalidRequest for an unknown name."""
        with self._changing:
            self._runner.adapters.find([(name, 1.0)])
            self._use(self._runner.prepared(adapters=self._runner.adapters.removing(name)), self._version)

    def _use(self, weights: Weights, version: int) -> None:
        def change() -> None:
            self._runner.use(weights)
            self._version = self._scheduler.root = version  # keys and values of other weights are of no use

        if not self._between_steps(change):
            raise TarsError("the engine is closed")

    def work_when_idle(self, work: Work | None, share: float = 0.0) -> None:
        """Let the engine's thread call ``work``, a slice at a time, while it has nothing else to do, and for a ``share`` of the time in
        which it has; in the place of what it called before. None: nothing more. When this returns, the earlier work has ended."""

        def change() -> None:
            self._idle = IdleWork(work, share) if work else None

        self._between_steps(change)

    def _between_steps(self, change: Callable[[], object]) -> bool:
        """Let the engine's thread make a change, and wait for it; False if the engine is closed."""
        done: Future[object] = Future()
        with self._wake:
            if self._closing:
                return False
            self._post(lambda: done.set_result(change()))
        done.result()
        return True

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those there finish for ``drain_seconds``, cancel the rest, end the thread. Idempotent."""
        self._runner.stop_compiling()
        deadline = time.monotonic() + drain_seconds
        with self._wake:
            self._draining = True
            while (self._sequences or self._inbox) and not self._closing and (left := deadline - time.monotonic()) > 0:
                self._wake.wait(min(left, 0.1))
            self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What the engine's own thread does.

    def _loop(self) -> None:
        while not self._closing:
            with self._wake:
                while not (self._inbox or self._is_busy or self._idle or self._closing):
                    self._wake.wait()
                inbox, self._inbox = self._inbox, []
            for message in inbox:
                message()
            try:
                self._expire()
                if self._idle and not self._idle.run(idle=not self._is_busy):
                    self._idle = None
                self._step()
            except Exception as error:
                self._recover(error)
        with self._wake:
            inbox, self._inbox = self._inbox, []
        for message in inbox:  # nobody waits for ever
            message()
        for sequence in list(self._sequences.values()):
            self._end(sequence.request.id)
        if self._prefixes and self._version == 1:  # other weights than the file's are gone with the engine
            self._prefixes.keep(prefix_key(self.model, self._draft, self.config), self._scheduler, self._runner)
        self._runner.close()

    @property
    def _is_busy(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None

    def _step(self) -> None:
        """Plan a step and send it off, then read the one before: the host works while the device does. A long step is read first, and
        the next one planned when those who came meanwhile have been let in."""
        if self._in_flight and self._meter.times.predict(self._in_flight.bucket) > LONG_STEP:
            return self._commit()
        plan = self._current = self._prolonged(self._scheduler.schedule(self._budget()))
        dispatched = self._dispatch(plan) if plan else None
        if self._in_flight:
            self._commit()
        if dispatched and dispatched.out is None:  # now that the tokens before are known, masks can be made while the device works
            self._current = plan
            dispatched = self._sample(dispatched)
        self._in_flight = dispatched

    def _prolonged(self, plan: Plan) -> Plan:
        """The plan, as one program of decodes where these are short and nobody waits: then the host's part counts."""
        if not plan or self._inbox or len(plan) < len(self._scheduler.running):
            return plan
        each = self._meter.times.predict(bucket_of(len(plan)))
        if not 0 < each <= LONG_STEP or not self._runner.decodes_ready(len(plan)):
            return plan
        together = min(RUN_SECONDS, self.config.target_inter_token_ms / 1000)
        return self._scheduler.prolong(plan, max(min(int(together / each), MOST_STEPS), 1))

    def _budget(self) -> int:
        """Tokens of the next step. Alone a request may have them all."""
        running = self._scheduler.running
        if len(running) + len(self._scheduler.waiting) <= 1:
            return self._max_step_tokens
        decodes = sum(sequence.remaining == 1 for sequence in running)
        return self._meter.times.budget(self.config.target_inter_token_ms / 1000, decodes, self._max_step_tokens)

    def _dispatch(self, plan: Plan) -> InFlight:
        if plan[0].steps:
            bucket, out = self._runner.decode(plan)
            return InFlight(plan, bucket, None, None, time.perf_counter(), out)
        step = InFlight(plan, *self._runner.send(plan), time.perf_counter())
        return step if any(span.sequence.awaits_mask for span in plan) else self._sample(step)

    def _sample(self, step: InFlight) -> InFlight:
        assert step.last is not None
        return step._replace(out=self._runner.sample(step.plan, step.last)) if step.samples else step

    def _commit(self) -> None:
        assert self._in_flight is not None
        step, self._in_flight = self._in_flight, None
        self._current = step.plan
        out = None if step.out is None else np.asarray(step.out)
        if out is not None and step.is_run:
            return self._take_run(step, out)
        hidden = step.wait()
        self._measure(step, 1)
        rows = iter(() if out is None else out)
        at = 0  # of a span's tokens in the step
        for span in step.plan:
            if span.sequence.wants_prompt_logprobs:
                span.sequence.score(span.start + 1, self._runner.score(hidden, at, span))
            at += span.tokens
            if span.samples:
                self._take(span, [next(rows) for _ in range(1 + len(span.guesses))])

    def _measure(self, step: InFlight, steps: int) -> None:
        seconds = self._meter.step(step.plan, step.bucket, step.sent, steps)
        if self._idle:
            self._idle.serve(seconds)

    def _take(self, span: Span, rows: list[np.ndarray]) -> None:
        sequence = span.sequence
        sampled = [read_row(row, sequence.params.top_logprobs) for row in rows]
        sequence.mu = read_mu(rows[0])
        accepted = sequence.accept([token for token, _ in sampled], [read for _, read in sampled[1:]])
        self._count(sequence, output_tokens=1 + accepted, drafted_tokens=len(span.guesses), accepted_tokens=accepted)

    def _take_run(self, step: InFlight, out: np.ndarray) -> None:
        taken = out[: int((out[:, 0, 0] >= 0).sum()), : len(step.plan), 0]  # [steps, rows]
        self._measure(step, len(taken))
        for span, tokens in zip(step.plan, taken.T.tolist(), strict=True):
            without = [TokenLogprob(token, 0.0) for token in tokens]  # log-probabilities: nobody in a run wants them
            self._count(span.sequence, output_tokens=span.sequence.take(without))

    def _count(self, sequence: Sequence, **tokens: int) -> None:
        """What a sequence got, which may have been the end of it."""
        self._meter.count(**tokens)
        if sequence.finish_reason:
            self._forget(sequence)

    def _admit(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            request = sequence.request
            try:
                sequence.adapters = self._runner.adapters.find(request.adapters)
            except InvalidRequest as error:  # it was removed since the request was checked
                sequence.finish("error", error=str(error))
                continue
            if sequence.max_tokens == 0:
                sequence.finish("length")
                continue
            self._sequences[request.id, sequence.index] = sequence
            self._scheduler.add(sequence)
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, request.id))

    def _expire(self) -> None:
        """End the requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, request_id = heapq.heappop(self._deadlines)
            self._end(request_id, "timeout")

    def _end(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        for sequence in [s for s in self._sequences.values() if s.request.id == request_id]:
            sequence.finish(reason)
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if self._sequences.pop((sequence.request.id, sequence.index), None):
            self._scheduler.release(sequence)

    def _recover(self, error: Exception) -> None:
        """After a failed step: its requests end, all others start again from an empty state. When memory ran out nobody ends as long
        as smaller steps can be tried."""
        self._meter.count(failures=1)
        failed = {span.sequence for span in self._current}
        out_of_memory = "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError)
        if out_of_memory and self._max_step_tokens > MIN_STEP_TOKENS:
            self._max_step_tokens = max(self._max_step_tokens // 2, MIN_STEP_TOKENS)
            log.warning("a step ran out of memory; steps are at most %d tokens from now on", self._max_step_tokens)
            failed = set()
        else:
            log.exception("a step failed; its requests end, the engine goes on")
        for sequence in failed:
            sequence.finish("error", error=f"the engine failed: {error}")
            self._sequences.pop((sequence.request.id, sequence.index), None)
        self._reset()
        for sequence in self._sequences.values():  # in the order of their arrival
            sequence.restart(unread_lost=True)
            self._scheduler.add(sequence)

    def _reset(self) -> None:
        self._in_flight, self._current = None, ()
        self._runner.reset()
        old, self._scheduler = self._scheduler, self._new_scheduler()
        self._scheduler.num_preemptions = old.num_preemptions
        self._scheduler.num_reused, self._scheduler.num_missed = old.num_reused, old.num_missed

    def _new_scheduler(self) -> Scheduler:
        config = self.config
        scheduler = Scheduler(
            PageAllocator(self._runner.num_pages, config.page_size, max_kept=config.kept_tokens // config.page_size),
            max_rows=config.max_rows,
            max_step_tokens=self._max_step_tokens,
            reuse=config.prefix_cache,
            window=self.model.config.sliding_window,
        )
        scheduler.root = self._version
        return scheduler

    def _post(self, message: Callable[[], None]) -> None:
        self._inbox.append(message)
        self._wake.notify()
