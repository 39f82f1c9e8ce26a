"""What searches beside serving are counted by; the version of the weights is among the engines' own metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class OptimizationMetrics:
    """Counters by model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"tars_optimization_{name}", text, ["model_name"], registry=registry)

        self.cycles = counter("cycles", "Slices of a search run in the engine's idle time")
        self.generations = counter("generations", "Generations of a search completed")
        self.swaps = counter("swaps", "Versions of the weights put into service: improvements and roll-backs")
        self.rejected = counter("rejected", "Updates that a held-out check refused")
        self.best = Gauge("tars_optimization_best_fitness", "Fitness of the latest generation's best", ["model_name"], registry=registry)
