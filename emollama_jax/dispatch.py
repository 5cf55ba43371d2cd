"""From the words of a command line to one verb, and from what it raises to what the user reads.

Words that make no sense are refused in one line before anything heavy is imported: status 2. So are
errors of the disk, which the user can mend. Anything else is a fault of ours: status 70, a short
traceback, and what a good report holds.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import inspect
import io
import os
import pathlib
import platform
import re
import shlex
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import tyro

from emollama_jax.disk import FULL, causes, free, is_full
from emollama_jax.errors import UserError, did_you_mean
from emollama_jax.redact import redact

Verb = Callable[..., None]
Verbs = Mapping[str, Verb]

USAGE, FAULT, INTERRUPTED, PIPE = 2, 70, 130, 141  # exit statuses; 70 is sysexits' EX_SOFTWARE
LONG = 80  # characters of a sentence in the list of verbs
FRAMES = 4  # of a short traceback
# Errors of the operating system that a user can mend.
MENDABLE = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: found a file, wanted a folder",
    errno.EISDIR: "check the path: found a folder, wanted a file",
    errno.EEXIST: "check the path: found a file, wanted a folder",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
}
PACKAGE = str(pathlib.Path(__file__).parent)


def main(
    verbs: Verbs,
    nested: Mapping[str, Verbs],
    args: Sequence[str],
    about: str,
    after_help: Mapping[Verb, Callable[[], str]] | None = None,
) -> None:
    """Runs one verb.

    Args:
        verbs: by name.
        nested: verbs of a verb, by its name.
        args: words behind `emollama`.
        about: text about the program, for its help.
        after_help: text to append to a verb's help.
    """
    with boundary(args):
        if not args or args[0] in ("-h", "--help"):
            print(_overview("emollama", verbs, about))
            sys.exit(0 if args else USAGE)
        if args[0] in ("--version", "-V"):
            print(version())
            return
        name, *rest = args
        verb, prog = _choose(verbs, name, "emollama"), f"emollama {name}"
        if name in nested:
            if not rest or rest[0] in ("-h", "--help"):
                print(_overview(prog, nested[name], inspect.getdoc(verb) or ""))
                sys.exit(0 if rest else USAGE)
            verb = _choose(nested[name], rest[0], prog)
            prog, rest = f"{prog} {rest[0]}", rest[1:]
        call = parse(verb, prog, rest, (after_help or {}).get(verb))
        with _full_disk(call):
            call()


def version() -> str:
    """Versions that a report should name."""
    found = [f"emollama {importlib.metadata.version('emollama-jax')}"]
    found += [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def parse(
    verb: Verb, prog: str, args: Sequence[str], after_help: Callable[[], str] | None = None
) -> functools.partial:
    """The call that the words ask for; the verb's help ends the program.

    Raises:
        UserError: an option that the verb does not have, a missing or unfitting value.
    """
    known = options(verb)
    for word in args:
        option = word.partition("=")[0].replace("_", "-")
        if re.match(r"--[a-z]", word) and option not in known and option != "--help":
            near = did_you_mean(option, known)
            raise UserError(f"{word}: no such option{near}: see {prog} --help")

    # Tyro calls what it parses for. It gets a stand-in of the same signature, so that what it
    # says of the words can be told from what the verb says.
    @functools.wraps(verb)
    def stand_in(*args: Any, **kwargs: Any) -> functools.partial:
        return functools.partial(verb, *args, **kwargs)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(stand_in, prog=prog, args=list(args))
    except SystemExit as stop:
        if stop.code in (0, None):
            if after_help is not None:
                print(after_help())
            raise
        raise UserError(f"{_one_line(said.getvalue())}: see {prog} --help") from None


def options(verb: Verb) -> list[str]:
    """The options of a verb, as they are written."""
    hints = get_type_hints(verb, include_extras=True)
    found: list[str] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        found += _options(name, hints[name], parameter.default)
    return found


def _options(name: str, hint: Any, default: Any) -> list[str]:
    inner = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    marks = getattr(hint, "__metadata__", ())
    if dataclasses.is_dataclass(inner):
        hints = get_type_hints(inner, include_extras=True)
        return [
            option
            for field in dataclasses.fields(inner)
            for option in _options(field.name, hints[field.name], field.default)
        ]
    unnamed = (tyro.conf.Positional[int], tyro.conf.Suppress[int])
    if any(mark in marks for kind in unnamed for mark in kind.__metadata__):
        return []
    option = name.replace("_", "-")
    aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
    flags = [f"--{option}", *aliases]
    return [*flags, f"--no-{option}"] if inner is bool and isinstance(default, bool) else flags


def _choose(verbs: Verbs, name: str, prog: str) -> Verb:
    if name not in verbs:
        what, known = "command", list(verbs)
        if name.startswith("-"):
            what, known = "option", ["--help", *(["--version"] if prog == "emollama" else [])]
        near = did_you_mean(name, known) or f"; known: {', '.join(known)}"
        raise UserError(f"{name}: no such {what}{near}: see {prog} --help")
    return verbs[name]


def _overview(prog: str, verbs: Verbs, about: str) -> str:
    """The verbs, each with the first sentence of its help."""
    wide = max(map(len, verbs)) + 4
    lines = [f"usage: {prog} COMMAND …", "", about.strip().splitlines()[0], ""]
    for name, verb in verbs.items():
        text = " ".join((inspect.getdoc(verb) or "").split()).partition(". ")[0].rstrip(".")
        if len(text) > LONG:  # the part before the colon says enough
            text = text.partition(":")[0]
        lines += textwrap.wrap(
            f"  {name:<{wide - 2}}{text}", 90, subsequent_indent=" " * wide, break_on_hyphens=False
        )
    return "\n".join([*lines, "", f"{prog} COMMAND --help lists what a command takes."])


def _one_line(text: str) -> str:
    """What stands in the box that Tyro draws."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    # Lines of the box are ASCII where the terminal is.
    lines = [re.sub(r"^[│|╭╰+]|[│|╮╯+]$", "", line.strip()).strip() for line in text.splitlines()]
    lines = [re.sub(r"^[─-] (.*?) [─-]+$", r"\1", line) for line in lines]
    said = " ".join(line for line in lines if line.strip("─-"))
    said = re.split(r" (?:For full helptext|Got errors:|Argument helptext:)", said)[0]
    if missing := re.match(r"Required options Missing from .*?: (.*)", said):
        found = missing[1].replace(" (required)", "").rstrip(".")
        return "missing " + re.sub(r"^(--\S+ \S+|\S+) (.*)$", r"\1 (\2)", found)
    if unfit := re.search(
        r"Error parsing (\S+): no type matching (.*?) could be instantiated from \[(.*)\]", said
    ):
        wanted = unfit[2].removeprefix("{None}|")
        return f"{unfit[1]} is {unfit[3].strip(chr(39))}, wanted {wanted}"
    if unknown := re.match(r"Unrecognized options Unrecognized options: (.*)", said):
        late = [word for word in unknown[1].split() if "=" in word]
        why = "overrides go before options" if late else "one argument too many"
        return f"{unknown[1]}: {why}"
    return re.sub(r"^[A-Z][a-z]+ \w+ ", "", said).rstrip(".")


