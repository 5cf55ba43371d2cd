"""One line that says what a short command is busy with, until it has something to show."""

from rich.console import Console
from rich.status import Status as Spinner


class Status:
    """The line; on a terminal it is replaced by the next one and goes at the end.

    Where output goes to a file, each is a line of its own. A context manager.
    """

    def __init__(self, console: Console):
        self._console = console
        self._spinner: Spinner | None = None

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def say(self, what: str) -> None:
        """Shows what is being done."""
        if not self._console.is_terminal:
            self._console.print(f"{what} …", highlight=False, markup=False, soft_wrap=True)
            return
        if self._spinner is None:
            self._spinner = self._console.status(what)
            self._spinner.start()
        self._spinner.update(what)

    def clear(self) -> None:
        """Takes the line away."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
