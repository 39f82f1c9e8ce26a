"""Genetic algorithm: tournament selection, crossover, mutation, elitism, step sizes that adapt themselves.

The default is the one of the operators here that does not depend on the axes: differential crossover towards a tournament's winner,
with a child competing against its own parent and each individual carrying its own weight and rate (Brest et al., Self-Adapting Control
Parameters in Differential Evolution, 2006, https://doi.org/10.1109/TEVC.2006.872133). The classical operators replace
generations, with elites, and mutate with self-adaptive steps (Beyer and Schwefel, Evolution Strategies, 2002) or by the 1/5 rule
(Rechenberg, 1973).
"""

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jax import Array

from tars_jax.errors import InvalidRequest
from tars_jax.optim import operators
from tars_jax.optim.base import Info, Optimizer, Start, State, confined, draw, scatter, summarise

Crossover = Literal["differential", "uniform", "blend", "sbx", "arithmetic"]
Mutation = Literal["gaussian", "cauchy", "polynomial"]
Adaptation = Literal["self", "fifth", "constant"]


TAU = 0.3  # of the log-normal step factors


@struct.dataclass
class GeneticParams:
    """Numbers of a genetic algorithm; all may be traced, and vmapped over to compare settings."""

    crossover_rate: float | Array = 0.9  # share of children that come from several parents; the others are mutated copies
    differential_weight: float | Array = 0.5  # initial length of a differential step
    differential_rate: float | Array = 0.9  # initial share of coordinates that it moves
    blend_alpha: float | Array = 0.366  # BLX: 0.366 keeps the population's variance, more widens it
    sbx_eta: float | Array = 10.0  # SBX: 2-5 explores, 15-20 refines
    polynomial_eta: float | Array = 20.0  # polynomial mutation: larger is smaller
    mutation_rate: float | Array = 1.0  # share of coordinates that mutate
    mutation_step: float | Array = 0.3  # initial step, in the space's initial steps


@struct.dataclass(kw_only=True)
class GeneticState(State):
    """A population, best first, and the strategy each individual carries."""

    x: Array  # [N, d]
    fitness: Array  # [N]
    sigma: Array  # [N, leaves] mutation steps, in initial steps
    weight: Array  # [N] differential weights
    rate: Array  # [N] differential crossover rates
    asked: tuple[Array, ...]  # of the children asked for: sigma, weight, rate, and the fitness of the parent


