"""``tars optimize``: search what makes a model better at examples: an adapter, norms, steering vectors, sampler settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tars_jax.cli.live import search as live_search
from tars_jax.cli.output import note
from tars_jax.cli.progress import share_bar
from tars_jax.cli.searching import Task, command
from tars_jax.errors import InvalidRequest, TarsError, UnusedOption

if TYPE_CHECKING:
    from tars_jax.evolve.job import Budget, Outcome


def optimize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model, by name or path.")],
    data: Annotated[Path, typer.Option(help='Examples, JSON Lines: {"prompt", "completion"} as they are, or {"messages"} for a chat.')],
    out: Annotated[Path | None, typer.Option(help="Folder for the result: adapter, seed log, report.")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out examples; else a fifth of the data is held out.")] = None,
    space: Annotated[str, typer.Option(help="What to change: low-rank, gains (of norms), steering or sampler.")] = "low-rank",
    strategy: Annotated[
        str | None, typer.Option(help="eggroll (default), genetic (default for sampler), annealing, montecarlo, hybrid or random.")
    ] = None,
    fitness: Annotated[str, typer.Option(help="label, exact, json, regex:PATTERN or module:function.")] = "label",
    layers: Annotated[str, typer.Option(help='Layers to evolve: "last:6", "all", "0-3,29".')] = "last:6",
    matrices: Annotated[str, typer.Option(help="Their matrices.")] = "q,k,v,o,gate,up,down",
    population: Annotated[int, typer.Option(help="Members of a generation.")] = 32,
    batch: Annotated[int | None, typer.Option(help="Examples a member is scored on; 6, or with --live as many as take a moment.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each of them, in a search of sampler settings.")] = 2,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 4,
    sigma: Annotated[float, typer.Option(help="How far members stray, relative to the weights.")] = 0.02,
    lr: Annotated[float, typer.Option(help="Step of a generation, relative to the weights.")] = 0.02,
    momentum: Annotated[float, typer.Option(help="Of the steps.")] = 0.0,
    decay: Annotated[float, typer.Option(help="Pull back to the model as it was, each generation.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer, where the fitness reads one.")] = 32,
    seconds: Annotated[float, typer.Option(help="Time for the search.")] = 120.0,
    generations: Annotated[int | None, typer.Option(help="Generations at most.")] = None,
    target: Annotated[float, typer.Option(help="Held-out score that is good enough.")] = 1.0,
    evaluate_every: Annotated[int, typer.Option(help="Generations between two held-out evaluations.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    live: Annotated[bool, typer.Option("--live", help="In the running server, which serves what is better at once.")] = False,
    save: Annotated[str, typer.Option(metavar="NAME", help="Keep the model and what was found in the store, as NAME.")] = "",
) -> None:
    """Make a model better at examples, without gradients: by an adapter, norms, steering vectors, or sampler settings."""
    _refuse_unused(context, space, strategy, live=live)
    search: dict[str, Any] = {
        **{"space": space, "fitness": fitness, "layers": layers, "population": population, "rank": rank, "sigma": sigma},
        **{"momentum": momentum, "decay": decay, "max_new_tokens": max_new_tokens, "seed": seed, "strategy": strategy or "eggroll"},
    }
    if live:
        limits = {"seconds": seconds, "generations": generations, "target": target}
        return live_search(model, data, eval_data, {**search, **limits, "batch": batch, "lr": lr}, save)
    if out is None:
        raise InvalidRequest("give --out DIR, a folder for the result, or --live to search in the running server")
    if not resume and (out / "report.json").exists():
        raise InvalidRequest(f"{out} holds the result of a run: choose another folder, or go on with --resume")
    task = Task(model, data, eval_data, fitness, out, resume, save)
    if space == "sampler":
        from tars_jax.cli.sampler_search import SamplerRun

        run = SamplerRun(strategy or "genetic", population, batch or 6, samples, max_new_tokens, seed)
        return run.execute(task, seconds, generations)

    from tars_jax.evolve.job import Budget

    settings = {**search, "matrices": tuple(matrices.split(",")), "learning_rate": lr}
    settings |= {"horizon": generations} if generations else {}
    settings |= {} if batch is None else {"batch": batch}
    budget = Budget(seconds, generations, target, evaluate_every)
    _run(task, settings, budget)


def _refuse_unused(context: typer.Context, space: str, strategy: str | None, *, live: bool) -> None:
    """Raise UnusedOption that lists the options which the user gave and this search would pass over."""
    if live and space == "sampler":
        raise UnusedOption("--live searches weights; --space sampler is a search of its own, with --out DIR")
    weights = ("layers", "matrices", "rank", "sigma", "lr", "momentum", "decay", "target", "evaluate_every")
    rules = (
        (live, ("out", "resume", "matrices", "samples", "evaluate_every"), "a search of its own; --live keeps its result with --save NAME"),
        (space == "sampler", weights, "a search of weights"),
        (space != "sampler", ("samples",), "--space sampler"),
        (space in ("gains", "steering"), ("matrices", "rank"), "--space low-rank"),
        (strategy not in (None, "eggroll"), ("lr", "momentum", "decay"), "--strategy eggroll"),
    )
    for applies, names, whose in rules:
        if applies and (given := [f"--{name.replace('_', '-')}" for name in names if _is_given(context, name)]):
            raise UnusedOption(f"{', '.join(given)}: only for {whose}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _run(task: Task, settings: dict[str, Any], budget: "Budget") -> None:
    from tars_jax.evolve import job
    from tars_jax.evolve.evolution import Evolution
    from tars_jax.evolve.fitness import parse_fitness
    from tars_jax.evolve.report import verdict
    from tars_jax.evolve.settings import Settings
    from tars_jax.loaders.opening import load

    chosen = Settings(**settings)
    fitness = parse_fitness(chosen.fitness, trusted=True)
    loaded = load(task.model)
    examples, held = task.examples(loaded, chosen.seed)
    evolution = Evolution(loaded, examples, chosen, fitness=fitness)
    state = job.resume(task.out, evolution) if task.resume else None
    note(f"{len(examples)} examples, {len(held)} held out; preparing")
    held_out = evolution.hold_out(held)
    outcome, end = _followed(job.search(evolution, held_out, budget, state), budget)
    if outcome is None:
        raise end or KeyboardInterrupt
    if not isinstance(end, TarsError):  # whose cause another evaluation would meet again
        outcome = job.concluded(evolution, held_out, outcome)
    job.save(task.out, evolution, outcome, command())
    note(verdict(outcome))
    if task.save and outcome.best is not None:
        from tars_jax.loaders.adapted import save_adapted

        task.keep(lambda store: save_adapted(store, task.model, [task.out / "adapter.gguf"], task.save))
    print(task.out)
    if isinstance(end, TarsError):
        raise type(end)(f"{end}; what was found before is in {task.out}, and --resume goes on from there") from end


def _followed(progress: "Iterator[Outcome]", budget: "Budget") -> "tuple[Outcome | None, BaseException | None]":
    """Show a search until it ends, Ctrl-C stops it or its fitness fails; its last outcome, None if there is nothing yet, and what ended it
    early."""
    outcome, end = None, None
    with share_bar("generation 0") as show:
        try:
            for outcome in progress:
                shares = [outcome.seconds / budget.seconds] if budget.seconds else []
                shares += [len(outcome.points) / budget.generations] if budget.generations else []
                show(max(shares, default=0.0), describe(outcome))
        except (KeyboardInterrupt, TarsError) as error:
            end = error
    return (outcome if outcome is not None and outcome.state.generation else None), end


def describe(outcome: "Outcome") -> str:
    """A generation in a line."""
    evaluated = [point.evaluation for point in outcome.points if point.evaluation] or [outcome.before]
    held = f"held-out {evaluated[-1].score:.3f}"
    if not outcome.points:
        return f"generation {outcome.state.generation}  {held}"
    metrics = outcome.points[-1].metrics
    return f"generation {metrics.generation}  best {metrics.best:.3f}  mean {metrics.mean:.3f}  {held}"
