"""Evolving models that are being served: one job a model, in the idle time of its engine.

A job's life: its request is checked; its model is held, loaded first if need be, and the examples are encoded; a thread of low priority
compiles what the search and the engine will run; then the engine's own thread runs the search, a slice at each turn, and reports
through a queue; improvements are swapped in while the search goes on. It ends by itself, is stopped, or gives way when its model must
leave. Everything here runs on one event loop.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from api.background import in_background, in_idle_time
from api.job import Job, check, encode
from api.models import Loaded, Models
from api.optimization_metrics import OptimizationMetrics
from api.schema import OptimizeRequest
from tars_jax.engine.versions import Version, Versions, apply
from tars_jax.errors import TarsError

if TYPE_CHECKING:
    from tars_jax.evolve.evolution import Evolution
    from tars_jax.evolve.live import Report

log = logging.getLogger(__name__)

SHARE = 0.1  # of the time in which requests are served, that a search may take from them
MOST_JOBS = 64  # remembered after their end


class DisabledError(TarsError):
    """The server does not let clients change its models."""

    status = 403


class JobRunningError(TarsError):
    """The model has a job already."""

    status = 409


class JobNotFoundError(TarsError):
    """No such job."""

    status = 404


class Jobs:
    """The jobs of a server."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._metrics = OptimizationMetrics(models.telemetry.registry)
        self._jobs: dict[str, Job] = {}  # oldest first

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def find(self, job_id: str) -> Job:
        """Raises JobNotFoundError."""
        if job_id not in self._jobs:
            raise JobNotFoundError(f"there is no optimization job {job_id!r}")
        return self._jobs[job_id]

    async def start(self, request: OptimizeRequest) -> Job:
        """Begin a job; when this returns its model is loaded and its data are known to be good. Leaving does not stop it.

        Raises:
            InvalidRequest, ModelNotFound, DisabledError, JobRunningError; what loading a model raises.
        """
        if not self._models.settings.optimization:
            raise DisabledError("optimization is turned off on this server (TARS_OPTIMIZATION=0)")
        settings, limits = check(request)
        versions = self._models.versions(self._models.store.find(request.model_name))
        if running := self._running(versions):
            raise JobRunningError(f"model '{request.model_name}' is being optimized by job {running.id}; wait for it or stop it first")
        job = Job(request, settings, limits, versions)
        self._forget_old()
        self._jobs[job.id] = job
        job.ready.add_done_callback(asyncio.Future.exception)  # the client may have gone
        job.task = asyncio.create_task(self._run(job))
        await asyncio.shield(job.ready)
        return job

    async def stop(self, job: Job) -> None:
        """End a job and wait until it has ended; what was accepted stays. Nothing happens to one that has ended."""
        job.is_stopping = True
        if job.task is not None:
            await asyncio.wait([job.task])

    async def roll_back(self, name: str, number: int | None) -> Version:
        """Serve the weights of an earlier version again; a running job, which would undo it, is stopped.

        Raises InvalidRequest, ModelNotFound; what loading a model raises.
        """
        versions = self._models.versions(self._models.store.find(name))
        if number is not None:
            versions.find(number)
        if running := self._running(versions):
            await self.stop(running)
        async with self._models.use(name, num_ctx=self._models.context_of(name)) as loaded:
            version = await asyncio.to_thread(versions.roll_back, loaded.engine, number)
        self._metrics.swaps.labels(loaded.name).inc()
        return version

    async def close(self) -> None:
        """Stop all jobs."""
        for job in self.all():
            await self.stop(job)

    def _running(self, versions: Versions) -> Job | None:
        return next((job for job in self._jobs.values() if job.versions is versions and not job.is_done), None)

    def _forget_old(self) -> None:
        ended = [job for job in self._jobs.values() if job.is_done]
        for job in ended[: len(ended) + 1 - MOST_JOBS]:
            del self._jobs[job.id]

    async def _run(self, job: Job) -> None:
        """A job from its beginning to its end."""
        try:
            async with self._hold(job) as loaded:
                await self._search(job, loaded)
        except Exception as error:
            if job.ready.done():
                log.warning("optimization job %s failed", job.id, exc_info=error)
            else:  # it never began: whoever asked for it hears why, and nobody else needs to
                del self._jobs[job.id]
                job.ready.set_exception(error)
            job.update(status="failed", error=error, reason="it failed")

    def _hold(self, job: Job) -> contextlib.AbstractAsyncContextManager[Loaded]:
        """The model as it is loaded already, else as the server loads it."""
        name = job.request.model_name
        return self._models.use(name, num_ctx=self._models.context_of(name), keep_alive=job.request.keep_alive)

    async def _search(self, job: Job, loaded: Loaded) -> None:
        from tars_jax.evolve import live
        from tars_jax.evolve.evolution import Evolution

        examples, held = await asyncio.to_thread(encode, job, loaded.model)
        job.request = dataclasses.replace(job.request, data=(), eval=())  # a job is remembered longer than they are needed
        if job.request.batch is None:
            job.settings = dataclasses.replace(job.settings, batch=live.batch_size(examples))
        job.ready.set_result(None)
        job.update(status="preparing")

        def stopped() -> bool:  # its model must leave: requests for another context, or for another model, go first
            return job.is_stopping or loaded.is_closing

        start = job.versions.current
        params = await asyncio.to_thread(apply, loaded.model.params, start)
        evolution = Evolution(loaded.model, examples, job.settings, params=params, slice_tokens=live.SLICE_TOKENS)
        likely = await in_background(lambda: live.compile_ahead(evolution, held, stopped))
        if likely is not None and job.request.accept == "auto":  # what will serve an improvement
            future = apply(loaded.model.params, Version(adapters=(*start.adapters, likely)))
            await in_background(lambda: loaded.engine.expect(future, stopped))
        slices = live.search(evolution, held, dataclasses.replace(job.limits, general_loss=job.versions.general_loss), stopped)
        count = self._metrics.cycles.labels(loaded.name).inc
        if not stopped():
            async with contextlib.aclosing(in_idle_time(loaded.engine, slices, SHARE, count)) as reports:
                async for report in reports:
                    await self._take(job, loaded, report, start, evolution)
        if stopped():
            job.update(status="stopped", reason="it was stopped" if job.is_stopping else "its model had to leave")
        else:
            job.update(status="success", reason=job.reason or "nothing better was found")

    async def _take(self, job: Job, loaded: Loaded, report: "Report", start: Version, evolution: "Evolution") -> None:
        """What a search reports: noted, and an improvement is swapped in."""
        name = loaded.name
        if report.before is not None:
            job.versions.general_loss = job.versions.general_loss or report.before.general_loss
            job.update(status="searching", before=report.before, check=report.before, started=time.monotonic())
        if report.metrics is not None:
            self._metrics.generations.labels(name).inc()
            self._metrics.best.labels(name).set(report.metrics.best)
            job.update(generation=report.metrics.generation, best=report.metrics.best, mean=report.metrics.mean)
        if report.refused:
            self._metrics.rejected.labels(name).inc()
        if report.improvement is not None:
            job.update(check=report.check, served=report.check, reason="it is better on the held-out examples")
        elif report.check is not None:
            job.update(check=report.check, reason=job.reason if job.served else report.refused or "")

        if report.improvement is None or report.check is None or job.request.accept == "never":
            return
        assert job.before is not None
        found = Version(
            kind="optimized",
            adapters=(*start.adapters, await asyncio.to_thread(evolution.adapter, report.improvement)),
            job=job.id,
            generation=job.generation,
            before=job.before.score,
            after=report.check.score,
            general_loss=report.check.general_loss,
        )
        version = await in_background(lambda: job.versions.add(loaded.engine, found))
        self._metrics.swaps.labels(name).inc()
        job.update(version=version.number)
