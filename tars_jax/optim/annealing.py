"""Simulated annealing: chains that move to the Boltzmann mean of their tries, a measured temperature that falls, steps and shape that
are learnt from the tries, reheating, exchange.

Kirkpatrick, Gelatt and Vecchi, Optimization by Simulated Annealing (1983); Szu and Hartley, Fast Simulated Annealing (1987) for Cauchy
moves; Ben-Ameur, Computing the Initial Temperature (2004); Liu, Liang and Wong, The Multiple-Try Method (2000); Haario, Saksman and
Tamminen, An Adaptive Metropolis Algorithm (2001) for the shape of proposals; Romeijn and Smith, Simulated Annealing for Constrained Global
Optimization (1994), and Hu and Hu, Annealing Adaptive Search, Cross-Entropy, and Stochastic Approximation (2011), for distributions that
follow exp(-f / T) as T falls; Swendsen and Wang, Replica Monte Carlo (1986) for swaps; Hukushima and Iba, Population Annealing (2003)
for resampling.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Info, Optimizer, Start, State, draw, patience, sampled, summarise, tied
from tars_jax.optim.gaussian import Covariance, Gaussian, continued, directions, learn, start_gaussian
from tars_jax.optim.operators import boltzmann, cauchy, normal, systematic

Schedule = Literal["adaptive", "exponential", "cauchy"]
Exchange = Literal["resample", "swap", "none"]
TINY = 1e-30


@struct.dataclass
class AnnealingParams:
    """Numbers of simulated annealing."""

    initial_step: float | Array = 1.0  # in the space's initial steps
    initial_acceptance: float | Array = 0.9  # chance of a rise as large as the tries' mean deviation at the start: sets the temperature
    final_acceptance: float | Array = 0.6  # adaptive: the same when the cooling is done
    final_temperature: float | Array = 1e-6  # exponential: as a share of the first
    cooling_share: float | Array = 0.5  # share of the planned run over which the temperature falls
    covariance_rate: float | Array = 1.0  # scales how fast the tries' covariance is learnt
    shrinkage: float | Array = 0.7  # of a chain's steps when its move is refused
    ladder: float | Array = 2.0  # swap: ratio of neighbouring chains' temperatures
    reheating: float | Array = 0.5  # step after a reheat, as a share of the first one
    patience: float | Array = 0.1  # share of the planned run without a better individual that brings a reheat


@struct.dataclass(kw_only=True)
class AnnealingState(State):
    """Chains, and how hot they are."""

    x: Array  # [C, d] where the chains are
    fitness: Array  # [C]
    gaussian: Gaussian  # [C] of the tries; its mean is where a chain wants to be next
    z: Array  # [N, d] standard numbers of the tries asked for
    beyond: Array  # [N, d] and how far outside reflecting bounds they were drawn
    temperature: Array
    first_temperature: Array
    began: Array  # int32, generation at which the present cooling began
    reference: Array  # best fitness before the last generation
    improved: Array  # int32, generation of the last better individual
    reheats: Array  # int32


@struct.dataclass(kw_only=True)
class SimulatedAnnealing(Optimizer[AnnealingState]):
    """Simulated annealing with ``chains`` chains (one for every 30 individuals by default).

    A chain proposes a point and tries others around it. The point is accepted by Metropolis' rule; the next one is the mean of the tries,
    weighted by exp(-fitness / temperature). ``exchange``: "resample" draws the chains anew by the weights of a falling temperature, "swap"
    is parallel tempering.
    """

    params: AnnealingParams = struct.field(default_factory=AnnealingParams)
    chains: int | None = struct.field(pytree_node=False, default=None)
    schedule: Schedule = struct.field(pytree_node=False, default="adaptive")
    moves: Literal["gaussian", "cauchy"] = struct.field(pytree_node=False, default="gaussian")
    covariance: Covariance = struct.field(pytree_node=False, default="auto")
    exchange: Exchange = struct.field(pytree_node=False, default="resample")
    max_reheats: int = struct.field(pytree_node=False, default=10)

    @property
    def takes_guests(self) -> bool:
        return True

    @property
    def paced(self) -> bool:
        """An adaptive schedule without reheats has no plan that standing still could be part of."""
        return self.schedule != "adaptive" or self.max_reheats > 0

    @property
    def num_chains(self) -> int:
        return self.chains or next(c for c in range(max(1, self.pop_size // 30), 0, -1) if self.pop_size % c == 0)

    def validate(self) -> None:
        Optimizer.validate(self)
        for name, value, known in (
            ("schedule", self.schedule, ("adaptive", "exponential", "cauchy")),
            ("moves", self.moves, ("gaussian", "cauchy")),
            ("exchange", self.exchange, ("resample", "swap", "none")),
        ):
            if value not in known:
                raise InvalidRequest(f"{name} {value!r} is none of {', '.join(known)}")
        if self.chains is not None and (self.chains < 1 or self.pop_size % self.chains or self.pop_size // self.chains < 3):
            raise InvalidRequest(f"chains={self.chains} must divide pop_size={self.pop_size} and leave each 3 tries")

    def begin(self, common: dict[str, Any], params: AnnealingParams) -> AnnealingState:
        x = jnp.broadcast_to(common["best_x"], (self.num_chains, common["best_x"].size))
        inf, zero = jnp.full_like(x[:, 0], jnp.inf), jnp.int32(0)
        step, zeros = jnp.asarray(params.initial_step, x.dtype), jnp.zeros((self.pop_size, x.shape[1]), x.dtype)
        return AnnealingState(
            **common,
            x=x,
            fitness=inf,
            gaussian=jax.vmap(lambda mean: start_gaussian(mean, step, self.covariance))(x),
            z=zeros,
            beyond=zeros,
            temperature=inf[0],
            first_temperature=inf[0],
            began=zero,
            reference=inf[0],
            improved=zero,
            reheats=zero,
        )

    def adopt(self, state: AnnealingState, start: Start, params: AnnealingParams) -> AnnealingState:
        """Begin with a chain at each of the best of ``start``, with steps of its size."""
        order = jnp.resize(jnp.argsort(start.fitness), (self.num_chains,))
        x, fitness = start.x[order], start.fitness[order]
        step = params.initial_step * start.step
        gaussian = jax.vmap(lambda gaussian, mean: continued(gaussian, mean, step, start.shape))(state.gaussian, x)
        gaussian = replace(gaussian, mean=x) if self.num_chains > 1 else gaussian
        return replace(state, x=x, fitness=fitness, gaussian=gaussian, best_x=x[0], best_f=fitness[0])

    def propose(self, state: AnnealingState, params: AnnealingParams) -> tuple[Array, AnnealingState]:
        c, tries = self.num_chains, self.pop_size // self.num_chains
        u = draw(state, (c, tries, state.space.size))
        z = (cauchy(u) if self.moves == "cauchy" else normal(u)).at[:, 0].set(0)  # the first is the point itself
        centre = jnp.repeat(state.gaussian.mean, tries, 0)
        each = jax.vmap(sampled, in_axes=(None, 0, 0, 0))
        x, beyond = each(state, state.gaussian, centre.reshape(z.shape), z)
        return x.reshape(centre.shape), replace(state, z=z.reshape(centre.shape), beyond=beyond.reshape(centre.shape))

    def update(self, state: AnnealingState, x: Array, fitness: Array, params: AnnealingParams) -> tuple[AnnealingState, Info]:
        c, told = self.num_chains, fitness
        u = draw(state, (c, 2), stream=1)
        x, drawn, z = (array.reshape(c, -1, x.shape[1]) for array in (x, x + state.beyond, state.z))
        fitness = fitness.reshape(c, -1)
        before, state = state.temperature, self._cooled(state, fitness, params)
        heat = self._temperatures(state, params)
        rise = jnp.where(jnp.isinf(state.fitness), -jnp.inf, fitness[:, 0] - state.fitness)
        accepted = rise < -jnp.log(u[:, 0]) * heat
        tried = jax.vmap(self._tried, in_axes=(0, 0, 0, 0, 0, None, None))(
            state.gaussian, z[:, 1:], drawn[:, 1:], fitness[:, 1:], heat, state.generation, params
        )
        refused = replace(state.gaussian, mean=state.x, sigma=params.shrinkage * state.gaussian.sigma)
        gaussian = jax.vmap(lambda yes, new, old: jax.tree.map(lambda a, b: jnp.where(yes, a, b), new, old))(accepted, tried, refused)
        held = jnp.where(accepted, fitness[:, 0], state.fitness)
        state = replace(state, x=jnp.where(accepted[:, None], x[:, 0], state.x), fitness=held, gaussian=gaussian)
        state = self._reheated(self._exchanged(state, before, u[:, 1], params), told, params)
        size = jnp.mean(jax.vmap(lambda gaussian: gaussian.size)(gaussian))
        return state, summarise(state, x.reshape(self.pop_size, -1), told, told, size, jnp.mean(accepted))

    def _tried(
        self, gaussian: Gaussian, z: Array, x: Array, fitness: Array, heat: Array, generation: Array, params: AnnealingParams
    ) -> Gaussian:
        """What a chain's tries teach. Those with less than an even share of the weight push the covariance away."""
        weights = boltzmann(fitness, 1 / heat) - 1 / fitness.shape[0]
        z = directions(z) if self.moves == "cauchy" else z
        return learn(gaussian, z, x, fitness, weights, generation, params.covariance_rate)

    def _temperatures(self, state: AnnealingState, params: AnnealingParams) -> Array:
        """The temperature of each chain ``[C]``; the first is the coldest."""
        ladder = params.ladder if self.exchange == "swap" else 1.0
        return state.temperature * ladder ** jnp.arange(self.num_chains, dtype=state.x.dtype)

    def _cooled(self, state: AnnealingState, fitness: Array, params: AnnealingParams) -> AnnealingState:
        """The temperature of this generation; measured anew where it is infinite: at the start and after a reheat."""
        tries = jnp.mean(jax.vmap(_mean_deviation)(fitness[:, 1:]))
        scale = jnp.where(jnp.isinf(state.temperature), _mean_deviation(fitness.ravel()), tries)
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
            chosen = systematic(boltzmann(state.fitness, jnp.maximum(fall, 0)), u[0])
        elif self.exchange == "swap":
            upper = rows + jnp.where((rows + state.generation) % 2 == 0, 1, -1)
            upper = jnp.where((upper < 0) | (upper >= self.num_chains), rows, upper)
            inverse = 1 / self._temperatures(state, params)
            gain = (inverse - inverse[upper]) * (state.fitness - state.fitness[upper])
            chosen = jnp.where(jnp.log(u[jnp.minimum(rows, upper)]) < gain, upper, rows)
        else:
            return state
        x, fitness, gaussian = jax.tree.map(lambda values: values[chosen], (state.x, state.fitness, state.gaussian))
        return replace(state, x=x, fitness=fitness, gaussian=gaussian)

    def _reheated(self, state: AnnealingState, told: Array, params: AnnealingParams) -> AnnealingState:
        """Cold and a while without a better individual, or tries that no longer differ: a measured temperature again, and larger steps; at
        most ``max_reheats`` times."""
        improved = jnp.where(state.best_f < state.reference, state.generation, state.improved)
        age = state.generation - state.began
        still = jnp.minimum(state.generation - improved, age).astype(told.dtype)
        window = patience(state, self.pop_size)
        cold = (age.astype(told.dtype) > _cooling_time(state, params)) & (
            still > jnp.maximum(params.patience * state.horizon.astype(told.dtype), window)
        )
        exhausted = tied(told) & (still >= window)
        due = (cold | exhausted) & (state.reheats < self.max_reheats)
        step = jnp.asarray(params.reheating * params.initial_step, told.dtype)
        anew = jax.vmap(lambda mean: start_gaussian(mean, step, self.covariance))(state.x)
        return replace(
            state,
            reference=state.best_f,
            improved=improved,
            gaussian=jax.tree.map(lambda new, old: jnp.where(due, new, old), anew, state.gaussian),
            temperature=jnp.where(due, jnp.inf, state.temperature),
            began=jnp.where(due, state.generation, state.began),
            reheats=state.reheats + due.astype(jnp.int32),
        )

    def hand_over(self, state: AnnealingState) -> Start:
        """The chains, and the shape of the best one's tries."""
        shape = jax.tree.map(lambda values: values[jnp.argmin(state.fitness)], state.gaussian)
        return Start(state.x, state.fitness, shape.size, shape)


def _cooling_time(state: AnnealingState, params: AnnealingParams) -> Array:
    """Generations from the start of a cooling to its end."""
    return jnp.maximum(params.cooling_share * (state.horizon - state.began).astype(state.x.dtype), 1)


def _mean_deviation(fitness: Array) -> Array:
    """Mean distance of the finite values from their mean."""
    finite = jnp.isfinite(fitness)
    count = jnp.maximum(jnp.sum(finite), 1).astype(fitness.dtype)
    mean = jnp.sum(jnp.where(finite, fitness, 0)) / count
    return jnp.sum(jnp.where(finite, jnp.abs(fitness - mean), 0)) / count