# ---- what is raised


@contextlib.contextmanager
def boundary(args: Sequence[str], *, program: str = "emollama") -> Iterator[None]:
    """Turns what is raised into a message and an exit status.

    Args:
        args: words of the command, for a report.
        program: name of the command, for messages.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what is no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    beside: list[str] = []  # what other threads raised; most of it comes back to this one
    hook, threading.excepthook = threading.excepthook, lambda held: beside.append(_thread(held))
    try:
        yield
        print(*beside, sep="\n", end="", file=sys.stderr)
    except UserError as error:
        _say(program, str(error))
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left: `emollama … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        sys.exit(PIPE)
    except Exception as error:
        line = disk_error(error)
        if line is not None:
            _say(program, line)
            sys.exit(USAGE)
        print(_report(error, [program, *args], beside), file=sys.stderr)
        sys.exit(FAULT)
    finally:
        threading.excepthook = hook


def disk_error(error: BaseException, out: object = None) -> str | None:
    """One line about an error of the operating system or of memory; None if no user can fix it.

    Args:
        error: the libraries below wrap it now and then: those that it came from are asked too.
        out: folder that the command writes, for an error that names no file.
    """
    if isinstance(error, MemoryError):
        return "not enough memory: close other programs, or choose smaller batches or media"
    if is_full(error):
        files = [getattr(cause, "filename", None) for cause in causes(error)]
        place = next((os.fsdecode(file) for file in (*files, out) if file), None)
        numbers = [getattr(cause, "errno", None) for cause in causes(error)]
        what = os.strerror(next((n for n in numbers if n in FULL), errno.ENOSPC))
        where = "" if place is None else f"{place}: "
        left = "" if place is None or "://" in place else f" ({free(place):,} bytes are free)"
        return f"{where}{what}: free some space{left}, then re-run the command to resume"
    for cause in causes(error):
        number, file = getattr(cause, "errno", None), getattr(cause, "filename", None)
        ours = file is None or os.fsdecode(file).startswith(PACKAGE)
        if isinstance(cause, OSError) and number in MENDABLE and not ours:
            return f"{os.fsdecode(file)}: {os.strerror(number)}: {MENDABLE[number]}"
    return None


@contextlib.contextmanager
def _full_disk(call: functools.partial) -> Iterator[None]:
    """A disk that is full names no file: the folder that the command writes is named."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        given = [call.keywords, *(vars(x) for x in call.keywords.values() if _is_options(x))]
        out = next((x[name] for name in ("out", "dir") for x in given if x.get(name)), None)
        line = disk_error(error, out)
        if line is None:
            raise
        raise UserError(line) from error


