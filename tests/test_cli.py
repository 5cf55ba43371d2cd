"""The command line: bad input is one clear line and exit status 2; help teaches."""

import ast
import errno
import importlib.metadata
import io
import logging
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import threading

import jax
import pytest

import emollama_jax
from emollama_jax import base, cli, config, dispatch
from emollama_jax.cli_words import LogLines, new_console, remove_handlers
from emollama_jax.data import inspect, sets
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.locks import hold
from emollama_jax.tiny import builder
from tools import command

HERE = pathlib.Path(emollama_jax.__file__).parent


def run(capsys, *args):
    """Exit status and what went to stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return stop.value.code, capsys.readouterr().err


def refused(capsys, *args):
    status, err = run(capsys, *args)
    assert status == 2
    assert err.count("\n") == 1, err
    return err


def test_missing_media(capsys, tmp_path):
    assert "none.jpg" in refused(capsys, "ask", tmp_path / "none.jpg", "who?")


def test_text_file_named_jpg(capsys, tmp_path):
    (tmp_path / "letter.jpg").write_text("dear friend, " * 9)
    assert "letter.jpg: neither a picture nor a video" in refused(
        capsys, "ask", tmp_path / "letter.jpg", "who?"
    )


def test_no_run(capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "grey.png")
    err = refused(capsys, "ask", tmp_path / "grey.png", "who?", "--run", tmp_path / "run")
    assert "no such folder" in err


BAD = [
    (("trian",), "trian: no such command (did you mean train?)"),
    (("data", "prepar"), "prepar: no such command (did you mean prepare?)"),
    (("bench", "tarin"), "did you mean train?"),
    (("--verison",), "did you mean --version?"),
    (("train",), "missing CONFIG (a name in configs/"),
    (("plan", "tiny"), "missing --topology STR"),
    (("train", "tiny", "--outt", "x"), "--outt: no such option (did you mean --out?)"),
    (("demo", "--quik"), "did you mean --quick?"),
    (("plan", "tiny", "--topolgy=v5e:2x4"), "did you mean --topology?"),
    (("zero-shot", "--modle", "hf:x"), "did you mean --model?"),
    (("train", "tiny", "a=1", "--out", "x", "b=2"), "b=2: overrides go before options"),
    (("data", "prepare", "raf_db", "--fold", "x"), "--fold is x, wanted INT"),
    (("eval", "x", "--answering", "gues"), "invalid choice 'gues'"),
    (("train", "nope"), "no such config"),
    (("plan", "nope", "--topology", "v5e:2x4"), "no such config"),
    (("bench", "data", "--config", "nope"), "no such config"),
    (("pretrain", "nope"), "no such config"),
    (("train", "tiny", "train.lr=1"), "did you mean train.learning_rate"),
    (("train", "tiny", "train.steps=many"), "train.steps"),
    (("train", "tiny", "train.steps"), "key=value"),
    (("train", "tiny", "--data", "mafw"), "mafw has folds: name one, e.g. mafw/fold1"),
    (("train", "tiny"), "data: actionfaces/images is not prepared; run `emollama data prepare"),
    (("data", "prepare", "rafdb"), "no such data set (did you mean raf_db?)"),
    (("data", "prepare", "RAF-DB"), "did you mean raf_db?"),
    (("data", "prepare", "affectnet"), "did you mean affectnet"),
    (("data", "prepare", "actionfaces/films"), "films"),
    (("data", "prepare", "actionfaces/image"), "did you mean images?"),
    (("data", "prepare", "raf_db"), "give its location: --source DIR"),
    (("data", "prepare", "actionfaces/clips", "--source", "."), "is drawn, not read"),
    (("data", "prepare", "raf_db", "--source", "none"), "--source none: no such file or folder"),
    (("data", "prepare", "dfew", "--source", ".", "--fold", "6"), "has the folds 1 … 5"),
    (("data", "prepare", "raf_db", "--source", ".", "--fold", "1"), "raf_db has no folds"),
    (("data", "prepare", "actionfaces/images", "--processes", "0"), "--processes is 0"),
    (("data", "prepare", "actionfaces/images", "--dir", "gs:/b/d"), "a slash is missing"),
    (("data", "inspect", "dfwe"), "did you mean dfew?"),
    (("data", "inspect", "mafw", "--fold", "9"), "mafw/fold9: no such data set"),
    (("data", "inspect", "own/mine"), "own/mine is not prepared; run `emollama data prepare own/"),
    (("data", "instruct", "raf_db"), "raf_db is not prepared"),
    (("eval",), "name a run"),
    (("eval", "none"), "none: no such folder"),
    (("eval", "none", "--source", "ferv39"), "did you mean ferv39k?"),
    (("eval", "none", "--batch", "0"), "--batch is 0, wanted at least 1"),
    (("zero-shot", "--model", "gpt", "--data", "raf_db"), "wanted one of hf:PATH"),
    (("zero-shot", "--model", "hf:x", "--data", "fer_plus"), "did you mean ferplus?"),
    (("plan", "tiny", "--topology", "v5e:9"), "unknown 'v5e:9'"),
    (("plan", "tiny", "--topology", "v5e:2x4", "--batch", "0"), "--batch is 0"),
    (("bench", "data", "--clips", "0"), "--clips is 0"),
    (("bench", "train", "--steps", "-1"), "--steps is -1"),
    (("pretrain", "tiny", "--towers", "ear"), "ear"),
    (("pretrain", "tiny", "--clips", "-1"), "--clips is -1"),
]


@pytest.mark.parametrize(("args", "said"), BAD)
def test_bad_names_and_values(capsys, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_bad_words_are_refused_in_a_second_and_without_jax(tmp_path):
    """All of them in one interpreter, which must not have imported JAX at its end."""
    code = f"""
