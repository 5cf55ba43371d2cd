"""What a command is busy with: one line for a short one, bars for what takes long."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status as Spinner

Advance = Callable[..., None]  # (done, total=None): how far it is


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Callable[..., Advance]]:
    """Yields `bar(what, total=None)`, which adds a bar and returns its `advance(done)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:

        def bar(what: str, total: int | None = None) -> Advance:
            task = bars.add_task(what, total=total)

            def advance(done: int, total: int | None = None) -> None:
                bars.update(task, completed=done, total=total)

            return advance

        yield bar


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
