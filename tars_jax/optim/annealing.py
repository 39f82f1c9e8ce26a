"""Simulated annealing: parallel chains, several tries a step, a calibrated temperature, steps tied to acceptance, reheating, exchange.

Kirkpatrick, Gelatt and Vecchi, Optimization by Simulated Annealing (1983); Szu and Hartley, Fast Simulated Annealing (1987) for Cauchy
moves; Ben-Ameur, Computing the Initial Temperature (2004); Liu, Liang and Wong, The Multiple-Try Method (2000); Swendsen and Wang, Replica
Monte Carlo (1986) for swaps; Hukushima and Iba, Population Annealing (2003) for resampling.
"""

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jax import Array

from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Info, Optimizer, Start, State, confined, draw, scatter, summarise
from tars_jax.optim.operators import boltzmann, cauchy, normal, systematic

Schedule = Literal["adaptive", "exponential", "cauchy"]
Exchange = Literal["resample", "swap", "none"]
TINY = 1e-30


@struct.dataclass
class AnnealingParams:
    """Numbers of simulated annealing."""

    initial_step: float | Array = 1.0  # in the space's initial steps
    initial_acceptance: float | Array = 0.1  # chance of the mean uphill move at the start: sets the first temperature
    final_acceptance: float | Array = 1e-6  # adaptive: the same when the cooling is done
    final_temperature: float | Array = 1e-6  # exponential: as a share of the first
    cooling_share: float | Array = 0.25  # share of the planned run over which the temperature falls
    acceptance: float | Array = 0.25  # share of tries that steps are tuned to
    step_rate: float | Array = 0.3  # how fast they are
    ladder: float | Array = 2.0  # swap: ratio of neighbouring chains' temperatures
    reheating: float | Array = 0.3  # temperature and step after a reheat, as shares of the first ones
    patience: float | Array = 0.1  # share of the planned run without a better individual that brings a reheat


@struct.dataclass(kw_only=True)
class AnnealingState(State):
    """Chains, and how hot they are."""

    x: Array  # [C, d]
    fitness: Array  # [C]
    sigma: Array  # [C] steps, in initial steps
    temperature: Array
    first_temperature: Array
    began: Array  # int32, generation at which the present cooling began
    improved: Array  # int32, generation of the last better individual
    reheats: Array  # int32


