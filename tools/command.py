"""How the tools' commands end: bad input is one line and exit status 2, an interrupt status 130."""

import sys
from collections.abc import Callable

from emollama_jax.errors import UserError


def run(name: str, command: Callable[[], object]) -> None:
    """Runs a command.

    Args:
        name: name of the tool, shown before an error.
        command: function to run.
    """
    try:
        command()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
