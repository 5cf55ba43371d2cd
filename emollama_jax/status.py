"""Display of a command's activity: one line for a short one, progress bars for a long one."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status as Spinner


class Bars(Progress):
    """Progress bars: what is done, how much of it, the time that is left. A context manager."""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeRemainingColumn(), console=console)

    def bar(self, what: str, total: int | None = None) -> Callable[..., None]:
        """A new bar; gives the function that moves it, called with what is done, or (done, all)."""
        task = self.add_task(what, total=total)
        return lambda done, total=total: self.update(task, completed=done, total=total)


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
