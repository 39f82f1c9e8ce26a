"""Optimizers without gradients, pure functions on pytrees: genetic algorithm, simulated annealing, Monte Carlo and their pipeline."""

from tars_jax.optim.annealing import AnnealingParams, SimulatedAnnealing
from tars_jax.optim.base import Info, Optimizer, Start, State
from tars_jax.optim.cmaes import CMAES, CMAParams
from tars_jax.optim.convergence import Budget, Reason, Stop
from tars_jax.optim.cycles import Cycle, Cycles
from tars_jax.optim.evolution import EvolutionParams, EvolutionStrategy
from tars_jax.optim.genetic import GeneticAlgorithm, GeneticParams
from tars_jax.optim.hybrid import HybridOptimization, HybridParams
from tars_jax.optim.islands import Islands, islands
from tars_jax.optim.minimize import minimize
from tars_jax.optim.montecarlo import MonteCarlo, MonteCarloParams
from tars_jax.optim.polish import Polished, polish
from tars_jax.optim.referee import Verdict, referee
from tars_jax.optim.search import Result
from tars_jax.optim.space import Box

__all__ = [
    "CMAES", "AnnealingParams", "Box", "Budget", "CMAParams", "Cycle", "Cycles", "EvolutionParams", "EvolutionStrategy",
    "GeneticAlgorithm", "GeneticParams", "HybridOptimization", "HybridParams", "Info", "Islands", "MonteCarlo", "MonteCarloParams",
    "Optimizer", "Polished", "Reason", "Result", "SimulatedAnnealing", "Start", "State", "Stop", "Verdict", "islands", "minimize",
    "polish", "referee",
]  # fmt: skip