def _is_options(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _thread(held: threading.ExceptHookArgs) -> str:
    """What Python would print of an exception in a thread."""
    lines = traceback.format_exception(held.exc_type, held.exc_value, held.exc_traceback)
    name = held.thread.name if held.thread else "?"
    return f"Exception in thread {name}:\n{''.join(lines)}"


def _say(program: str, line: str) -> None:
    """Prints a message; what would move a terminal's cursor, of a file's name, is spelled out."""
    line = redact(line)
    line = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda sign: repr(sign[0])[1:-1], line)
    print(f"{program}: {line}", file=sys.stderr)


def _report(error: Exception, words: Sequence[str], beside: Sequence[str]) -> str:
    """A short traceback, and what to do with the whole of it."""
    whole = "\n".join(["".join(traceback.format_exception(error)), *beside])
    frames = traceback.extract_tb(error.__traceback__)
    own = [x for x in frames if x.filename.startswith(PACKAGE) and x.filename != __file__]
    shown = [frame for frame in own[-FRAMES:] if frame is not frames[-1]] + [frames[-1]]
    lines = [line.rstrip("\n") for line in traceback.format_list(shown)]
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    command, program = shlex.join(words), words[0]
    text = redact(f"{whole}\n{command}\n{version()}, {platform.platform()}\n")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="emollama-", suffix=".txt", delete=False
        ) as file:
            file.write(text)
        saved = f"the full traceback is in {file.name}"
    except OSError:
        saved = f"the full traceback:\n{whole}"
    said = "\n".join(
        [
            *lines,
            f"{program}: {what[:500]}",
            f"{program} did not expect this: probably our bug. Please report it with these lines:",
            f"  command   {command}",
            f"  versions  {version()}, {platform.platform()}",
            f"  and attach the file: {saved}",
        ]
    )
    return redact(said)
