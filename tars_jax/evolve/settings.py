"""What a run of evolution is made of."""

import dataclasses
from typing import Literal, get_args

from tars_jax.errors import InvalidRequest

StrategyName = Literal["eggroll", "genetic", "annealing", "montecarlo", "hybrid", "random"]

SpaceName = Literal["low-rank", "gains", "steering"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides model and data. sigma and learning_rate are in the space's own unit; in low-rank updates that
    is a matrix's root mean square."""

    space: SpaceName = "low-rank"
    strategy: StrategyName = "eggroll"
    layers: str = "last:6"  # as `space.choose_layers` reads it
    matrices: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    rank: int = 4  # of the adapter
    population: int = 32  # members of a generation; even
    batch: int = 6  # examples each member is scored on in a generation
    sigma: float = 0.02  # deviation of a member from the mean
    learning_rate: float = 0.02
    momentum: float = 0.0
    decay: float = 0.0  # of the way back to the start, each generation
    slice: int = 0  # members scored in one step; 0: as many as make `SLICE_TOKENS`
    fitness: str = "label"  # as `fitness.parse_fitness` reads it
    max_new_tokens: int = 32  # of an answer, where fitness needs one
    horizon: int = 40  # generations that the schedules of annealing and of the pipeline span
    seed: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field} must be {rule}, got {getattr(self, field)!r}")

        check(self.space in get_args(SpaceName), "space", f"one of {', '.join(get_args(SpaceName))}")
        check(self.strategy in get_args(StrategyName), "strategy", f"one of {', '.join(get_args(StrategyName))}")
        check(4 <= self.population <= 65_536 and self.population % 2 == 0, "population", "an even number from 4 to 65536")
        check(1 <= self.rank <= 256, "rank", "from 1 to 256")
        check(1 <= self.batch <= 4096, "batch", "from 1 to 4096")
        check(0 < self.sigma < 10, "sigma", "above 0 and below 10")
        check(0 < self.learning_rate < 10, "learning_rate", "above 0 and below 10")
        check(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        check(0 <= self.decay < 1, "decay", "at least 0 and below 1")
        check(self.slice >= 0 and self.slice % 2 == 0, "slice", "an even number, 0 for as many as fit")
        check(1 <= self.max_new_tokens <= 4096, "max_new_tokens", "from 1 to 4096")
        check(self.horizon >= 1, "horizon", "at least 1")
        check(bool(self.matrices), "matrices", "at least one")
