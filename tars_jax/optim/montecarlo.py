"""Monte Carlo optimizers: cross-entropy, importance weighting, Metropolis walkers, tempered sequential Monte Carlo.

Rubinstein, The Cross-Entropy Method (1999); Theodorou, Buchli and Schaal, A Generalized Path Integral Control Approach (2010) and
Williams et al., Model Predictive Path Integral Control (2017) for Boltzmann weights; Del Moral, Doucet and Jasra, Sequential Monte Carlo
Samplers (2006); Roberts, Gelman and Gilks, Weak Convergence and Optimal Scaling of Random Walk Metropolis Algorithms (1997).
"""

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Info, Optimizer, Start, State, confined, draw, sampled, scatter, summarise
from tars_jax.optim.gaussian import Covariance, Gaussian, continued, learn, start_gaussian
from tars_jax.optim.operators import TINY, boltzmann, normal, systematic

Method = Literal["cross_entropy", "importance", "metropolis", "smc"]
BISECTIONS = 30  # of a temperature, each halves its interval


@struct.dataclass
class MonteCarloParams:
    """Numbers of the Monte Carlo methods."""

    initial_step: float | Array = 1.0  # in the space's initial steps
    elite_share: float | Array = 0.5  # cross-entropy: share of the population that is followed, by logarithmic rank weights
    effective_share: float | Array = 0.3  # importance: effective sample size that sets the temperature, as a share
    surviving_share: float | Array = 0.9  # smc: effective sample size that sets the next temperature, as a share
    covariance_rate: float | Array = 1.0  # cross-entropy, importance: scales how fast the covariance is learnt
    temperature: float | Array = 0.1  # metropolis: in standard deviations of the first generation's fitness
    acceptance: float | Array = 0.234  # metropolis, smc: what the walkers' steps are tuned to


@struct.dataclass(kw_only=True)
class MonteCarloState(State):
    """A distribution, or walkers."""

    gaussian: Gaussian
    z: Array  # [N, d] standard normal numbers of the population asked for
    beyond: Array  # [N, d] and how far outside reflecting bounds it was drawn
    x: Array  # [N, d] walkers
    fitness: Array  # [N]
    temperature: Array


