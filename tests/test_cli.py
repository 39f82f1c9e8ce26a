"""The command line: what goes to stdout, what to stderr, which exit codes; in-process and through a server."""

import builtins
import datetime
import io
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeLoader, FakeModel, make_store, serving

from api.app import create_app
from tars_jax.cli import main
from tars_jax.cli.backends import LocalBackend
from tars_jax.cli.output import AnswerWriter, human_bytes, human_duration, human_time
from tars_jax.cli.session import Session
from tars_jax.store import Store

Cli = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    """Standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")  # nobody listens there
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run ``tars`` in this process: (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tars", *words])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "models", system="Be brief.", license="MIT")


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture(params=["local", "server"])
def backend(request: pytest.FixtureRequest, store: Store, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``tars run`` with a fake model, both ways."""
    if request.param == "local":
        monkeypatch.setattr("tars_jax.cli.backends.open_backend", lambda settings: LocalBackend(loader.models(store)))
        yield
        return
    models = loader.models(store)
    with serving(create_app(models.settings, models)) as url:
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield


def prompts(loader: FakeLoader) -> list[str]:
    return [prompt for engine in loader.engines for prompt in engine.prompts()]


# the store


def test_list(cli: Cli, store: Store) -> None:
    code, out, _ = cli("list")
    header, row = out.splitlines()
    assert (code, header.split(), row.split()[0]) == (0, ["NAME", "ID", "SIZE", "MODIFIED"], "fake:latest")
    assert row.split()[1] == store.find("fake").digest[:12]


def test_list_of_nothing(cli: Cli) -> None:
    assert cli("ls")[:2] == (0, "NAME    ID    SIZE    MODIFIED\n")


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--license", "MIT"), ("--system", "Be brief."), ("--modelfile", "FROM "), ("--template", "<assistant>"), ("--parameters", "")],
)
def test_show_parts(cli: Cli, store: Store, flag: str, text: str) -> None:
    code, out, _ = cli("show", "fake", flag)
    assert code == 0
    assert text in out


def test_show(cli: Cli, store: Store) -> None:
    _, out, _ = cli("show", "fake", "-v")
    for part in ("llama", "context length      2048", "completion", "Be brief.", "tokenizer.ggml.tokens", "output.weight"):
        assert part in out
    assert cli("show", "fake", "--license", "--system")[0] == 1


def test_cp_and_rm(cli: Cli, store: Store) -> None:
    assert cli("cp", "fake", "twin") == (0, "", "copied 'fake' to 'twin'\n")
    assert cli("rm", "fake", "twin") == (0, "", "deleted 'fake'\ndeleted 'twin'\n")
    assert store.models() == []


def fake_pull(name: str, store: Store, **options: Any) -> Iterator[dict[str, Any]]:
    yield {"status": "pulling manifest"}
    for completed in (1, 2):
        yield {"status": "pulling abc", "total": 2, "completed": completed}
    make_store(store.root, name)
    yield {"status": "success"}


def test_pull(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tars_jax.hub.pull", fake_pull)
    assert cli("pull", "m") == (0, "", "pulling manifest\npulling abc\nsuccess\n")


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("show", "nobody"), 1, "Error: model 'nobody:latest' not found\n"),
        (("rm", "nobody"), 1, "Error: model 'nobody' not found\n"),
        (("cp", "nobody", "x"), 1, 'Error: model "nobody" not found\n'),
        (("ps",), 1, "Error: no TARS server answers at http://127.0.0.1:1; start one with `tars serve`, or set OLLAMA_HOST\n"),
        (("perplexity", "m", "/nowhere"), 1, "Error: cannot read /nowhere: No such file or directory\n"),
        (("run", "m", "--format", "{"), 1, None),
        (("optimize", "m", "--data", "x", "--live", "--samples", "2"), 2, None),
        (("nonsense",), 2, None),
        (("list", "--nonsense"), 2, None),
    ],
)
def test_errors_are_one_line(cli: Cli, words: tuple[str, ...], code: int, error: str | None) -> None:
    got, out, err = cli(*words)
    assert (got, out) == (code, "")
    assert error is None or err == error
    assert "Traceback" not in err


