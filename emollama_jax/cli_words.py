"""Shared by the verbs: names of arguments in --help, the config, the terminal."""

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from emollama_jax.redact import redact

if TYPE_CHECKING:
    from rich.console import Console

    from emollama_jax.config import Config

_positional, _arg = tyro.conf.Positional, tyro.conf.arg
DataSet = Annotated[str, _positional, _arg(metavar="NAME")]
ConfigName = Annotated[str, _positional, _arg(metavar="CONFIG")]
Overrides = Annotated[tuple[str, ...], _positional, _arg(metavar="[KEY=VALUE …]")]
Run = Annotated[str, _positional, _arg(metavar="RUN")]
Media = Annotated[tuple[str, ...], _positional, _arg(metavar="MEDIA … [QUESTION]")]
Folder = Annotated[str, _arg(metavar="DIR")]
FLAT = _arg(name="")  # as if an option class's fields were the verb's own arguments


def load_config(name: str, overrides: tuple[str, ...] = ()) -> "Config":
    """The config of a name in configs/ or of a .yaml file, with `key=value` overrides."""
    from emollama_jax.config import load

    return load(name, overrides)


def new_console() -> "Console":
    """The terminal, for progress and for what is logged; results go to standard output."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    # Through the console, a line appears above a progress bar. The plain handler that Orbax sets up
    # when it is imported (by way of absl) would tear the bar.
    remove_handlers(logging.StreamHandler, LogLines)
    logging.getLogger().addHandler(LogLines(console))
    return console


def remove_handlers(*kinds: type[logging.Handler]) -> None:
    """Takes handlers of exactly these kinds from the root logger."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) in kinds:
            root.removeHandler(handler)


class LogLines(logging.Handler):
    """Shows what is logged as lines of a console, each without its traceback: what matters of it is
    raised as well.
    """

    def __init__(self, console: "Console"):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        # Orbax logs in pages what it raises later, and leaves failed reads on asyncio's loop.
        if record.name == "asyncio" or "/orbax/" in record.pathname:
            return
        own = record.name.partition(".")[0] == __name__.partition(".")[0]
        where = "" if own else f"{record.name}: "
        text = (record.getMessage().splitlines() or [""])[0]
        line = redact(f"{record.levelname.lower()}: {where}{text}")
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