@struct.dataclass(kw_only=True)
class MonteCarlo(Optimizer[MonteCarloState]):
    """Monte Carlo optimizer.

    ``cross_entropy`` follows a normal distribution's best samples, ``importance`` weighs all of them by exp(-fitness / temperature);
    ``metropolis`` sends walkers at a fixed temperature, ``smc`` cools them by effective sample size and resamples.
    """

    params: MonteCarloParams = struct.field(default_factory=MonteCarloParams)
    method: Method = struct.field(pytree_node=False, default="cross_entropy")
    covariance: Covariance = struct.field(pytree_node=False, default="auto")

    def validate(self) -> None:
        Optimizer.validate(self)
        if self.method not in ("cross_entropy", "importance", "metropolis", "smc"):
            raise InvalidRequest(f"method {self.method!r} is none of cross_entropy, importance, metropolis, smc")

    @property
    def walks(self) -> bool:
        return self.method in ("metropolis", "smc")

    def begin(self, common: dict[str, Any], params: MonteCarloParams) -> MonteCarloState:
        x, n = common["best_x"], self.pop_size
        gaussian = start_gaussian(x, jnp.asarray(params.initial_step, x.dtype), "separable" if self.walks else self.covariance)
        walkers = jnp.broadcast_to(x, (n if self.walks else 0, x.size))
        fitness = jnp.full(walkers.shape[:1], jnp.inf, x.dtype)
        z = jnp.zeros((n, x.size), x.dtype)
        return MonteCarloState(**common, gaussian=gaussian, z=z, beyond=z, x=walkers, fitness=fitness, temperature=common["best_f"])

    def adopt(self, state: MonteCarloState, start: Start, params: MonteCarloParams) -> MonteCarloState:
        """Begin at the best of ``start`` with its step size; walkers at its individuals."""
        best, order = jnp.argmin(start.fitness), jnp.resize(jnp.argsort(start.fitness), state.fitness.shape)
        gaussian = continued(state.gaussian, start.x[best], start.step, start.shape)
        state = replace(state, gaussian=gaussian, best_x=start.x[best], best_f=start.fitness[best])
        return replace(state, x=start.x[order], fitness=start.fitness[order]) if self.walks else state

    def propose(self, state: MonteCarloState, params: MonteCarloParams) -> tuple[Array, MonteCarloState]:
        u = draw(state, state.z.shape)
        z = normal(u)
        if self.walks:
            x = jnp.where(jnp.isinf(state.best_f), scatter(state, u), state.x + state.space.step[None] * state.gaussian.moves(z))
            x, beyond = confined(state, x, state.x), jnp.zeros_like(x)
        else:
            x, beyond = sampled(state, state.gaussian, jnp.broadcast_to(state.gaussian.mean[None], z.shape), z)
        return x, replace(state, z=z, beyond=beyond)

    def update(self, state: MonteCarloState, x: Array, fitness: Array, params: MonteCarloParams) -> tuple[MonteCarloState, Info]:
        if self.walks:
            return self._walk(state, x, fitness, params)
        if self.method == "cross_entropy":
            weights = elite_weights(fitness, params.elite_share)
        else:
            weights = boltzmann_weights(fitness, params.effective_share)
        gaussian = learn(state.gaussian, state.z, x + state.beyond, fitness, weights, state.generation, params.covariance_rate)
        state = replace(state, gaussian=gaussian)
        return state, summarise(state, x, fitness, fitness, gaussian.size, jnp.mean(weights > 0))

    def _walk(self, state: MonteCarloState, x: Array, fitness: Array, params: MonteCarloParams) -> tuple[MonteCarloState, Info]:
        """Metropolis acceptance, then for smc a lower temperature and walkers drawn by their weights."""
        n, first = self.pop_size, jnp.all(jnp.isinf(state.fitness))
        u = draw(state, (n + 1,), stream=1)
        temperature = jnp.where(first, params.temperature * _spread(fitness), state.temperature)
        rise = jnp.where(jnp.isinf(state.fitness), -jnp.inf, fitness - state.fitness)
        accepted = jnp.log(u[:n]) * temperature < -rise
        walkers, held = jnp.where(accepted[:, None], x, state.x), jnp.where(accepted, fitness, state.fitness)
        if self.method == "smc":
            temperature = jnp.where(first, _spread(held), temperature)
            weights, temperature = _tempered(held, temperature, params.surviving_share)
            chosen = systematic(weights, u[n])
            walkers, held = walkers[chosen], held[chosen]
        gaussian = self._tuned(state, walkers, jnp.where(first, params.acceptance, jnp.mean(accepted)), params)
        state = replace(state, x=walkers, fitness=held, temperature=temperature, gaussian=gaussian)
        return state, summarise(state, walkers, held, fitness, gaussian.sigma, jnp.mean(accepted))

    def _tuned(self, state: MonteCarloState, walkers: Array, accepted: Array, params: MonteCarloParams) -> Gaussian:
        """Proposals in the shape of the walkers' own spread, and of a size that is accepted as often as it should be."""
        spread = jnp.std(walkers / state.space.step[None], 0)
        size = jnp.sqrt(jnp.mean(spread**2))
        shape = jnp.where(size > 0, jnp.maximum(spread / jnp.where(size > 0, size, 1), 0.1), 1)
        rate = 1 / jnp.sqrt(state.generation.astype(walkers.dtype))
        sigma = state.gaussian.sigma * jnp.exp(jnp.maximum(rate, 0.1) * (accepted - params.acceptance) / params.acceptance)
        start = 2.38 / state.space.size**0.5
        return replace(state.gaussian, factor=shape, sigma=jnp.where(state.generation == 1, start * params.initial_step, sigma))

    def hand_over(self, state: MonteCarloState) -> Start:
        if self.walks:
            return Start(state.x, state.fitness, state.gaussian.sigma)
        return Start(state.best_x[None], state.best_f[None], state.gaussian.size, state.gaussian)


def elite_weights(fitness: Array, share: float | Array) -> Array:
    """Weights ``[N]`` of the best ``share`` by logarithmic rank, summing to one; those of the others push away."""
    n = fitness.shape[0]
    rank = jnp.argsort(jnp.argsort(fitness)).astype(fitness.dtype)
    raw = jnp.log(jnp.maximum(share * n, 1) + 0.5) - jnp.log(rank + 1)
    return jnp.where(raw > 0, raw / jnp.sum(jnp.maximum(raw, 0)), raw)


def boltzmann_weights(fitness: Array, share: float | Array) -> Array:
    """Weights ``exp(-fitness / temperature)`` summing to one, at the temperature where their effective number is ``share`` of N."""
    spread = _spread(fitness)
    return _tempered(fitness, spread * 1e6, share)[0]


def _spread(fitness: Array) -> Array:
    """Standard deviation of the finite values; positive."""
    finite = jnp.isfinite(fitness)
    count = jnp.maximum(jnp.sum(finite), 1).astype(fitness.dtype)
    mean = jnp.sum(jnp.where(finite, fitness, 0)) / count
    deviation = jnp.sqrt(jnp.sum(jnp.where(finite, (fitness - mean) ** 2, 0)) / count)
    return jnp.where(deviation > 0, deviation, TINY)


def _tempered(fitness: Array, temperature: Array, share: float | Array) -> tuple[Array, Array]:
    """Weights that move walkers from ``temperature`` to a lower one, and that one: where their effective number is ``share`` of N.

    The inverse temperature's rise is bisected on a logarithmic scale, as Del Moral et al. do on a linear one.
    """
    scale = 1 / _spread(fitness)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        few = 1 / jnp.sum(boltzmann(fitness, scale * jnp.exp(middle)) ** 2) < share * fitness.shape[0]
        return jnp.where(few, low, middle), jnp.where(few, middle, high)

    start = jnp.zeros((), fitness.dtype)
    rise = scale * jnp.exp(lax.fori_loop(0, BISECTIONS, halve, (start - 12, start + 12))[0])
    return boltzmann(fitness, rise), 1 / (1 / temperature + rise)
