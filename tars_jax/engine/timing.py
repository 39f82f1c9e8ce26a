"""How long steps take, learned while running, and how many tokens a step may have so that nobody waits too long. Plain Python."""

SMOOTHING = 0.2  # weight of the newest measurement
MIN_TOKENS = 16  # a step is never made smaller for the sake of latency: fewer tokens hardly cost less
TRIAL = 32  # every so many steps the next larger size is tried: what it takes may have changed, or was only guessed
SLACK = 2.0  # a step with prompts may take this many times a step without, whatever the target: else prompts would never be read


class StepTimes:
    """Mean seconds of a step by its bucket, exponentially smoothed."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._asked = 0

    def observe(self, bucket: int, seconds: float) -> None:
        """Learn from a step. One that took far longer than usual counts for no more than four times the usual."""
        mean = self._seconds.get(bucket, seconds)
        self._seconds[bucket] = mean + SMOOTHING * (min(seconds, 4 * mean) - mean)

    def predict(self, bucket: int) -> float:
        """Seconds of a step of this bucket; 0 if nothing is known. Sizes not seen lie on the line between their neighbours; those above
        all that were seen cost in proportion, those below as much as the smallest."""
        below = max((known for known in self._seconds if known <= bucket), default=0)
        above = min((known for known in self._seconds if known >= bucket), default=0)
        if not below or not above:
            nearest = below or above
            return self._seconds.get(nearest, 0.0) * max(bucket / nearest, 1.0) if nearest else 0.0
        share = (bucket - below) / (above - below) if above > below else 0.0
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def budget(self, target: float, decodes: int, most: int) -> int:
        """Tokens of a step, at most ``most``, that keep it within ``target`` seconds beside ``decodes`` rows that decode."""
        self._asked += 1
        least = max(2 * decodes, MIN_TOKENS)
        alone = 1 << max(decodes - 1, 0).bit_length()
        allowed = max(target, SLACK * self.predict(alone))
        budget = 1 << (most.bit_length() - 1)
        if self.predict(most) <= allowed:
            return most
        while budget > least and self.predict(budget) > allowed:
            budget //= 2
        budget = max(budget, least)
        return min(budget if self._asked % TRIAL else 2 * budget, most)
