"""Islands: several populations of one optimizer side by side, by ``vmap``; without migration they are independent restarts."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Info, Optimizer, Start, State


@struct.dataclass(kw_only=True)
class IslandsState(State):
    """The islands' states, stacked along a leading axis."""

    islands: Any


@struct.dataclass(kw_only=True)
class Islands(Optimizer[IslandsState]):
    """``count`` populations of ``optimizer``, made by :func:`islands`; ``pop_size`` is that of all together."""

    optimizer: Optimizer[Any]
    count: int = struct.field(pytree_node=False)
    migrate_every: int = struct.field(pytree_node=False)

    @property
    def paced(self) -> bool:
        return self.optimizer.paced

    def validate(self) -> None:
        self.optimizer.validate()
        if self.count < 2 or self.migrate_every < 0:
            raise InvalidRequest(f"count={self.count} and migrate_every={self.migrate_every}: at least 2 islands, and 0 (never) or more")
        if self.migrate_every and not self.optimizer.takes_guests:
            raise InvalidRequest(f"{type(self.optimizer).__name__} learns from its own samples only: migrate_every must be 0")

    def begin(self, common: dict[str, Any], params: Any) -> IslandsState:
        keys = jax.random.split(common["key"], self.count)
        return IslandsState(**common, islands=jax.vmap(lambda key: self.optimizer.begin(common | {"key": key}, params))(keys))

    def adopt(self, state: IslandsState, start: Start, params: Any) -> IslandsState:
        """Every island begins with ``start``."""
        best = jnp.argmin(start.fitness)
        own = jax.vmap(lambda island: self.optimizer.adopt(island, start, params))(state.islands)
        return replace(state, islands=own, best_x=start.x[best], best_f=start.fitness[best])

    def propose(self, state: IslandsState, params: Any) -> tuple[Array, IslandsState]:
        x, own = jax.vmap(lambda island: self.optimizer.propose(island, params))(state.islands)
        if self.migrate_every:
            due = (state.generation > 0) & (state.generation % self.migrate_every == 0)
            x = x.at[:, -1].set(jnp.where(due, jnp.roll(own.best_x, 1, 0), x[:, -1]))
        return x.reshape(self.pop_size, -1), replace(state, islands=own)

    def update(self, state: IslandsState, x: Array, fitness: Array, params: Any) -> tuple[IslandsState, Info]:
        x, told = x.reshape(self.count, -1, x.shape[1]), fitness.reshape(self.count, -1)
        own, infos = jax.vmap(lambda island, x, told: self.optimizer.learn(island, x, told, params))(state.islands, x, told)
        return replace(state, islands=own), replace(jax.tree.map(jnp.max, infos), best=state.best_f, average=jnp.mean(infos.average))

    def hand_over(self, state: IslandsState) -> Start:
        starts = jax.vmap(self.optimizer.hand_over)(state.islands)
        return Start(starts.x.reshape(-1, starts.x.shape[-1]), starts.fitness.ravel(), jnp.mean(starts.step))


def islands(optimizer: Optimizer[Any], count: int = 4, migrate_every: int = 0) -> Islands:
    """``count`` populations of ``optimizer``; every ``migrate_every`` generations (0: never) each takes in its neighbour's best.

    They converge when the last of them does.
    """
    settings = {name: getattr(optimizer, name) for name in ("bounds", "mask", "step", "params")}
    return Islands(pop_size=count * optimizer.pop_size, optimizer=optimizer, count=count, migrate_every=migrate_every, **settings)
