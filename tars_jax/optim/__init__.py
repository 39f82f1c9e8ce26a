"""Optimizers without gradients, pure functions on pytrees: genetic algorithm, simulated annealing, Monte Carlo and their pipeline."""

from tars_jax.optim.annealing import AnnealingParams, SimulatedAnnealing
from tars_jax.optim.base import Info, Optimizer, Start, State
from tars_jax.optim.cmaes import CMAES, CMAParams
from tars_jax.optim.convergence import Budget, Reason, Stop
from tars_jax.optim.genetic import GeneticAlgorithm, GeneticParams
from tars_jax.optim.hybrid import HybridOptimization, HybridParams
from tars_jax.optim.minimize import minimize
from tars_jax.optim.montecarlo import MonteCarlo, MonteCarloParams
from tars_jax.optim.search import Result
from tars_jax.optim.space import Box

__all__ = [
    "CMAES",
    "AnnealingParams",
    "Box",
    "Budget",
    "CMAParams",
    "GeneticAlgorithm",
    "GeneticParams",
    "HybridOptimization",
    "HybridParams",
    "Info",
    "MonteCarlo",
    "MonteCarloParams",
    "Optimizer",
    "Reason",
    "Result",
    "SimulatedAnnealing",
    "Start",
    "State",
    "Stop",
    "minimize",
]
