"""The interactive chat: a line is a prompt, unless it begins with a slash."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tars_jax.cli.output import note
from tars_jax.cli.run import read_format, read_think
from tars_jax.cli.session import Session
from tars_jax.errors import TarsError

HISTORY = Path("~/.tars/history")

HELP = """Available Commands:
  /set            Set session variables
  /show           Show model information
  /load <model>   Load another model
  /list           List models
  /clear          Clear session context
  /bye            Exit
  /?              Help for a command

Use \"\"\" to begin a multi-line message."""

SET_HELP = """Available Commands:
  /set parameter NAME VALUE...   Set a parameter
  /set system <string>           Set system message
  /set history | nohistory       Enable or disable history
  /set wordwrap | nowordwrap     Enable or disable wordwrap
  /set format json | noformat    Enable or disable JSON mode
  /set verbose | quiet           Show or hide timings
  /set think [level] | nothink   Enable or disable thinking"""

SHOW_HELP = """Available Commands:
  /show info | license | modelfile | parameters | system | template"""

_SWITCHES: dict[str, tuple[str, Any, str]] = {  # word of /set: (field of the session, value, what is said)
    "history": ("keeps_history", True, ""),
    "nohistory": ("keeps_history", False, ""),
    "wordwrap": ("wraps", True, "Set 'wordwrap' mode."),
    "nowordwrap": ("wraps", False, "Set 'nowordwrap' mode."),
    "noformat": ("format", None, "Disabled format."),
    "verbose": ("verbose", True, "Set 'verbose' mode."),
    "quiet": ("verbose", False, "Set 'quiet' mode."),
    "nothink": ("think", False, "Set 'nothink' mode."),
}


def chat(session: Session) -> None:
    """Read and answer until /bye or Ctrl-D."""
    with _line_editing(session):
        while True:
            try:
                text = read_message()
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note("\nUse Ctrl + d or /bye to exit.")
                continue
            try:
                if text.strip() in ("/bye", "/exit"):
                    return
                _handle(session, text)
            except TarsError as error:
                note(f"Error: {error}")
            except KeyboardInterrupt:
                note("")


def read_message() -> str:
    '''One line, or several between """ and """.'''
    text = input(">>> ")
    if not text.lstrip().startswith('"""'):
        return text
    text = text.lstrip()[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + input("... ")
    return text.rstrip()[:-3]


def _handle(session: Session, text: str) -> None:
    if not text.startswith("/"):
        if text.strip():
            session.ask(text)
            print(flush=True)
        return
    command, *words = text.split()
    match command:
        case "/set":
            _set(session, words, text)
        case "/show":
            _show(session, words)
        case "/load" if words:
            session.model, session.messages = words[0], []
            session.load()
        case "/list":
            note("\n".join(session.backend.names()))
        case "/clear":
            session.messages.clear()
            note("Cleared session context")
        case "/?" | "/help":
            note({"set": SET_HELP, "/set": SET_HELP, "show": SHOW_HELP, "/show": SHOW_HELP}.get(" ".join(words), HELP))
        case _:
            note(f"Unknown command '{command}'. Type /? for help")


def _set(session: Session, words: list[str], text: str) -> None:
    match words:
        case ["parameter", name, *values] if values:
            session.options[name] = parameter(name, values)
            note(f"Set parameter '{name}' to '{', '.join(values)}'")
        case ["system", *rest] if rest:
            session.system = text.split("system", 1)[1].strip().strip('"')
            note("Set system message.")
        case ["format", *rest] if rest:
            session.format = read_format(" ".join(rest))
            note("Set format.")
        case ["think", *level]:
            session.think = read_think(level[0] if level else "true")
            note("Set 'think' mode.")
        case [word] if word in _SWITCHES:
            field, value, said = _SWITCHES[word]
            setattr(session, field, value)
            if said:
                note(said)
        case _:
            note(SET_HELP)


def parameter(name: str, values: list[str]) -> Any:
    """The value of an option as typed: a list for ``stop``, else the number or the word."""
    if name == "stop":
        return values
    with contextlib.suppress(ValueError):
        return int(values[0])
    with contextlib.suppress(ValueError):
        return float(values[0])
    return {"true": True, "false": False}.get(values[0].lower(), values[0])


def _show(session: Session, words: list[str]) -> None:
    from tars_jax.cli.store import describe

    match words:
        case ["info"]:
            note(describe(session.backend.show(session.model)))
        case ["system"] if session.system:
            note(session.system)
        case ["license" | "modelfile" | "parameters" | "system" | "template" as part]:
            note(session.backend.show(session.model).get(part) or f"No {part} was specified for this model.")
        case _:
            note(SHOW_HELP)


@contextlib.contextmanager
def _line_editing(session: Session) -> Iterator[None]:
    """Arrow keys and a history kept between sessions, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = HISTORY.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        if session.keeps_history:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)
                os.chmod(path, 0o600)  # prompts are private
    sys.stdout.flush()
