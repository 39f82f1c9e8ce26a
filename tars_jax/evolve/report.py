"""What a run has to show: one JSON object, and one HTML page that needs nothing else."""

import dataclasses
import html
import json
from collections.abc import Callable, Sequence
from typing import Any

from tars_jax.evolve.evaluation import Evaluation
from tars_jax.evolve.evolution import Evolution
from tars_jax.evolve.job import Outcome

WIDTH, HEIGHT, MARGIN = 640, 180, 44
Curve = Sequence[tuple[float, float]]

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums }} code {{ overflow-wrap: anywhere }} svg {{ width: 100%; height: auto }}
text {{ font: 12px system-ui, sans-serif; fill: #555 }}
</style>
<h1>{title}</h1>
<p>{verdict}</p>
<table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>
{charts}
<h2>Settings</h2>
<table>{settings}</table>
<p><code>{command}</code></p>
</html>
"""


def as_record(evolution: Evolution, outcome: Outcome, command: str) -> dict[str, Any]:
    """Everything about a run, as plain values."""
    return {
        "model": evolution.model.name,
        "command": command,
        "accepted": outcome.best is not None,
        "refused": None if outcome.best is not None else outcome.refused,
        "before": dataclasses.asdict(outcome.before),
        "after": None if outcome.after is None else dataclasses.asdict(outcome.after),
        "best_generation": outcome.best_generation,
        "generations": outcome.state.generation,
        "evaluations": outcome.state.generation * evolution.strategy.population,
        "seconds": outcome.seconds,
        "drift": None if outcome.best is None else evolution.drift(outcome.best),
        "parameters": evolution.space.size,
        "settings": dataclasses.asdict(evolution.settings),
        "curves": [dataclasses.asdict(point) for point in outcome.points],
    }


def as_json(evolution: Evolution, outcome: Outcome, command: str) -> str:
    return json.dumps(as_record(evolution, outcome, command), indent=1)


def as_html(evolution: Evolution, outcome: Outcome, command: str) -> str:
    record = as_record(evolution, outcome, command)
    settings = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in record["settings"].items())
    rows = [_row(label, show(outcome.before), "-" if outcome.after is None else show(outcome.after)) for label, show in ROWS]
    if outcome.best is not None:
        rows.append(_row("norm of the update / of what it changes", "0 %", f"{record['drift']:.1%}"))
    return PAGE.format(
        title=_text(f"Evolution of {evolution.model.name}"),
        verdict=_text(verdict(outcome)),
        rows="".join(rows),
        charts="".join(_charts(outcome)),
        settings=settings,
        command=_text(command),
    )


FLAT = (
    "all members scored the same, so there was nothing to follow; longer answers (--max-new-tokens) or another fitness may tell them apart"
)


def verdict(outcome: Outcome) -> str:
    """What came of it, in a sentence."""
    spent = f"{outcome.state.generation} generations, {outcome.seconds:.0f} s"
    if outcome.after is None:
        flat = outcome.points and all(point.metrics.best == point.metrics.mean for point in outcome.points)
        why = FLAT if flat else outcome.refused
        return f"No update was accepted in {spent}" + (f": {why}." if why else ".")
    return (
        f"Accepted after generation {outcome.best_generation} of {spent}: held-out score {outcome.before.score:.1%} to "
        f"{outcome.after.score:.1%} on {outcome.after.examples} examples, loss on other text "
        f"{outcome.after.general_loss / outcome.before.general_loss - 1:+.2%}."
    )


ROWS: tuple[tuple[str, Callable[[Evaluation], str]], ...] = (
    ("held-out score", lambda e: f"{e.score:.3f}"),
    ("held-out exact match", lambda e: f"{e.exact:.1%}"),
    ("its 95 % interval (Wilson)", lambda e: f"{e.interval[0]:.1%} to {e.interval[1]:.1%}"),
    ("held-out loss", lambda e: f"{e.loss:.3f}"),
    ("loss on other text", lambda e: f"{e.general_loss:.4f}"),
)


def _row(label: str, before: str, after: str) -> str:
    return f'<tr><td>{_text(label)}</td><td class="n">{_text(before)}</td><td class="n">{_text(after)}</td></tr>'


def _charts(outcome: Outcome) -> list[str]:
    points = outcome.points
    evaluated: list[tuple[int, Evaluation]] = [(0, outcome.before)]
    evaluated += [(point.metrics.generation, point.evaluation) for point in points if point.evaluation is not None]
    fitness = [[(p.metrics.generation, p.metrics.best) for p in points], [(p.metrics.generation, p.metrics.mean) for p in points]]
    return [
        _chart("Held-out score", [[(g, e.score) for g, e in evaluated]]),
        _chart("Fitness: best member, and mean", fitness),
        _chart("Held-out loss", [[(g, e.loss) for g, e in evaluated]]),
        _chart("Loss on other text", [[(g, e.general_loss) for g, e in evaluated]]),
        _chart("Norm of the update / of what it changes", [[(p.metrics.generation, p.drift) for p in points]]),
    ]


def _chart(title: str, curves: Sequence[Curve]) -> str:
    """Curves over generations as an SVG picture."""
    values = [point for curve in curves for point in curve]
    if not values:
        return ""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*values, strict=True))
    across, up = (right - left) or 1, (high - low) or 1

    def place(point: tuple[float, float]) -> str:
        x = MARGIN + (point[0] - left) / across * (WIDTH - 2 * MARGIN)
        return f"{x:.1f},{HEIGHT - 24 - (point[1] - low) / up * (HEIGHT - 48):.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{" ".join(map(place, curve))}"/>'
        for curve, color in zip(curves, ("#0b62a4", "#d9822b"), strict=False)
    )
    labels = f'<text x="0" y="28">{high:.3g}</text><text x="0" y="{HEIGHT - 24}">{low:.3g}</text>'
    ends = f'<text x="{MARGIN}" y="{HEIGHT - 6}">{left:g}</text><text x="{WIDTH - MARGIN}" y="{HEIGHT - 6}">{right:g}</text>'
    return f'<h2>{_text(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{lines}{labels}{ends}</svg>'


def _text(value: object) -> str:
    return html.escape(str(value))