@struct.dataclass(kw_only=True)
class SimulatedAnnealing(Optimizer[AnnealingState]):
    """Simulated annealing with ``chains`` chains (pop_size / 10 by default) that try pop_size / chains moves a generation each.

    ``exchange``: "resample" draws the chains anew by the weights of a falling temperature, "swap" is parallel tempering.
    """

    params: AnnealingParams = struct.field(default_factory=AnnealingParams)
    chains: int | None = struct.field(pytree_node=False, default=None)
    schedule: Schedule = struct.field(pytree_node=False, default="adaptive")
    moves: Literal["gaussian", "cauchy"] = struct.field(pytree_node=False, default="gaussian")
    exchange: Exchange = struct.field(pytree_node=False, default="resample")
    max_reheats: int = struct.field(pytree_node=False, default=3)

    @property
    def takes_guests(self) -> bool:
        return True

    @property
    def paced(self) -> bool:
        return True

    @property
    def num_chains(self) -> int:
        wanted = self.chains or max(1, self.pop_size // 10)
        return wanted if self.chains else next(c for c in range(wanted, 0, -1) if self.pop_size % c == 0)

    def validate(self) -> None:
        Optimizer.validate(self)
        for name, value, known in (
            ("schedule", self.schedule, ("adaptive", "exponential", "cauchy")),
            ("moves", self.moves, ("gaussian", "cauchy")),
            ("exchange", self.exchange, ("resample", "swap", "none")),
        ):
            if value not in known:
                raise InvalidRequest(f"{name} {value!r} is none of {', '.join(known)}")
        if self.chains is not None and (self.chains < 1 or self.pop_size % self.chains):
            raise InvalidRequest(f"chains={self.chains} must divide pop_size={self.pop_size}")

    def begin(self, common: dict[str, Any], params: AnnealingParams) -> AnnealingState:
        x, c = common["best_x"], self.num_chains
        inf, zero = jnp.full((c,), jnp.inf, x.dtype), jnp.int32(0)
        return AnnealingState(
            **common,
            x=jnp.broadcast_to(x, (c, x.size)),
            fitness=inf,
            sigma=jnp.full((c,), params.initial_step, x.dtype),
            temperature=inf[0],
            first_temperature=inf[0],
            began=zero,
            improved=zero,
            reheats=zero,
        )

    def adopt(self, state: AnnealingState, start: Start, params: AnnealingParams) -> AnnealingState:
        """Begin with a chain at each of the best of ``start``, with steps of its size."""
        order = jnp.resize(jnp.argsort(start.fitness), (self.num_chains,))
        x, fitness = start.x[order], start.fitness[order]
        return replace(state, x=x, fitness=fitness, sigma=state.sigma * start.step, best_x=x[0], best_f=fitness[0])

    def propose(self, state: AnnealingState, params: AnnealingParams) -> tuple[Array, AnnealingState]:
        tries = self.pop_size // self.num_chains
        u = draw(state, (self.pop_size, state.space.size))
        noise = cauchy(u) if self.moves == "cauchy" else normal(u)
        centre, sigma = jnp.repeat(state.x, tries, 0), jnp.repeat(state.sigma, tries)
        x = centre + state.space.step[None] * sigma[:, None] * noise
        x = jnp.where(jnp.isinf(state.best_f), scatter(state, u), x)
        return confined(state, x, centre), state

    def update(self, state: AnnealingState, x: Array, fitness: Array, params: AnnealingParams) -> tuple[AnnealingState, Info]:
        c, told = self.num_chains, fitness
        tries, rows = self.pop_size // c, jnp.arange(c)
        x, fitness = x.reshape(c, tries, -1), fitness.reshape(c, tries)
        u = draw(state, (c, 2 * tries + 2), stream=1)
        rise = jnp.where(jnp.isinf(state.fitness)[:, None], -jnp.inf, fitness - state.fitness[:, None])
        before, state = state.temperature, self._cooled(state, fitness, rise, params)
        heat = self._temperatures(state, params)[:, None]
        accepted = rise < -jnp.log(u[:, :tries]) * heat
        # Among a chain's tries one is drawn by its Boltzmann weight (Gumbel's trick), and accepted or not.
        drawn = jnp.argmin(fitness + heat * jnp.log(-jnp.log(u[:, tries : 2 * tries])), 1)
        taken = rise[rows, drawn] < -jnp.log(u[:, -2]) * heat[:, 0]
        held = jnp.where(taken, fitness[rows, drawn], state.fitness)
        factor = jnp.exp(params.step_rate * (jnp.mean(accepted, 1) - params.acceptance) / (1 - params.acceptance))
        sigma = jnp.where(jnp.isinf(state.fitness), state.sigma, state.sigma * factor)
        state = replace(state, x=jnp.where(taken[:, None], x[rows, drawn], state.x), fitness=held, sigma=sigma)
        state = self._reheated(self._exchanged(state, before, u[:, -1], params), told, params)
        return state, summarise(state, state.x, held, told, jnp.mean(sigma), jnp.mean(accepted))

    def _temperatures(self, state: AnnealingState, params: AnnealingParams) -> Array:
        """The temperature of each chain ``[C]``; the first is the coldest."""
        ladder = params.ladder if self.exchange == "swap" else 1.0
        return state.temperature * ladder ** jnp.arange(self.num_chains, dtype=state.x.dtype)

    def _cooled(self, state: AnnealingState, fitness: Array, rise: Array, params: AnnealingParams) -> AnnealingState:
        """The temperature of this generation; measured anew where it is infinite: at the start and after a reheat."""
        uphill = jnp.isfinite(rise) & (rise > 0)
        mean_rise = jnp.sum(jnp.where(uphill, rise, 0)) / jnp.maximum(jnp.sum(uphill), 1).astype(rise.dtype)
        scale = jnp.where(jnp.any(uphill), mean_rise, _mean_deviation(fitness))
        age = (state.generation - state.began - 1).astype(scale.dtype)
        progress = jnp.minimum(age / _cooling_time(state, params), 1)
        hot, cold = jnp.log(params.initial_acceptance), jnp.log(params.final_acceptance)
        measured = -scale / (hot + progress * (cold - hot))
        first = jnp.where(jnp.isinf(state.temperature), measured, state.first_temperature)
        match self.schedule:
            case "adaptive":
                temperature = jnp.minimum(state.temperature, measured)
            case "exponential":
                temperature = first * params.final_temperature**progress
            case _:
                temperature = first / (1 + age)
        return replace(state, temperature=jnp.maximum(temperature, TINY), first_temperature=first)

    def _exchanged(self, state: AnnealingState, before: Array, u: Array, params: AnnealingParams) -> AnnealingState:
        """Chains drawn anew by weight as the temperature falls, or swapped between neighbouring temperatures."""
        rows = jnp.arange(self.num_chains)
        if self.exchange == "resample":
            fall = jnp.where(jnp.isinf(before), 0, 1 / state.temperature - 1 / before)
            weights = boltzmann(state.fitness, jnp.maximum(fall, 0))
            chosen = systematic(weights, u[0])
        elif self.exchange == "swap":
            upper = rows + jnp.where((rows + state.generation) % 2 == 0, 1, -1)
            upper = jnp.where((upper < 0) | (upper >= self.num_chains), rows, upper)
            inverse = 1 / self._temperatures(state, params)
            gain = (inverse - inverse[upper]) * (state.fitness - state.fitness[upper])
            chosen = jnp.where(jnp.log(u[jnp.minimum(rows, upper)]) < gain, upper, rows)
        else:
            return state
        sigma = state.sigma[chosen] if self.exchange == "resample" else state.sigma
        return replace(state, x=state.x[chosen], fitness=state.fitness[chosen], sigma=sigma)

    def _reheated(self, state: AnnealingState, told: Array, params: AnnealingParams) -> AnnealingState:
        """Cold, and a while without a better individual: a measured temperature again, and larger steps; at most ``max_reheats`` times."""
        improved = jnp.where(jnp.any(told <= state.best_f), state.generation, state.improved)
        cold = state.began.astype(told.dtype) + _cooling_time(state, params)
        still = state.generation.astype(told.dtype) - jnp.maximum(improved.astype(told.dtype), cold)
        due = (still > params.patience * state.horizon.astype(still.dtype)) & (state.reheats < self.max_reheats)
        return replace(
            state,
            improved=improved,
            sigma=jnp.where(due, params.reheating * params.initial_step, state.sigma),
            temperature=jnp.where(due, jnp.inf, state.temperature),
            began=jnp.where(due, state.generation, state.began),
            reheats=state.reheats + due.astype(jnp.int32),
        )

    def hand_over(self, state: AnnealingState) -> Start:
        """The chains. Recombining mu parents allows steps mu times as long: Beyer, The Theory of Evolution Strategies (2001)."""
        step = jnp.minimum(jnp.mean(state.sigma) * self.pop_size / 2, jnp.maximum(jnp.max(state.sigma), 1))
        return Start(state.x, state.fitness, step)


def _cooling_time(state: AnnealingState, params: AnnealingParams) -> Array:
    """Generations from the start of a cooling to its end."""
    return jnp.maximum(params.cooling_share * (state.horizon - state.began).astype(state.x.dtype), 1)


def _mean_deviation(fitness: Array) -> Array:
    """Mean distance of the finite values from their mean."""
    finite = jnp.isfinite(fitness)
    count = jnp.maximum(jnp.sum(finite), 1).astype(fitness.dtype)
    mean = jnp.sum(jnp.where(finite, fitness, 0)) / count
    return jnp.sum(jnp.where(finite, jnp.abs(fitness - mean), 0)) / count
