"""How the tools' commands end: as `emollama`'s do (`dispatch.boundary`)."""

import sys
from collections.abc import Callable, Sequence

from emollama_jax.dispatch import boundary


def run(name: str, command: Callable[[], object], args: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        name: name of the tool, shown before an error.
        command: function to run.
        args: words of the command, for a report; the program's own by default.
    """
    with boundary(sys.argv[1:] if args is None else args, program=name):
        command()
