"""Genetic algorithm: tournament selection, crossover, mutation, elitism, step sizes that adapt themselves.

The default takes each child's centre from several parents (gene pool recombination: Muehlenbein and Voigt, 1996; what it gains: Beyer,
Toward a Theory of Evolution Strategies, 1995) and mutates it with steps, and in directions, that the selected children's own mutations
teach: correlated mutations (Schwefel, Numerical Optimization of Computer Models, 1981) learnt as in :mod:`tars_jax.optim.gaussian`.
Differential crossover lets a child compete against its own parent, with weights and rates that individuals carry (Brest et al.,
Self-Adapting Control Parameters in Differential Evolution, 2006, https://doi.org/10.1109/TEVC.2006.872133). The classical operators
replace generations, with elites, and mutate with self-adaptive steps (Beyer and Schwefel, Evolution Strategies, 2002) or by the 1/5 rule
(Rechenberg, 1973).
"""

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim import operators
from tars_jax.optim.base import Info, Optimizer, Start, State, confined, draw, sampled, scatter, summarise
from tars_jax.optim.cmaes import rank_weights
from tars_jax.optim.gaussian import Covariance, Gaussian, continued, directions, learn, start_gaussian

Crossover = Literal["differential", "pool", "uniform", "blend", "sbx", "arithmetic"]
Mutation = Literal["gaussian", "cauchy", "polynomial"]
Adaptation = Literal["self", "fifth", "constant"]


PARENTS = 8  # of a child, that a pool is
TAU = 0.3  # of the log-normal step factors


@struct.dataclass
class GeneticParams:
    """Numbers of a genetic algorithm; all may be traced, and vmapped over to compare settings."""

    initial_step: float | Array = 1.0  # pool: in the space's initial steps
    covariance_rate: float | Array = 1.0  # pool: scales how fast the mutations' covariance is learnt
    crossover_rate: float | Array = 0.9  # share of children that come from several parents (pool: all); the others are mutated copies
    differential_weight: float | Array = 0.5  # initial length of a differential step
    differential_rate: float | Array = 0.9  # initial share of coordinates that it moves
    blend_alpha: float | Array = 0.366  # BLX: 0.366 keeps the population's variance, more widens it
    sbx_eta: float | Array = 10.0  # SBX: 2-5 explores, 15-20 refines
    polynomial_eta: float | Array = 20.0  # polynomial mutation: larger is smaller
    mutation_rate: float | Array = 1.0  # share of coordinates that mutate
    mutation_step: float | Array = 0.3  # initial step of carried mutations, in the space's initial steps


@struct.dataclass(kw_only=True)
class GeneticState(State):
    """A population, best first, and the strategy each individual carries."""

    x: Array  # [N, d], before reflection at bounds
    fitness: Array  # [N]
    sigma: Array  # [N, leaves] mutation steps, in initial steps
    weight: Array  # [N] differential weights
    rate: Array  # [N] differential crossover rates
    gaussian: Gaussian  # pool: of the mutations
    z: Array  # [N, d] standard numbers of the mutations asked for
    beyond: Array  # [N, d] and how far outside reflecting bounds they led
    asked: tuple[Array, ...]  # of the children asked for: sigma, weight, rate, and the fitness of the parent


