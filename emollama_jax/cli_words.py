"""What the verbs share: how their words are named in --help, and two small services."""

from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from emollama_jax.config import Config

_positional, _arg = tyro.conf.Positional, tyro.conf.arg
DataSet = Annotated[str, _positional, _arg(metavar="NAME")]
ConfigName = Annotated[str, _positional, _arg(metavar="CONFIG")]
Overrides = Annotated[tuple[str, ...], _positional, _arg(metavar="[KEY=VALUE …]")]
Run = Annotated[str, _positional, _arg(metavar="RUN")]
Folder = Annotated[str, _arg(metavar="DIR")]


def load_config(name: str, overrides: tuple[str, ...] = ()) -> "Config":
    """The config of a name in configs/ or of a .yaml file, with `key=value` overrides."""
    from emollama_jax.config import load

    return load(name, overrides)


def new_console() -> "Console":
    """The terminal's, for progress; results go to standard output."""
    import sys

    from rich.console import Console

    return Console(file=sys.stderr)
