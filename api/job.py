"""One optimization job: what was asked for, how it stands, what came of it."""

import asyncio
import dataclasses
import math
import secrets
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from api.durations import timestamp
from api.schema import OptimizeRequest
from api.stream import error_text
from tars_jax.engine.versions import Versions
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.settings import Settings

if TYPE_CHECKING:
    from tars_jax.evolve.data import Example
    from tars_jax.evolve.evaluation import Evaluation
    from tars_jax.evolve.live import Limits
    from tars_jax.loaders.loaded import Model

View = dict[str, Any]

MOST_EXAMPLES, MOST_HELD_OUT, MOST_MEMBERS, MOST_RANKS = 10_000, 1_000, 1_024, 64


@dataclasses.dataclass(eq=False)
class Job:
    """A search and what has come of it. ``status``: loading, preparing, searching; then success, stopped or failed."""

    request: OptimizeRequest
    settings: Settings
    limits: "Limits"
    versions: Versions
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(6))
    status: str = "loading"
    created_at: str = dataclasses.field(default_factory=timestamp)
    started: float | None = None  # time.monotonic(), of the search itself
    seconds: float = 0.0
    generation: int = 0
    best: float | None = None  # fitness of the latest generation
    mean: float | None = None
    before: "Evaluation | None" = None
    check: "Evaluation | None" = None  # the latest
    served: "Evaluation | None" = None  # of what was found, if it is better
    version: int | None = None  # of the weights, once an improvement is served
    reason: str = ""
    error: Exception | None = None
    is_stopping: bool = False
    task: "asyncio.Task[None] | None" = None
    ready: "asyncio.Future[None]" = dataclasses.field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def is_done(self) -> bool:
        return self.status in ("success", "stopped", "failed")

    def update(self, **changes: Any) -> None:
        """Change it, and wake those who follow it."""
        for name, value in changes.items():
            setattr(self, name, value)
        if self.started is not None:
            self.seconds = time.monotonic() - self.started
        self._changed.set()
        self._changed = asyncio.Event()

    async def views(self) -> AsyncGenerator[View, None]:
        """How it stands now and after every change, to its end. Whoever is slow misses some; leaving does not stop the job."""
        while True:
            changed = self._changed
            yield self.view()
            if self.is_done:
                return
            await changed.wait()

    def view(self) -> View:
        """How it stands, as JSON."""
        view: View = {"id": self.id, "model": self.request.model_name, "status": self.status, "created_at": self.created_at}
        view |= {"generation": self.generation, "best": _number(self.best), "mean": _number(self.mean)}
        checked = (self.check.score, self.check.general_loss) if self.check else (None, None)
        view |= {"held_out": checked[0], "general_loss": _number(checked[1])}
        view |= {"version": self.version, "seconds": round(self.seconds, 3)}
        if not self.is_done:
            return {**view, "time_left": round(max(self.limits.seconds - self.seconds, 0.0), 3), "done": False}
        if self.error is not None:
            view["error"] = error_text(self.error)
        return {**view, "done": True, "result": self._result()}

    def _result(self) -> View:
        return {
            "accepted": self.version is not None,
            "evaluations": self.generation * self.settings.population,
            "before": _plain(self.before),
            "after": _plain(self.served),
            "reason": self.reason,
        }


def _plain(evaluation: "Evaluation | None") -> View | None:
    if evaluation is None:
        return None
    return {name: _number(value) if isinstance(value, float) else value for name, value in dataclasses.asdict(evaluation).items()}


def _number(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def check(request: OptimizeRequest) -> "tuple[Settings, Limits]":
    """What a request asks for. Raises InvalidRequest."""
    from tars_jax.evolve.fitness import parse_fitness
    from tars_jax.evolve.live import Limits

    if not request.data:
        raise InvalidRequest('data is required: a list of {"prompt": ..., "completion": ...}')
    if request.accept not in ("auto", "never"):
        raise InvalidRequest(f'accept must be "auto" or "never", got {request.accept!r}')
    if request.space == "sampler":
        raise InvalidRequest("sampler settings are not searched beside serving; `tars optimize --space sampler` does it")
    for name, value, most in (
        ("data", len(request.data), MOST_EXAMPLES),
        ("eval", len(request.eval), MOST_HELD_OUT),
        ("population", request.population, MOST_MEMBERS),
        ("rank", request.rank, MOST_RANKS),
    ):
        if value > most:
            raise InvalidRequest(f"{name} must be at most {most} beside serving, got {value}; `tars optimize` has no such limit")
    parse_fitness(request.fitness)
    limits = Limits(request.seconds, request.generations, request.target)
    settings = Settings(
        space=request.space,  # type: ignore[arg-type]  # checked there
        strategy=request.strategy,  # type: ignore[arg-type]
        layers=request.layers,
        rank=request.rank,
        population=request.population,
        batch=Settings.batch if request.batch is None else request.batch,
        sigma=request.sigma,
        learning_rate=request.lr,
        momentum=request.momentum,
        decay=request.decay,
        fitness=request.fitness,
        max_new_tokens=request.max_new_tokens,
        horizon=request.generations or Settings.horizon,
        seed=request.seed,
    )
    return settings, limits


def encode(job: Job, model: "Model") -> "tuple[list[Example], list[Example]]":
    """Examples to search with and held-out ones. Raises InvalidRequest."""
    from tars_jax.evolve.data import encode_examples
    from tars_jax.evolve.job import split
    from tars_jax.evolve.live import check_lengths
    from tars_jax.evolve.space import choose_layers

    choose_layers(job.settings.layers, model.config)
    examples = encode_examples(job.request.data, model, source="data")
    check_lengths(examples, "data")
    if not job.request.eval:
        examples, held = split(examples, job.settings.seed)
        return examples, held[:MOST_HELD_OUT]
    held = encode_examples(job.request.eval, model, source="eval")
    check_lengths(held, "eval")
    return examples, held
