"""Optimizers without gradients, pure functions on pytrees: genetic algorithm, simulated annealing, Monte Carlo and their pipeline."""

from tars_jax.optim.base import Info, Optimizer, Start, State
from tars_jax.optim.convergence import Budget, Reason, Stop
from tars_jax.optim.genetic import GeneticAlgorithm, GeneticParams
from tars_jax.optim.minimize import minimize
from tars_jax.optim.search import Result
from tars_jax.optim.space import Box

__all__ = [
    "Box",
    "Budget",
    "GeneticAlgorithm",
    "GeneticParams",
    "Info",
    "Optimizer",
    "Reason",
    "Result",
    "Start",
    "State",
    "Stop",
    "minimize",
]
