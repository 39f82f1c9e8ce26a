"""Handlers of what other servers do not have: evolving a model that is being served, and the versions of its weights."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from api.decode import decode
from api.durations import timestamp
from api.job import Job, View
from api.jobs import Jobs
from api.models import Models
from api.schema import OptimizeRequest, RollbackRequest, SaveVersionRequest
from api.stream import JsonResponse, NdjsonResponse, read_body, until_disconnect
from tars_jax.engine.versions import Version
from tars_jax.errors import InvalidRequest
from tars_jax.store import Store, StoredModel

MAX_BODY = 64 << 20  # bytes


async def optimize(request: Request) -> Response:
    """POST /api/optimize: lines of progress, or the whole when it is done. A client that leaves does not stop the job."""
    body = decode(OptimizeRequest, await read_body(request, MAX_BODY))
    job = await until_disconnect(request.receive, _jobs(request).start(body))
    if body.stream:
        views = job.views()
        return NdjsonResponse(await anext(views), views)
    return JsonResponse(await until_disconnect(request.receive, _end(job)))


async def jobs(request: Request) -> Response:
    """GET /api/optimize"""
    return JsonResponse({"jobs": [job.view() for job in _jobs(request).all()]})


async def job(request: Request) -> Response:
    """GET /api/optimize/{id}"""
    return JsonResponse(_jobs(request).find(request.path_params["id"]).view())


async def stop(request: Request) -> Response:
    """DELETE /api/optimize/{id}: what was accepted stays."""
    job = _jobs(request).find(request.path_params["id"])
    await _jobs(request).stop(job)
    return JsonResponse(job.view())


async def versions(request: Request) -> Response:
    """GET /api/versions?model=NAME"""
    name = request.query_params.get("model", "")
    if not name:
        raise InvalidRequest("model is required")
    models: Models = request.app.state.models
    versions = models.versions(models.store.find(name))
    shown = [_shown(version) for version in versions.all()]
    return JsonResponse({"model": name, "current": versions.current.number, "versions": shown})


async def roll_back(request: Request) -> Response:
    """POST /api/versions/rollback"""
    body = decode(RollbackRequest, await read_body(request, MAX_BODY))
    return JsonResponse(_shown(await _jobs(request).roll_back(body.model_name, body.version)))


async def save(request: Request) -> Response:
    """POST /api/versions/save: a version as a model of its own, the same file and one more adapter layer."""
    body = decode(SaveVersionRequest, await read_body(request, MAX_BODY))
    if not body.model or not body.name:
        raise InvalidRequest("model and name are required: what is served, and what the new model is to be called")
    models: Models = request.app.state.models
    versions = models.versions(models.store.find(body.model))
    version = versions.current if body.version is None else versions.find(body.version)
    if not version.adapters:
        raise InvalidRequest(f"version {version.number} is the model as it came; /api/copy gives that another name")
    saved = await asyncio.to_thread(_save, models.store, body.model, version, body.name)
    return JsonResponse({"model": body.model, "version": version.number, "name": saved.name.short(), "digest": saved.digest})


def _save(store: Store, model: str, version: Version, name: str) -> StoredModel:
    from tars_jax.loaders.adapted import save_adapted

    return save_adapted(store, model, version.adapters, name)


async def _end(job: Job) -> View:
    """How it stands in the end."""
    async for _ in job.views():
        pass
    return job.view()


def _shown(version: Version) -> View:
    return {
        "version": version.number,
        "kind": version.kind,
        "source": version.source,
        "created_at": timestamp(version.created),
        "job": version.job or None,
        "generation": version.generation,
        "held_out_before": version.before,
        "held_out_after": version.after,
        "general_loss": version.general_loss,
        "size": version.nbytes,
    }


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs
