"""``tars bench``: speed, start-up and memory of a model on this machine; its subcommands measure other things."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tars_jax.cli import cycles, load_test
from tars_jax.cli.output import note
from tars_jax.errors import InvalidRequest

COMMANDS: tuple[tuple[str, Callable[..., Any]], ...] = (  # subcommands: name, function
    ("serve", load_test.serve),
    ("optim", cycles.optim),
)


def make_group() -> typer.Typer:
    """``tars bench`` with its subcommands; alone it measures a model."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(bench)
    for name, function in COMMANDS:
        group.command(name)(function)
    return group


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model, by name or path.")] = None,
    prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Tokens of the prompt whose prefill is timed.")] = 512,
    new: Annotated[int, typer.Option("-n", "--n-gen", help="Tokens generated per stream.")] = 64,
    batches: Annotated[str, typer.Option("-b", "--batch", help="Streams decoded at once; several separated by commas.")] = "1,16",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Timed repetitions of each.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill, decode, start-up and memory of a model; or what a subcommand says."""
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise typer.BadParameter("which model? for example --model smollm2:135m", param_hint="--model")
    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        raise InvalidRequest(f"-b takes numbers separated by commas, got {batches!r}") from None
    if min(prompt, new - 1, repetitions, *sizes) < 1:
        raise InvalidRequest("bench needs at least 1 prompt token, 2 new tokens, 1 stream and 1 repetition")
    from tars_jax.bench import measure
    from tars_jax.loaders.opening import load

    report = measure(load(model), prompt_tokens=prompt, new_tokens=new, batches=sizes, repetitions=repetitions, progress=note)
    if as_json:
        print(json.dumps(report.as_json()))
        return
    for label, rate in [(f"prefill {prompt}", report.prefill), *((f"decode x{size}", rate) for size, rate in report.decode.items())]:
        print(f"{label:<14}{rate.median:>10.1f} ± {rate.spread:.1f} tokens/s")
    print(f"{'start-up':<14}{report.startup_seconds:>10.2f} s to the first token, warm compilation cache")
    print(f"{'memory':<14}{report.peak_rss_mb:>10.0f} MB at most")
    for name, stages in report.stages.items():
        total = sum(stages.values())
        print(f"\n{name + ', by stage':<28}{total:>10.2f} ms")
        for stage, ms in stages.items():
            print(f"  {stage:<26}{ms:>10.2f} ms{ms / total:>8.0%}")
    limit = report.roofline
    read, reached = f"{limit.bytes_per_token / 1e6:.0f} MB", f"{limit.bandwidth_gb:.1f} GB/s"
    print(f"\ndecode reads {read} a token: {limit.decode_share:.0%} of the {reached} measured")
    macs, speed = f"{limit.macs_per_token / 1e6:.0f} million multiply-adds", f"{limit.gmacs:.0f} thousand millions a second"
    print(f"prefill does {macs} a token: {limit.prefill_share:.0%} of the {speed} measured")