@struct.dataclass(kw_only=True)
class GeneticAlgorithm(Optimizer[GeneticState]):
    """Genetic algorithm. ``noisy`` asks for the elites again, so that a lucky evaluation does not survive for ever."""

    params: GeneticParams = struct.field(default_factory=GeneticParams)
    tournament_size: int = struct.field(pytree_node=False, default=3)
    elites: int = struct.field(pytree_node=False, default=2)
    crossover: Crossover = struct.field(pytree_node=False, default="differential")
    mutation: Mutation = struct.field(pytree_node=False, default="gaussian")
    adaptation: Adaptation = struct.field(pytree_node=False, default="self")
    noisy: bool = struct.field(pytree_node=False, default=False)

    @property
    def takes_guests(self) -> bool:
        return True

    def validate(self) -> None:
        Optimizer.validate(self)
        for name, value, known in (
            ("crossover", self.crossover, Crossover.__args__),  # type: ignore[attr-defined]
            ("mutation", self.mutation, Mutation.__args__),  # type: ignore[attr-defined]
            ("adaptation", self.adaptation, Adaptation.__args__),  # type: ignore[attr-defined]
        ):
            if value not in known:
                raise InvalidRequest(f"{name} {value!r} is none of {', '.join(known)}")
        if not 1 <= self.tournament_size <= self.pop_size:
            raise InvalidRequest(f"tournament_size={self.tournament_size} must lie between 1 and pop_size={self.pop_size}")
        if not 0 <= self.elites < self.pop_size:
            raise InvalidRequest(f"elites={self.elites} must lie between 0 and pop_size - 1 = {self.pop_size - 1}")

    def begin(self, common: dict[str, Any], params: GeneticParams) -> GeneticState:
        space, n = common["space"], self.pop_size
        x = jnp.broadcast_to(common["best_x"], (n, space.size))
        carried = (
            jnp.full((n, space.num_groups), params.mutation_step, x.dtype),
            jnp.full((n,), params.differential_weight, x.dtype),
            jnp.full((n,), params.differential_rate, x.dtype),
        )
        fitness = jnp.full((n,), jnp.inf, x.dtype)
        return GeneticState(**common, x=x, fitness=fitness, sigma=carried[0], weight=carried[1], rate=carried[2], asked=(*carried, fitness))

    def adopt(self, state: GeneticState, start: Start, params: GeneticParams) -> GeneticState:
        """Begin with the best of ``start`` as the population, and mutation steps of its size."""
        order = jnp.resize(jnp.argsort(start.fitness), (self.pop_size,))
        x, fitness = start.x[order], start.fitness[order]
        sigma = state.sigma * start.step
        return replace(state, x=x, fitness=fitness, sigma=sigma, asked=(sigma, *state.asked[1:]), best_x=x[0], best_f=fitness[0])

    def propose(self, state: GeneticState, params: GeneticParams) -> tuple[Array, GeneticState]:
        d, groups = state.space.size, state.space.num_groups
        u = draw(state, (self.pop_size, 2 * d + groups + 9))
        crossing, mutating, adapting, choosing = u[:, :d], u[:, d : 2 * d], u[:, 2 * d : -8], u[:, -8:].T
        if self.crossover == "differential":
            parent, child, carried = self._differential(state, crossing, adapting, choosing)
        else:
            parent, child, carried = self._recombination(state, crossing, adapting, choosing, params)
        move = state.space.step[None] * carried[0][:, state.space.groups] * self._noise(mutating, params)
        crossed = choosing[0][:, None] < params.crossover_rate
        if self.crossover == "differential":  # a difference is a mutation already
            move = jnp.where(crossed, 0, move)
        child = jnp.where(crossed, child, parent) + move
        unknown = jnp.isinf(state.best_f)
        child = jnp.where(unknown, scatter(state, crossing), child)
        if self.noisy and self.elites:
            child = child.at[: self.elites].set(jnp.where(unknown, child[: self.elites], state.x[: self.elites]))
        return confined(state, child, parent), replace(state, asked=carried)

    def _differential(
        self, state: GeneticState, crossing: Array, adapting: Array, choosing: Array
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Every individual moves towards a tournament's winner and along the difference of two others."""
        n = self.pop_size
        weight = jnp.where(choosing[1] < 0.1, 0.1 + 0.9 * choosing[2], state.weight)
        rate = jnp.where(choosing[3] < 0.1, choosing[4], state.rate)
        guide = state.x[operators.tournament(choosing[5], n, self.tournament_size)]
        first = 1 + operators.index(choosing[6], n - 1)
        second = 1 + (first + operators.index(choosing[7], n - 2)) % (n - 1)
        difference = state.x[(jnp.arange(n) + first) % n] - state.x[(jnp.arange(n) + second) % n]
        child = operators.differential(crossing, state.x, guide, difference, weight[:, None], rate[:, None])
        return state.x, child, (self._adapted(adapting, state.sigma), weight, rate, state.fitness)

    def _recombination(
        self, state: GeneticState, crossing: Array, adapting: Array, choosing: Array, params: GeneticParams
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Two parents by tournament and a child between them."""
        first, second = operators.tournament(choosing[5:7], self.pop_size, self.tournament_size)
        a, b = state.x[first], state.x[second]
        match self.crossover:
            case "uniform":
                child = operators.uniform(crossing, a, b)
            case "blend":
                child = operators.blend(crossing, a, b, params.blend_alpha)
            case "sbx":
                child = operators.simulated_binary(crossing, a, b, params.sbx_eta)
            case _:
                child = operators.arithmetic(crossing, a, b)
        sigma = self._adapted(adapting, jnp.sqrt(state.sigma[first] * state.sigma[second]))
        return a, child, (sigma, state.weight, state.rate, state.fitness[first])

    def _adapted(self, u: Array, sigma: Array) -> Array:
        """Log-normal self-adaptation: a factor for the individual, and with several leaves one for each."""
        if self.adaptation != "self":
            return sigma
        noise = TAU * operators.normal(u)
        return sigma * jnp.exp(noise[:, :1] + (noise[:, 1:] if sigma.shape[1] > 1 else 0))

    def _noise(self, u: Array, params: GeneticParams) -> Array:
        """Moves of the share ``mutation_rate`` of the coordinates: where u is below the rate, u / rate is uniform again."""
        mutated, u = u < params.mutation_rate, jnp.minimum(u / params.mutation_rate, 1 - 1e-6)
        match self.mutation:
            case "cauchy":
                noise = operators.cauchy(u)
            case "polynomial":
                noise = operators.polynomial(u, params.polynomial_eta)
            case _:
                noise = operators.normal(u)
        return jnp.where(mutated, noise, 0)

    def update(self, state: GeneticState, x: Array, fitness: Array, params: GeneticParams) -> tuple[GeneticState, Info]:
        n = self.pop_size
        *carried, parents = state.asked
        if self.crossover == "differential":
            won = (fitness <= state.fitness) | (self.noisy & (jnp.arange(n) < self.elites))
            chosen = jnp.arange(n) + jnp.where(won, n, 0)
        elif self.adaptation == "fifth":  # the rule is one for the best of parents and children
            chosen = jnp.argsort(jnp.concatenate([state.fitness, fitness]))[:n]
        elif self.noisy:
            chosen = jnp.arange(n, 2 * n)
        else:
            chosen = jnp.concatenate([jnp.arange(self.elites), n + jnp.argsort(fitness)[: n - self.elites]])
        both = [
            jnp.concatenate(pair)
            for pair in zip((state.x, state.fitness, state.sigma, state.weight, state.rate), (x, fitness, *carried), strict=True)
        ]
        chosen = chosen[jnp.argsort(both[1][chosen])]
        x, held, sigma, weight, rate = (values[chosen] for values in both)
        if self.adaptation == "fifth":
            sigma = sigma * jnp.where(jnp.mean(fitness < parents) > 0.2, 1.5, 1.5**-0.25).astype(sigma.dtype)
        state = replace(state, x=x, fitness=held, sigma=sigma, weight=weight, rate=rate)
        step = jnp.sqrt(jnp.mean(jnp.var(x / state.space.step[None], 0))) if self.crossover == "differential" else jnp.mean(sigma)
        return state, summarise(state, x, held, fitness, step, jnp.mean(chosen >= n))

    def hand_over(self, state: GeneticState) -> Start:
        step = jnp.sqrt(jnp.mean(jnp.var(state.x / state.space.step[None], 0)))
        return Start(state.x, state.fitness, step)