@struct.dataclass(kw_only=True)
class GeneticAlgorithm(Optimizer[GeneticState]):
    """Genetic algorithm. ``noisy`` asks for the elites again, so that a lucky evaluation does not survive for ever.

    By default "pool" holds tournaments among 5, takes a quarter of the population as a child's parents and keeps no elites in
    it, which would pull the centre of the parents back (the best individual is remembered in any case); the other crossovers hold
    tournaments among 3 and keep 2 elites.
    """

    params: GeneticParams = struct.field(default_factory=GeneticParams)
    tournament_size: int | None = struct.field(pytree_node=False, default=None)
    elites: int | None = struct.field(pytree_node=False, default=None)
    crossover: Crossover = struct.field(pytree_node=False, default="pool")
    covariance: Covariance = struct.field(pytree_node=False, default="auto")  # pool: of the mutations
    mutation: Mutation = struct.field(pytree_node=False, default="gaussian")
    adaptation: Adaptation = struct.field(pytree_node=False, default="self")
    noisy: bool = struct.field(pytree_node=False, default=False)

    @property
    def takes_guests(self) -> bool:
        return True

    @property
    def pressure(self) -> int:
        """Individuals of a tournament."""
        return self.tournament_size or min(5 if self.crossover == "pool" else 3, self.pop_size)

    @property
    def kept(self) -> int:
        """Elites."""
        return self.elites if self.elites is not None else 0 if self.crossover == "pool" else 2

    def validate(self) -> None:
        Optimizer.validate(self)
        for name, value, known in (
            ("crossover", self.crossover, Crossover.__args__),  # type: ignore[attr-defined]
            ("mutation", self.mutation, Mutation.__args__),  # type: ignore[attr-defined]
            ("adaptation", self.adaptation, Adaptation.__args__),  # type: ignore[attr-defined]
        ):
            if value not in known:
                raise InvalidRequest(f"{name} {value!r} is none of {', '.join(known)}")
        if self.tournament_size is not None and not 1 <= self.tournament_size <= self.pop_size:
            raise InvalidRequest(f"tournament_size={self.tournament_size} must lie between 1 and pop_size={self.pop_size}")
        if not 0 <= self.kept < self.pop_size:
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
        step, shape = jnp.asarray(params.initial_step, x.dtype), self.covariance if self.crossover == "pool" else "separable"
        return GeneticState(
            **common,
            x=x,
            fitness=fitness,
            sigma=carried[0],
            weight=carried[1],
            rate=carried[2],
            gaussian=start_gaussian(common["best_x"], step, shape),
            z=jnp.zeros_like(x),
            beyond=jnp.zeros_like(x),
            asked=(*carried, fitness),
        )

    def adopt(self, state: GeneticState, start: Start, params: GeneticParams) -> GeneticState:
        """Begin with the best of ``start`` as the population, and mutation steps of its size."""
        order = jnp.resize(jnp.argsort(start.fitness), (self.pop_size,))
        x, fitness = start.x[order], start.fitness[order]
        sigma, gaussian = state.sigma * start.step, continued(state.gaussian, x[0], params.initial_step * start.step, start.shape)
        asked = (sigma, *state.asked[1:])
        return replace(state, x=x, fitness=fitness, sigma=sigma, gaussian=gaussian, asked=asked, best_x=x[0], best_f=fitness[0])

    def propose(self, state: GeneticState, params: GeneticParams) -> tuple[Array, GeneticState]:
        d, groups = state.space.size, state.space.num_groups
        parents = PARENTS if self.crossover == "pool" else 8  # 8: numbers that the others choose by
        u = draw(state, (self.pop_size, 2 * d + groups + 1 + parents))
        crossing, mutating, adapting, choosing = u[:, :d], u[:, d : 2 * d], u[:, 2 * d : -parents], u[:, -parents:].T
        z, unknown = self._noise(mutating, params), jnp.isinf(state.best_f)
        if self.crossover == "pool":
            parent = jnp.mean(state.x[operators.tournament(choosing, self.pop_size, self.pressure)], 0)
            parent, z = jnp.where(unknown, state.x, parent), z.at[0].multiply(jnp.where(unknown, 0, 1))  # x0 itself is the first
            child, beyond = sampled(state, state.gaussian, parent, z)
            carried: tuple[Array, ...] = (state.sigma, state.weight, state.rate, state.fitness)
        else:
            parent, child, carried = self._crossed(state, z, crossing, adapting, choosing, params)
            beyond = jnp.zeros_like(z)
            child = jnp.where(unknown, scatter(state, crossing), child)
        if self.noisy and self.kept:
            child = child.at[: self.kept].set(jnp.where(unknown, child[: self.kept], state.x[: self.kept]))
        return confined(state, child, parent), replace(state, z=z, beyond=beyond, asked=carried)

    def _crossed(
        self, state: GeneticState, noise: Array, crossing: Array, adapting: Array, choosing: Array, params: GeneticParams
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Children of two or three parents, and mutated copies: with their first parents and what they carry."""
        if self.crossover == "differential":
            parent, child, carried = self._differential(state, crossing, adapting, choosing)
        else:
            parent, child, carried = self._recombination(state, crossing, adapting, choosing, params)
        move = state.space.step[None] * carried[0][:, state.space.groups] * noise
        crossed = choosing[0][:, None] < params.crossover_rate
        if self.crossover == "differential":  # a difference is a mutation already
            move = jnp.where(crossed, 0, move)
        return parent, jnp.where(crossed, child, parent) + move, carried

    def _differential(
        self, state: GeneticState, crossing: Array, adapting: Array, choosing: Array
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Every individual moves towards a tournament's winner and along the difference of two others."""
        n = self.pop_size
        weight = jnp.where(choosing[1] < 0.1, 0.1 + 0.9 * choosing[2], state.weight)
        rate = jnp.where(choosing[3] < 0.1, choosing[4], state.rate)
        guide = state.x[operators.tournament(choosing[5], n, self.pressure)]
        first = 1 + operators.index(choosing[6], n - 1)
        second = 1 + (first + operators.index(choosing[7], n - 2)) % (n - 1)
        difference = state.x[(jnp.arange(n) + first) % n] - state.x[(jnp.arange(n) + second) % n]
        child = operators.differential(crossing, state.x, guide, difference, weight[:, None], rate[:, None])
        return state.x, child, (self._adapted(adapting, state.sigma), weight, rate, state.fitness)

    def _recombination(
        self, state: GeneticState, crossing: Array, adapting: Array, choosing: Array, params: GeneticParams
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Two parents by tournament and a child between them."""
        first, second = operators.tournament(choosing[5:7], self.pop_size, self.pressure)
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
        *carried, parents = state.asked
        x = x + state.beyond
        chosen = self._survivors(state, fitness)
        if self.crossover == "pool":
            state = replace(state, gaussian=self._taught(state, x, fitness, params))
        both = [
            jnp.concatenate(pair)
            for pair in zip((state.x, state.fitness, state.sigma, state.weight, state.rate), (x, fitness, *carried), strict=True)
        ]
        chosen = chosen[jnp.argsort(both[1][chosen])]
        x, held, sigma, weight, rate = (values[chosen] for values in both)
        if self.adaptation == "fifth":
            sigma = sigma * jnp.where(jnp.mean(fitness < parents) > 0.2, 1.5, 1.5**-0.25).astype(sigma.dtype)
        state = replace(state, x=x, fitness=held, sigma=sigma, weight=weight, rate=rate)
        return state, summarise(state, x, held, fitness, self._step(state), jnp.mean(chosen >= self.pop_size))

    def _survivors(self, state: GeneticState, fitness: Array) -> Array:
        """Who lives on, ``[N]`` of the N parents and the N children after them."""
        n, elites = self.pop_size, self.kept
        if self.crossover == "differential":
            won = (fitness <= state.fitness) | (self.noisy & (jnp.arange(n) < elites))
            return jnp.arange(n) + jnp.where(won, n, 0)
        if self.adaptation == "fifth" and self.crossover != "pool":  # the rule is one for the best of parents and children
            return jnp.argsort(jnp.concatenate([state.fitness, fitness]))[:n]
        if self.noisy:
            return jnp.arange(n, 2 * n)
        return jnp.concatenate([jnp.arange(elites), n + jnp.argsort(fitness)[: n - elites]])

    def _taught(self, state: GeneticState, x: Array, fitness: Array, params: GeneticParams) -> Gaussian:
        """What the mutations of the better children teach, and those of the worse ones."""
        order, z = jnp.argsort(fitness), state.z
        if self.mutation != "gaussian":
            z = directions(z)
        weights = jnp.asarray(rank_weights(self.pop_size), x.dtype)
        return learn(state.gaussian, z[order], x[order], fitness[order], weights, state.generation, params.covariance_rate)

    def _step(self, state: GeneticState) -> Array:
        """The step size, in initial steps."""
        if self.crossover == "pool":
            return state.gaussian.size
        if self.crossover == "differential":
            return jnp.sqrt(jnp.mean(jnp.var(state.x / state.space.step[None], 0)))
        return jnp.mean(state.sigma)

    def hand_over(self, state: GeneticState) -> Start:
        """The population, with the best individual ever in the place of the worst."""
        x = confined(state, state.x, state.x).at[-1].set(state.best_x)
        fitness = state.fitness.at[-1].set(state.best_f)
        spread = jnp.sqrt(jnp.mean(jnp.var(state.x / state.space.step[None], 0)))
        return Start(x, fitness, self._step(state), state.gaussian) if self.crossover == "pool" else Start(x, fitness, spread)
