"""The weights a model has been served with: the file's, and those that came of it in memory. They can be listed and gone back to.

A version is the file's weights and the adapters put on them, so that many cost little. Numbers are never given again and a version
never changes: going back to an older one makes a new version with the same weights, as a roll-back of a release does in Helm. The
current version is the latest. They outlive an engine: `Versions.serve` brings one that is new up to date.
"""

import dataclasses
import datetime
import threading
from typing import TYPE_CHECKING, Literal

from tars_jax.errors import InvalidRequest

if TYPE_CHECKING:
    from tars_jax.adapters import Adapter
    from tars_jax.engine.engine import Engine
    from tars_jax.model import Decoder

MOST = 16  # versions kept: the file's and the latest


@dataclasses.dataclass(frozen=True, eq=False)
class Version:
    """One set of weights. source: the version it was made from, or goes back to; job, generation: the search that found it;
    before, after: held-out score of the source's weights and of these; general_loss: on other text."""

    number: int = 1
    kind: Literal["file", "optimized", "rollback"] = "file"
    adapters: "tuple[Adapter, ...]" = ()
    created: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    source: int | None = None
    job: str = ""
    generation: int | None = None
    before: float | None = None
    after: float | None = None
    general_loss: float | None = None

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters)


class Versions:
    """The versions of one model, oldest first. For any thread but the engine's own: a change waits for it. general_loss: that of the
    file's weights on other text, once somebody has measured it."""

    def __init__(self) -> None:
        self.general_loss: float | None = None
        self._versions: tuple[Version, ...] = (Version(),)
        self._lock = threading.Lock()  # one change at a time

    def all(self) -> tuple[Version, ...]:
        return self._versions

    @property
    def current(self) -> Version:
        """What is served."""
        return self._versions[-1]

    def find(self, number: int) -> Version:
        """Raises InvalidRequest for a version that is not there, or no longer."""
        for version in self._versions:
            if version.number == number:
                return version
        known = ", ".join(str(version.number) for version in self._versions)
        raise InvalidRequest(f"there is no version {number} of the weights; there are {known}")

    def serve(self, engine: "Engine") -> None:
        """Make an engine that has just been made of the file serve the current version."""
        with self._lock:
            if self.current.kind != "file":
                engine.swap(apply(engine.model.params, self.current), self.current.number)

    def add(self, engine: "Engine", version: Version) -> Version:
        """Serve these weights from the next step on; the version returned has its number and its source."""
        with self._lock:
            return self._add(engine, dataclasses.replace(version, source=self.current.number))

    def roll_back(self, engine: "Engine", number: int | None = None) -> Version:
        """Go back to the weights of a version, the last one before the current if none is named. Raises InvalidRequest."""
        with self._lock:
            if number is None and len(self._versions) == 1:
                raise InvalidRequest("there is no earlier version of the weights to go back to")
            target = self._versions[-2] if number is None else self.find(number)
            return self._add(
                engine, dataclasses.replace(target, kind="rollback", created=datetime.datetime.now(datetime.UTC), source=target.number)
            )

    def _add(self, engine: "Engine", version: Version) -> Version:
        version = dataclasses.replace(version, number=self.current.number + 1)
        engine.swap(apply(engine.model.params, version), version.number)
        kept = self._versions if len(self._versions) < MOST else (self._versions[0], *self._versions[2:])
        self._versions = (*kept, version)
        return version


def apply(params: "Decoder", version: Version) -> "Decoder":
    """The file's parameters with the version's adapters on them."""
    from tars_jax.adapters import apply_adapter  # here: the server lists versions without jax

    for adapter in version.adapters:
        params = apply_adapter(params, adapter)
    return params