def test_debug_shows_where(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_DEBUG", "1")
    assert "Traceback" in cli("show", "nobody")[2]


# run


def test_the_answer_alone_is_on_stdout(cli: Cli, backend: None, loader: FakeLoader) -> None:
    assert cli("run", "fake", "hi", "there") == (0, "one two three four five\n", "")
    assert prompts(loader) == ["<system> Be brief.\n<user> hi there\n<assistant>"]


def test_adapters_run_in_this_process(cli: Cli, store: Store, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[Path]] = []

    def open_local(settings: Any, adapters: list[Path]) -> LocalBackend:
        given.append(adapters)
        return LocalBackend(loader.models(store))

    monkeypatch.setattr("tars_jax.cli.backends.open_local", open_local)
    assert cli("run", "fake", "hi", "--adapter", "one", "--adapter", "two")[:2] == (0, "one two three four five\n")
    assert given == [[Path("one"), Path("two")]]


def test_saving_needs_an_adapter(cli: Cli, store: Store) -> None:
    code, _, err = cli("run", "fake", "hi", "--save", "tuned")
    assert code == 1
    assert "name one by --adapter PATH" in err


def test_save_keeps_the_model_and_runs_it(cli: Cli, store: Store, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(store: Store, base: str, adapters: list[Path], name: str) -> Any:
        assert (base, adapters) == ("fake", [Path("one")])
        return store.copy(base, name)

    monkeypatch.setattr("tars_jax.loaders.adapted.save_adapted", save)
    monkeypatch.setattr("tars_jax.cli.backends.open_local", lambda settings, adapters: LocalBackend(loader.models(store)))
    code, out, err = cli("run", "fake", "hi", "--adapter", "one", "--save", "tuned")
    assert (code, out, err) == (0, "one two three four five\n", "saved as 'tuned:latest'\n")
    assert "tuned:latest" in cli("list")[1]


def test_list_marks_adapters(cli: Cli, store: Store) -> None:
    base = store.find("fake")
    store.write_manifest("tuned", base.config, [*base.layers, store.add_layer("adapter", "LoRA")])
    rows = {row.split()[0]: row for row in cli("list")[1].splitlines()}
    assert "B, adapter" in rows["tuned:latest"]
    assert "adapter" not in rows["fake:latest"]


def test_options_reach_the_engine(cli: Cli, backend: None, loader: FakeLoader) -> None:
    words = (
        "--temperature",
        "0",
        "--top-k",
        "3",
        "--seed",
        "7",
        "--num-predict",
        "2",
        "--num-ctx",
        "64",
        "--system",
        "S",
        "--format",
        "json",
    )
    assert cli("run", "fake", "hi", *words)[1] == "one two \n"
    (engine,) = loader.engines
    params = engine.requests[0].params
    assert (params.temperature, params.top_k, params.seed, params.max_tokens, params.grammar) == (0, 3, 7, 2, "json")
    assert engine.config.max_context == 64
    assert "<system> S" in prompts(loader)[0]


def test_piped_text_goes_in_front(cli: Cli, backend: None, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a text"))
    cli("run", "fake", "summarise")
    assert "<user> a text summarise" in prompts(loader)[0]


def test_verbose_timings_go_to_stderr(cli: Cli, backend: None) -> None:
    _, out, err = cli("run", "fake", "hi", "--verbose")
    assert out == "one two three four five\n"
    assert "eval count:           5 token(s)" in err
    assert "prompt eval duration: 250ms" in err
    assert "eval rate:            10.00 tokens/s" in err


def test_thinking_goes_to_stderr(cli: Cli, backend: None, loader: FakeLoader) -> None:
    loader.model = FakeModel(template="{{ messages[-1].content }}{# <think></think> #}", answer="<think> hm </think> well")
    code, out, err = cli("run", "fake", "hi", "--think")
    assert (code, out) == (0, "well\n")
    assert err == "Thinking...\nhm \n...done thinking.\n\n"
    assert cli("run", "fake", "hi", "--hidethinking")[1:] == ("well\n", "")


def test_run_errors(cli: Cli, backend: None) -> None:
    assert cli("run", "fake", "hi", "--think=high") == (1, "", 'Error: "fake" does not support thinking\n')
    assert cli("run", "fake", "hi", "--keepalive", "300") == (1, "", 'Error: time: missing unit in duration "300"\n')


def test_engine_failure(cli: Cli, backend: None, loader: FakeLoader) -> None:
    loader.model = FakeModel(error="out of memory")
    assert cli("run", "fake", "hi") == (1, "one \n", "Error: out of memory\n")


def test_run_says_how_a_file_is_run(cli: Cli, tmp_path: Path) -> None:
    (file := tmp_path / "m.gguf").write_bytes(b"GGUF")
    code, _, err = cli("run", str(file), "hi")
    assert code == 1
    assert "tars create NAME -f Modelfile" in err


def test_run_pulls_what_is_missing(cli: Cli, backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tars_jax.hub.pull", fake_pull)
    code, out, err = cli("run", "other", "hi")
    assert (code, out) == (0, "one two three four five\n")
    assert "success" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_came(loader: FakeLoader, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    local = LocalBackend(loader.models(store))
    session = Session(local, "fake")

    def interrupted(body: Any) -> Iterator[Any]:
        yield {"message": {"content": "half "}}
        raise KeyboardInterrupt

    local.chat = interrupted  # type: ignore[assignment,method-assign]
    session.ask("hi")
    local.close()
    assert session.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "half "}]
    assert capsys.readouterr().out == "half \n"


def test_an_answer_left_early_is_cancelled(loader: FakeLoader, store: Store) -> None:
    loader.model = FakeModel(answer="word " * 200, delay=0.01)
    local = LocalBackend(loader.models(store))
    chunks = local.chat({"model": "fake", "messages": [{"role": "user", "content": "hi"}]})
    next(chunks)
    chunks.close()
    assert loader.engines[0].cancelled
    local.close()
    assert loader.engines[0].said < 10


# the chat


@pytest.fixture
def chat(cli: Cli, backend: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """A chat in which these lines are typed."""

    def run(*lines: str) -> tuple[int, str, str]:
        typed = iter(lines)

        def read(prompt: str) -> str:
            if (line := next(typed, None)) is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys, "stdin", Terminal())
        return cli("run", "fake")

    return run


def test_chat_remembers(chat: Cli, loader: FakeLoader) -> None:
    code, out, _ = chat("first", "second", "/bye", "never")
    assert (code, out) == (0, "one two three four five\n\n" * 2)
    assert prompts(loader)[1].endswith("<user> first\n<assistant> one two three four five\n<user> second\n<assistant>")


def test_chat_commands(chat: Cli, loader: FakeLoader) -> None:
    lines = [
        "/set parameter num_predict 1",
        "/set system Be loud.",
        "/set format json",
        "a",
        "/clear",
        "/set noformat",
        '"""b',
        'c"""',
        "^C",
    ]
    code, out, err = chat(*lines)
    assert (code, out) == (0, "one \n\n" * 2)
    assert prompts(loader) == ["<system> Be loud.\n<user> a\n<assistant>", "<system> Be loud.\n<user> b\nc\n<assistant>"]
    assert [request.params.grammar for request in loader.engines[0].requests] == ["json", None]
    assert "Use Ctrl + d or /bye to exit." in err


def test_chat_shows(chat: Cli) -> None:
    _, out, err = chat(
        "/show info", "/show license", "/show parameters", "/list", "/?", "/? set", "/set", "/nonsense", "/load fake", "/exit"
    )
    assert out == ""
    for part in (
        "context length",
        "MIT",
        "No parameters",
        "fake:latest",
        "Available Commands",
        "/set think",
        "Unknown command '/nonsense'",
    ):
        assert part in err


def test_chat_goes_on_after_an_error(chat: Cli) -> None:
    _, out, err = chat("/set parameter num_predict x", "a", "/set parameter num_predict 1", "b")
    assert 'Error: option "num_predict" must be of type integer' in err
    assert out == "one \n\n"


# the server's commands


def test_ps_and_stop(cli: Cli, store: Store, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    models = loader.models(store)
    with serving(create_app(models.settings, models)) as url:
        monkeypatch.setenv("OLLAMA_HOST", url)
        cli("run", "fake", "hi")
        row = cli("ps")[1].splitlines()[1]
        assert row.split()[0] == "fake:latest"
        assert "100% CPU" in row
        assert cli("stop", "fake") == (0, "", "")
        assert len(cli("ps")[1].splitlines()) == 1
        assert cli("stop", "nobody") == (1, "", 'Error: couldn\'t find model "nobody" to stop\n')


def test_another_program_at_the_address_is_not_our_server(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{other.getsockname()[1]}")
        assert cli("ps")[0] == 1


def test_address_in_use(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli("serve", "--port", str(port)) == (1, "", f"Error: cannot listen on 127.0.0.1:{port}: address already in use\n")


def spawn(*words: str, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", "from tars_jax.cli import main; main()", *words], cwd=Path(__file__).parents[1], **options
    )


def test_serve_ends_cleanly() -> None:
    with spawn("serve", "--port", "0", stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        assert b"TARS listens on http://127.0.0.1:" in server.stderr.readline()
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_a_closed_pipe_is_quiet(store: Store) -> None:
    with spawn("list", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_perplexity(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model: str, text: str, *, context: int, exact: bool, progress: Callable[[int, int, float], None]) -> float:
        progress(1, 1, 5.0)
        assert exact
        return float(f"{len(text)}.{context}")

    monkeypatch.setattr("tars_jax.loaders.opening.load", lambda name: name)
    monkeypatch.setattr("tars_jax.perplexity.perplexity", measure)
    (tmp_path / "text").write_text("abc")
    assert cli("perplexity", "m", str(tmp_path / "text"), "--ctx", "12") == (0, "perplexity: 3.1200\n", "[1/1] 5.0000\n")


def test_version(cli: Cli) -> None:
    assert cli("-v")[1].startswith("tars version is ")


# words and numbers


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (1500, "1.5 KB"), (98_000_000, "98 MB"), (4_700_000_000, "4.7 GB")])
def test_sizes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-90, "1 minute ago"), (-172_800, "2 days ago"), (290, "4 minutes from now"), (1e10, "Forever"), (0, "Less than a second ago")],
)
def test_times(seconds: float, text: str) -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert human_time(now + datetime.timedelta(seconds=seconds), now) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(4_535_599_167, "4.535599167s"), (130_079_000, "130.079ms"), (12_000, "12µs"), (62_500_000_000, "1m2.5s"), (0, "0µs")],
)
def test_go_durations(nanoseconds: int, text: str) -> None:
    assert human_duration(nanoseconds) == text


def test_words_wrap_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "11")
    screen = Terminal()
    writer = AnswerWriter(screen, wraps=True)
    for text in ("one tw", "o three", " four\nfive"):
        writer.write(text)
    writer.end()
    assert screen.getvalue() == "one two \nthree four\nfive\n"
