"""Guesses come from the sequence's own past, and stop where they do not pay."""

from hypothesis import given
from hypothesis import strategies as st

from tars_jax.engine.speculation import LONGEST, REST, SHORTEST, TRIAL, PromptLookup, Speculation


def test_a_repeated_end_is_continued_as_before() -> None:
    assert PromptLookup().propose([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == (4, 5, 9)


def test_the_latest_occurrence_counts() -> None:
    assert PromptLookup().propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == (8,)


def test_the_longest_match_counts() -> None:
    assert PromptLookup().propose([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1) == (7,)


def test_nothing_is_guessed_without_a_repetition() -> None:
    assert PromptLookup().propose([1, 2, 3, 4], 4) == ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6))
def test_guesses_follow_an_earlier_occurrence_of_the_end(tokens: list[int], count: int) -> None:
    grown = PromptLookup()
    for length in range(1, len(tokens)):  # indexed step by step, as in an engine
        grown.propose(tokens[:length], count)
    guess = grown.propose(tokens, count)
    assert guess == PromptLookup().propose(tokens, count)
    ends = [
        (size, at)
        for size in range(LONGEST, SHORTEST - 1, -1)
        for at in range(len(tokens) - 1, size - 1, -1)
        if len(tokens) > size and tokens[at - size : at] == tokens[-size:]
    ]
    expected = tokens[ends[0][1] : ends[0][1] + count] if ends else []
    assert list(guess) == expected


def test_failing_guesses_rest_and_are_tried_again() -> None:
    speculation = Speculation(PromptLookup())
    tokens = [1, 2, 3] * 10
    for _ in range(TRIAL // 4):
        assert speculation.propose(tokens, 4)
        speculation.judge(4, 0)
    assert not speculation.propose(tokens, 4)
    for _ in range(REST):
        speculation.judge(0, 0)
    assert speculation.propose(tokens, 4)


def test_good_guesses_go_on() -> None:
    speculation = Speculation(PromptLookup())
    for _ in range(3 * TRIAL):
        speculation.judge(4, 3)
    assert speculation.propose([1, 2, 3] * 4, 4)
