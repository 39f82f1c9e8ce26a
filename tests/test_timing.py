"""Step sizes follow measured times."""

from tars_jax.engine.timing import MIN_TOKENS, TRIAL, StepTimes


def measured(**seconds: float) -> StepTimes:
    times = StepTimes()
    for bucket, value in seconds.items():
        times.observe(int(bucket[1:]), value)
    return times


def test_nothing_is_known_at_first() -> None:
    assert StepTimes().predict(64) == 0.0
    assert StepTimes().budget(0.1, 4, 512) == 512


def test_sizes_not_seen_are_guessed_from_their_neighbours() -> None:
    times = measured(b16=0.02, b32=0.04)
    assert [times.predict(size) for size in (4, 16, 24, 64)] == [0.02, 0.02, 0.03, 0.08]


def test_an_outlier_moves_the_mean_little() -> None:
    times = measured(b1=0.01)
    times.observe(1, 100.0)
    assert times.predict(1) < 0.02


def test_the_largest_size_within_the_target_is_chosen() -> None:
    times = measured(b4=0.01, b64=0.05, b128=0.09, b256=0.2, b512=0.4)
    assert times.budget(0.1, 4, 512) == 128
    assert times.budget(1.0, 4, 512) == 512


def test_prompts_are_read_whatever_the_target() -> None:
    times = measured(b1=1.0, b32=3.0, b512=500.0)
    assert times.budget(0.1, 1, 512) == MIN_TOKENS
    assert times.budget(0.1, 40, 512) == 80


def test_the_next_size_is_tried_now_and_then() -> None:
    times = measured(b4=0.01, b64=0.09)
    budgets = [times.budget(0.1, 4, 512) for _ in range(2 * TRIAL)]
    assert set(budgets) == {64, 128}
    assert budgets.count(128) == 2
    times.observe(128, 0.08)
    assert times.budget(0.1, 4, 512) == 128
