"""Commands about models that a server improves while it serves them: optimize --live, jobs, versions, rollback."""

import contextlib
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tars_jax.cli.output import human_bytes, human_time, note, table
from tars_jax.cli.progress import share_bar
from tars_jax.cli.server import running_server
from tars_jax.errors import TarsError


def search(model: str, data: Path, eval_data: Path | None, settings: Mapping[str, Any], save: str) -> None:
    """Let the server search, and follow it to its end; Ctrl-C stops the job, what was accepted stays. ``save``: the name of a model to be
    made of what it found, or empty."""
    from tars_jax.evolve.data import read_lines

    body = {"model": model, "data": read_lines(data)[0], "eval": read_lines(eval_data)[0] if eval_data else []}
    with contextlib.closing(running_server()) as server:
        view: Mapping[str, Any] = {}
        with share_bar("loading") as show, contextlib.closing(server.optimize({**body, **settings})) as views:
            try:
                for view in views:
                    show(share(view, settings), describe(view))
            except KeyboardInterrupt:
                if not view:
                    raise
                view = server.stop_job(view["id"])
        if "error" in view:
            raise TarsError(view["error"])
        note(verdict(view))
        if save and view["version"] is not None:
            note(f"saved as '{server.save_version(model, view['version'], save)['name']}'")


def jobs(stop: Annotated[str, typer.Option(metavar="ID", help="Stop this one; what it has found stays.")] = "") -> None:
    """List the searches of a server, or stop one."""
    with contextlib.closing(running_server()) as server:
        if stop:
            note(verdict(server.stop_job(stop)))
            return
        header = ("ID", "MODEL", "STATUS", "GENERATION", "HELD-OUT", "VERSION", "STARTED")
        rows = [
            (
                *(job["id"], job["model"], job["status"], str(job["generation"])),
                *(_score(job["held_out"]), str(job["version"] or "-"), human_time(datetime.datetime.fromisoformat(job["created_at"]))),
            )
            for job in server.jobs()
        ]
    print(table(header, rows))


def versions(
    model: str,
    save: Annotated[str, typer.Option(metavar="NAME", help="Keep a version as a model of this name.")] = "",
    version: Annotated[int | None, typer.Option(help="With --save: which one; else the one that is served.")] = None,
) -> None:
    """List the weights that a server has served a model with, or keep some of them."""
    with contextlib.closing(running_server()) as server:
        if save:
            note(f"saved as '{server.save_version(model, version, save)['name']}'")
            return
        found = server.versions(model)
    rows = [
        (
            f"{row['version']}{' *' if row['version'] == found['current'] else ''}",
            *(row["kind"], str(row["source"] or "-"), _score(row["held_out_before"]), _score(row["held_out_after"])),
            *(human_bytes(row["size"]), human_time(datetime.datetime.fromisoformat(row["created_at"]))),
        )
        for row in found["versions"]
    ]
    print(table(("VERSION", "KIND", "FROM", "BEFORE", "AFTER", "SIZE", "CREATED"), rows))


def roll_back(model: str, version: Annotated[int | None, typer.Argument(help="Without it the one before.")] = None) -> None:
    """Let a server go back to earlier weights of a model."""
    with contextlib.closing(running_server()) as server:
        back = server.roll_back(model, version)
    note(f"version {back['version']} of {model} is version {back['source']} again")


def share(view: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """Of its work that a job has done."""
    shares = [view["seconds"] / settings["seconds"]]
    if settings.get("generations"):
        shares.append(view["generation"] / settings["generations"])
    return 1.0 if view["done"] else max(shares)


def describe(view: Mapping[str, Any]) -> str:
    """How a job stands, in a line."""
    if view["status"] != "searching":
        return str(view["status"])
    parts = [f"generation {view['generation']}"]
    parts += [f"{name} {view[name]:.3f}" for name in ("best", "mean") if view[name] is not None]
    parts += [f"held-out {_score(view['held_out'])}"]
    parts += [f"serving version {view['version']}"] if view["version"] is not None else []
    return "  ".join(parts)


def verdict(view: Mapping[str, Any]) -> str:
    """What has come of a job."""
    result = view["result"]
    if view["version"] is None or not result["after"]:
        return f"{view['status']} after {view['generation']} generations: {result['reason']}; the weights are as they were"
    before, after = result["before"]["score"], result["after"]["score"]
    return f"{view['status']} after {view['generation']} generations: held-out {before:.3f} -> {after:.3f}, version {view['version']}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