import sys, time
from emollama_jax import cli
slow = []
for args in {[args for args, _ in BAD]!r}:
    start = time.process_time()
    try:
        cli.main(list(args))
    except SystemExit as stop:
        assert stop.code == 2, (args, stop.code)
    if time.process_time() - start > 1:
        slow.append(args)
heavy = {{"jax", "jaxlib", "transformers", "torch", "matplotlib", "orbax"}} & set(sys.modules)
print(slow, sorted(heavy))
"""
    here = pathlib.Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(here)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[] []\n", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "args",
    [
        ("demo", "--out"),
        ("train", "tiny", "--out"),
        ("pretrain", "tiny", "--out"),
        ("eval", "run", "--out"),
        ("eval", "--predictions", "p.csv", "--out"),
        ("zero-shot", "--model", "hf:x", "--data", "raf_db", "--out"),
        ("data", "prepare", "actionfaces/images", "--dir"),
        ("data", "prepare", "actionfaces/images", "--out"),
    ],
)
@pytest.mark.parametrize("out", ["file", "file/below", "none/deep", "link"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    capsys, tmp_path, monkeypatch, args, out
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    if out == "none/deep":  # tests may run as root, for whom every folder can be written

        def read_only(path, *_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

        monkeypatch.setattr(pathlib.Path, "mkdir", read_only)
    err = refused(capsys, *args, out)
    why = "Read-only file system" if out == "none/deep" else "is not a folder"
    assert f"{args[-1].replace('--out', '')}" in err and f" {out}: " in err and why in err
    assert (tmp_path / "file").read_text() == "" and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("sheet", "said"),
    [
        ("none/x.png", "no folder none"),
        ("x.txt", "wanted a name that ends in"),
        ("d.png", "is a f"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_refused(capsys, tmp_path, monkeypatch, sheet, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.png").mkdir()
    assert said in refused(capsys, "data", "inspect", "actionfaces/images", "--sheet", sheet)


def failing(monkeypatch, error):
    """`emollama bench train` raises an error."""

    def run(steps: int = 1, out: str = "runs/here") -> None:
        """Runs."""
        raise error

    monkeypatch.setitem(cli.VERBS, "train", run)


def wrapped(error):
    outer = ValueError("handler failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "runs/here: No space left on device: "),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "runs/here: Disk quota exceeded: "),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device: "),
        (wrapped(OSError(errno.ENOSPC, "full")), "runs/here: No space left on device: free"),
        (ValueError("RESOURCE_EXHAUSTED: x: No space left on device [28]"), "runs/here: No space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied: ch"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "/x: Is a directory: check the"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"), "/x/y: Not a directory: "),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "lost"),
            "lost: No such file or directory",
        ),
    ],
)
def test_errors_of_the_disk_are_one_line(capsys, monkeypatch, error, said):
    failing(monkeypatch, error)
    assert f"emollama: {said}" in refused(capsys, "train")


@pytest.mark.parametrize(
    "error", [KeyError("lost"), OSError("no number"), ValueError("two\nlines"), RuntimeError()]
)
def test_a_fault_of_ours_asks_for_a_report(capsys, monkeypatch, tmp_path, error):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failing(monkeypatch, error)
    status, err = run(capsys, "train", "--steps", "7")
    assert status == 70
    assert "probably our bug" in err and "emollama train --steps 7" in err
    assert f"jax {jax.__version__}" in err and "in run\n" in err
    (saved,) = tmp_path.glob("emollama-*.txt")
    assert str(saved) in err and "Traceback" in saved.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\x1b[2Jb\rc", r"a\x1b[2Jb\rc"),  # a name that would clear the screen
        ("x" * 10_000 + ": rename it", "x … x"),
        ("café \ud800", r"café \ud800"),
    ],
)
def test_messages_hold_what_a_terminal_can_bear(capfd, monkeypatch, text, said):
    failing(monkeypatch, UserError(text))
    err = refused(capfd, "train")
    assert said in err and len(err) < 4200


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    failing(monkeypatch, MemoryError())
    assert "not enough memory: close other programs" in refused(capsys, "train")


def test_tools_end_as_the_program_does(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def ends(error):
        def work():
            raise error

        with pytest.raises(SystemExit) as stop:
            command.run("package_run", work, ["RUN"])
        return stop.value.code, capsys.readouterr().err

    assert ends(UserError("RUN: no such folder")) == (2, "package_run: RUN: no such folder\n")
    assert ends(KeyboardInterrupt()) == (130, "")
    status, err = ends(PermissionError(errno.EACCES, "denied", "/x"))
    assert status == 2 and err.startswith("package_run: /x: Permission denied")
    status, err = ends(KeyError("lost"))
    assert status == 70 and "  command   package_run RUN\n" in err
    assert len(list(tmp_path.glob("emollama-*.txt"))) == 1


def test_an_exception_of_a_thread_goes_into_the_report(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def work() -> None:
        """Works."""
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        raise KeyError("main")

    monkeypatch.setitem(cli.VERBS, "train", work)
    _, err = run(capsys, "train")
    assert "ZeroDivisionError" not in err
    (saved,) = tmp_path.glob("emollama-*.txt")
    assert "ZeroDivisionError" in saved.read_text()


def test_ctrl_c_and_a_reader_that_left(capsys, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert run(capsys, "train") == (130, "")
    failing(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert run(capsys, "train") == (141, "")


def test_version(capsys):
    cli.main(["--version"])
    out = capsys.readouterr().out
    versions = [importlib.metadata.version(name) for name in ("emollama-jax", "jax", "flax")]
    assert all(version in out for version in (*versions, platform.python_version()))


def every_verb():
    for name, verb in cli.VERBS.items():
        if name not in cli.NESTED:
            yield (name,), verb
    for outer, inner in cli.NESTED.items():
        for name, verb in inner.items():
            yield (outer, name), verb


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("words", "verb"), list(every_verb()))
def test_help_names_every_option_and_every_argument(capsys, monkeypatch, words, verb):
    monkeypatch.setenv("COLUMNS", "200")
    out = help_of(capsys, *words)
    flags = re.findall(
        r"(?<![\w-])--[a-z][a-z-]*",
        "\n".join(re.findall(r"^[│| ] {1,2}(-.*?)(?:  | *│?$)", out, re.M)),
    )
    assert set(flags) - {"--help"} == set(dispatch.options(verb))
    positional = out.partition("positional arguments")[2].partition(" options ")[0]
    assert not re.search(r"^[│| ] {1,2}\[*(STR|PATH|INT)", positional, re.M), positional
    first = re.match(r"\s*(.*)", out.partition("\n")[2])[1]
    assert first.startswith(" ".join((verb.__doc__ or "").split())[:20])


def test_help_of_training_ends_with_the_settings_and_their_bounds(capsys):
    out = help_of(capsys, "train")
    assert out.rstrip().endswith(config.fields_help().rstrip())
    assert re.search(r"^train.steps  +int, 1 …", out, re.M)


def test_arguments_are_described_by_nouns():
    """`processes: number of worker processes`, not `processes: that read side by side`."""
    files = [*HERE.glob("cli*.py"), *HERE.glob("*/options.py")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    found = [
        re.match(r'\s+(?:\w+: |""")(of|that|whose|gets|who|which|where|in) ', x) for x in lines
    ]
    assert len(files) == 10
    assert [match.string for match in found if match] == []


