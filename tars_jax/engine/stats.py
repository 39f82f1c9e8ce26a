"""Numbers of an engine, for whoever watches it."""

import dataclasses

COUNTERS = ("steps", "step_rows", "step_tokens", "prompt_tokens", "output_tokens", "drafted_tokens", "accepted_tokens", "failures")


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Numbers of an engine: gauges of now, counters since its start."""

    running: int
    waiting: int
    num_pages: int
    free_pages: int
    nbytes: int  # weights and cache
    weights_version: int  # 1 at first, one more with every `Engine.swap`
    compiled_steps: tuple[int, ...]  # step sizes that are ready
    steps: int = 0
    step_rows: int = 0  # rows of all steps: over `steps` it is the mean batch size
    step_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0  # guessed ones that went into a step
    accepted_tokens: int = 0  # those of them that came true
    reused_tokens: int = 0  # prompt tokens found in kept pages
    missed_tokens: int = 0  # prompt tokens that had to be computed
    failures: int = 0  # steps that failed
    preemptions: int = 0
