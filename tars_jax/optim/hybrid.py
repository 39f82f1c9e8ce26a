"""The pipeline: a genetic algorithm explores, simulated annealing crosses barriers, Monte Carlo learns the shape of the valley.

A stage that has spent its share hands individuals and the distribution it has learnt to the next, so that nothing is learnt twice. A
stage that has converged, or does so to something worse than is known, has nothing to hand on: the next begins at a new start and shares
what is left (restarts as in Auger and Hansen, A Restart CMA Evolution Strategy, 2005, here with another algorithm each time).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tars_jax import struct
from tars_jax.optim.annealing import AnnealingParams, SimulatedAnnealing
from tars_jax.optim.base import Info, Optimizer, Start, State
from tars_jax.optim.convergence import Monitor, Reason, Stop, judge, start_monitor
from tars_jax.optim.genetic import GeneticAlgorithm, GeneticParams
from tars_jax.optim.montecarlo import MonteCarlo, MonteCarloParams

HOPE = 10  # times the spread of its population that a stage may still gain


@struct.dataclass
class HybridParams:
    """The parameter sets of the stages, and how the budget is divided."""

    genetic: GeneticParams = struct.field(default_factory=GeneticParams)
    annealing: AnnealingParams = struct.field(default_factory=AnnealingParams)
    monte_carlo: MonteCarloParams = struct.field(default_factory=MonteCarloParams)
    shares: tuple[float | Array, float | Array, float | Array] = (0.4, 0.1, 0.5)  # of what is left, by stage


@struct.dataclass(kw_only=True)
class HybridState(State):
    """The stages' states and which of them is at work."""

    stages: tuple[Any, Any, Any]
    stage: Array  # int32
    rounds: Array  # int32, stages ended so far
    origin: Array  # [d] x0
    monitor: Monitor  # of the stage at work
    limit: Array  # int32, generations that stage may have


@struct.dataclass(kw_only=True)
class HybridOptimization(Optimizer[HybridState]):
    """GA -> SA -> MC. The choices of the stages are theirs; their population, bounds, mask and steps are the pipeline's."""

    params: HybridParams = struct.field(default_factory=HybridParams)
    genetic: GeneticAlgorithm = struct.field(default_factory=GeneticAlgorithm)
    annealing: SimulatedAnnealing = struct.field(default_factory=lambda: SimulatedAnnealing(max_reheats=0))  # restarts are the pipeline's
    monte_carlo: MonteCarlo = struct.field(default_factory=MonteCarlo)
    stop: Stop = struct.field(default_factory=lambda: Stop(ties=0.25))  # what ends a stage before its share is spent

    @property
    def paced(self) -> bool:
        return True

    @property
    def pipeline(self) -> tuple[Optimizer[Any], ...]:
        """The stages with this population."""
        return tuple(replace(stage, pop_size=self.pop_size) for stage in (self.genetic, self.annealing, self.monte_carlo))

    def validate(self) -> None:
        for stage in self.pipeline:
            stage.validate()

    def begin(self, common: dict[str, Any], params: HybridParams) -> HybridState:
        stages = tuple(stage.begin(common, of) for stage, of in zip(self.pipeline, _stage_params(params), strict=True))
        zero = jnp.int32(0)
        state = HybridState(
            **common, stages=stages, stage=zero, rounds=zero, origin=common["best_x"], monitor=start_monitor(stages[0]), limit=zero
        )
        return self._entered(state, 0, None, params)

    def adopt(self, state: HybridState, start: Start, params: HybridParams) -> HybridState:
        """Begin with the first stage at ``start``."""
        best = jnp.argmin(start.fitness)
        state = replace(state, best_x=start.x[best], best_f=start.fitness[best])
        return self._entered(state, 0, start, params)

    def propose(self, state: HybridState, params: HybridParams) -> tuple[Array, HybridState]:
        def ask(index: int) -> Any:
            def branch(stages: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
                x, own = self.pipeline[index].propose(stages[index], _stage_params(params)[index])
                return x, _put(stages, index, own)

            return branch

        x, stages = lax.switch(state.stage, [ask(index) for index in range(3)], state.stages)
        return x, replace(state, stages=stages)

    def update(self, state: HybridState, x: Array, fitness: Array, params: HybridParams) -> tuple[HybridState, Info]:
        def tell(index: int) -> Any:
            def branch(state: HybridState) -> tuple[HybridState, Info]:
                stage = self.pipeline[index]
                own, info = stage.learn(state.stages[index], x, fitness, _stage_params(params)[index])
                monitor = judge(state.monitor, self.stop, own, info, fitness, state.limit, stage)
                state = replace(state, stages=_put(state.stages, index, own), monitor=monitor)
                # Converging to something worse than is known: what its individuals differ by will not make up for it.
                hopeless = own.best_f - state.best_f > HOPE * info.spread
                return self._passed_on(state, index, hopeless, params), info

            return branch

        state, info = lax.switch(state.stage, [tell(index) for index in range(3)], state)
        return state, replace(info, best=state.best_f)

    def _passed_on(self, state: HybridState, index: int, hopeless: Array, params: HybridParams) -> HybridState:
        """The next stage at work if this one is over: where it stands if its share is spent, at a new start if it has converged."""

        following = (index + 1) % len(self.pipeline)
        start = self.pipeline[index].hand_over(state.stages[index])
        reason = state.monitor.reason
        spent = (reason == Reason.GENERATIONS) & (following > 0) & ~hopeless
        return lax.switch(
            jnp.where((reason == Reason.RUNNING) & ~hopeless, 0, jnp.where(spent, 1, 2)),
            [
                lambda state: state,
                lambda state: self._entered(state, following, start, params),
                lambda state: self._entered(state, following, None, params),
            ],
            state,
        )

    def _entered(self, state: HybridState, index: int, start: Start | None, params: HybridParams) -> HybridState:
        """Stage ``index`` begun, with what the one before hands over, or a new start."""
        key = jax.random.fold_in(state.key, state.rounds + 1)
        left = (state.horizon - state.generation).astype(state.best_f.dtype)
        share = params.shares[index] / sum(params.shares[index:])
        limit = jnp.maximum(jnp.ceil(share * left), 1).astype(jnp.int32)
        away = jax.random.normal(key, state.origin.shape, state.origin.dtype) * jnp.where(state.rounds > 0, state.space.step, 0)
        common = {
            "space": state.space,
            "key": key,
            "generation": jnp.int32(0),
            "evals": jnp.int32(0),
            "horizon": limit,
            "best_x": state.space.confine(key, state.origin + away, state.origin),
            "best_f": jnp.full_like(state.best_f, jnp.inf),
        }
        stage, of = self.pipeline[index], _stage_params(params)[index]
        own = stage.begin(common, of)
        own = own if start is None else stage.adopt(own, start, of)
        return replace(
            state,
            stages=_put(state.stages, index, own),
            stage=jnp.int32(index),
            rounds=state.rounds + 1,
            monitor=start_monitor(own),
            limit=limit,
        )

    def hand_over(self, state: HybridState) -> Start:
        return Start(state.best_x[None], state.best_f[None], jnp.ones_like(state.best_f))


def _stage_params(params: HybridParams) -> tuple[Any, Any, Any]:
    return params.genetic, params.annealing, params.monte_carlo


def _put(stages: tuple[Any, ...], index: int, state: Any) -> tuple[Any, ...]:
    return (*stages[:index], state, *stages[index + 1 :])
