"""What was sent to the device and is not read yet."""

from typing import NamedTuple

import jax

from tars_jax.engine.scheduler import Plan


class InFlight(NamedTuple):
    """A step on its way, or a run of decodes, which is sampled in its own program."""

    plan: Plan
    bucket: int
    last: jax.Array | None  # the last layer's states that tokens are sampled after, to come; None of a run
    hidden: jax.Array | None  # the last layer's states to come, [bucket, H]; None of a run
    sent: float  # seconds, time.perf_counter()
    out: jax.Array | None = None  # the sampler's, once it is sent too; it never is if nothing is sampled. Of a run with an axis of steps

    @property
    def is_run(self) -> bool:
        return self.last is None

    @property
    def samples(self) -> bool:
        """Whether some of its tokens are followed by a sampled one."""
        return any(span.samples for span in self.plan)

    def wait(self) -> jax.Array:
        """The last layer's states of a step, when it is done: it may be one that samples nothing."""
        assert self.last is not None
        assert self.hidden is not None
        self.last.block_until_ready()
        return self.hidden