def test_docstrings_describe_arguments_by_nouns():
    """The same for every function and class of the package and of `tools`."""
    found, seen = [], 0
    for file in [*HERE.rglob("*.py"), *(HERE.parent / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = (ast.get_docstring(node) or "") + "\n"
                for section in re.findall(r"^(?:Args|Attributes):\n((?: +.*\n)+)", text, re.M):
                    seen += 1
                    odd = re.findall(r"^ {4}\S[^:]*: (?:of|that|whose|gets|who) .*", section, re.M)
                    found += [f"{file.name}, {node.name}: {line.strip()}" for line in odd]
    assert seen > 250 and found == []


def test_to_resume_is_said_in_one_way():
    stale = re.compile(r"same command (again )?(goes|continues)|goes on[\".]|; the same command")
    said = {
        f"{file.name}: {line.strip()}"
        for file in [*HERE.rglob("*.py"), *HERE.parent.glob("*.md"), *HERE.parent.glob("docs/*.md")]
        if file.name != "CHANGELOG.md"
        for line in file.read_text().splitlines()
        if stale.search(line)
    }
    assert said == set()


def test_the_overview_is_short_and_lists_every_verb(capsys):
    for words, verbs in (
        ((), cli.VERBS),
        *(((outer,), inner) for outer, inner in cli.NESTED.items()),
    ):
        out = help_of(capsys, *words)
        assert [line for line in out.splitlines() if len(line) > 90] == []
        assert all(re.search(rf"^  {verb}  +\w", out, re.M) for verb in verbs)


def test_a_command_leaves_no_handler_behind(monkeypatch):
    before = logging.getLogger().handlers[:]
    monkeypatch.setitem(cli.VERBS, "demo", lambda: print(new_console()))
    cli.main(["demo"])
    assert logging.getLogger().handlers == before


def test_what_is_logged_appears_above_a_bar_and_once():
    from rich.progress import Progress

    console = new_console()
    console.file = io.StringIO()
    root = logging.getLogger()
    root.addHandler(logging.StreamHandler(console.file))  # as Orbax does by way of absl
    try:
        again = new_console()
        again.file = console.file
        with Progress(console=again):
            logging.getLogger("emollama_jax.x").warning("clip %s [is] broken\nwith details", "a")
            logging.getLogger("other").error("lost")
            logging.getLogger("asyncio").error("Task exception was never retrieved")
    finally:
        remove_handlers(LogLines)
    said = console.file.getvalue()
    assert "warning: clip a [is] broken\n" in said and "error: other: lost\n" in said
    assert said.count("broken") == 1 and "Task" not in said and "details" not in said


@pytest.mark.parametrize(
    ("name", "stored"),
    [("actionfaces/images", "actionfaces/images"), ("affectnet7", "affectnet"), ("own/a", "own/a")],
)
def test_a_set_is_prepared_by_one_process(capsys, tmp_path, monkeypatch, name, stored):
    monkeypatch.setattr(base, "load_face", lambda cfg: None)
    source = [] if sets.family_of(name).drawn else ["--source", tmp_path]
    with hold(tmp_path / "data" / stored, instead=""):
        err = refused(capsys, "data", "prepare", name, "--dir", tmp_path / "data", *source)
    assert f"{stored}: in use by process {os.getpid()} " in err
    assert err.endswith("wait for it to end, or choose another --dir\n")


def test_data_not_prepared(capsys, tmp_path):
    folder = f"data.dir={tmp_path / 'none'}"
    err = refused(capsys, "train", "tiny", folder, "--out", tmp_path / "run")
    assert "emollama data prepare" in err


def test_inspect_counts_and_draws(capsys, tmp_path):
    sizes = {"train": 3, "validation": 1, "test": 1}
    for kind in ("images", "clips"):
        builder.prepare(tmp_path, config_name=kind, sizes=sizes, processes=1)
        sheet = tmp_path / f"{kind}.png"
        name = f"actionfaces/{kind}"
        cli.main(["data", "inspect", name, "--dir", str(tmp_path), "--sheet", str(sheet)])
        out = capsys.readouterr().out
        assert sheet.stat().st_size > 1000
        counts = [int(line.split()[1]) for line in out.splitlines()[:7]]
        assert sum(counts) == 3
    sheet = inspect.contact_sheet(Split(tmp_path, "actionfaces/clips", "train"))
    assert sheet.width == inspect.TILE * inspect.STRIP
