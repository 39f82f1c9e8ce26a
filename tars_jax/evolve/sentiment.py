"""A task made of words: say whether a short review is positive or negative.

Training and held-out reviews share their templates and no adjective and no noun. A language model knows the answer; what it learns
is to give it, in one word, where it would have gone on writing.
"""

import itertools
import random
from collections.abc import Mapping, Sequence

TEMPLATES = (
    "What a {adjective} {noun}!",
    "The {noun} was {adjective}.",
    "I thought the {noun} was really {adjective}.",
    "Honestly, a {adjective} {noun}.",
    "My friends called it a {adjective} {noun}.",
    "That {noun} turned out to be {adjective}.",
)
TRAIN_NOUNS = ("movie", "restaurant", "hotel", "song", "book", "phone", "concert", "teacher", "meal", "camera", "garden", "play")
TRAIN_ADJECTIVES = {
    "positive": ("wonderful", "great", "excellent", "amazing", "delightful", "brilliant", "superb", "lovely", "fantastic", "charming"),
    "negative": ("terrible", "awful", "horrible", "boring", "disappointing", "dreadful", "poor", "ugly", "disgusting", "annoying"),
}
HELD_OUT_NOUNS = ("game", "museum", "album", "novel", "laptop", "show", "course", "dinner", "tour", "speech", "bicycle", "film")
HELD_OUT_ADJECTIVES = {
    "positive": ("splendid", "marvelous", "perfect", "outstanding", "magnificent", "impressive", "enjoyable", "beautiful", "fine", "good"),
    "negative": ("pathetic", "bad", "miserable", "unpleasant", "lousy", "tedious", "mediocre", "shabby", "useless", "painful"),
}
PROMPT = "Review: {review}\nSentiment:"


def sentiment_task(count: int = 240, held_out: int = 240, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Lines ``{"prompt", "completion"}`` to train on and held-out ones, each a random choice, half of them positive."""
    return _draw(TRAIN_NOUNS, TRAIN_ADJECTIVES, count, seed), _draw(HELD_OUT_NOUNS, HELD_OUT_ADJECTIVES, held_out, seed)


def _draw(nouns: Sequence[str], adjectives: Mapping[str, Sequence[str]], count: int, seed: int) -> list[dict[str, str]]:
    chooser, kinds = random.Random(seed), []
    for label, words in adjectives.items():
        lines = [
            {"prompt": PROMPT.format(review=template.format(adjective=word, noun=noun)), "completion": f" {label}"}
            for template, word, noun in itertools.product(TEMPLATES, words, nouns)
        ]
        kinds.append(chooser.sample(lines, count // 2))
    lines = [line for pair in zip(*kinds, strict=True) for line in pair]
    chooser.shuffle(lines)
    return lines
