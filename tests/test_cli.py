"""The command line: bad input is one clear line and exit status 2; help teaches."""

import pytest

from emollama_jax import cli
from emollama_jax.data import inspect as data_inspect
from emollama_jax.data.builders import actionfaces


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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train", "nope"), "no such config"),
        (("train", "tiny", "train.lr=1"), "did you mean train.learning_rate"),
        (("train", "tiny", "train.steps=many"), "train.steps"),
        (("train", "tiny", "train.steps"), "key=value"),
        (("data", "prepare", "rafdb"), "no such data set"),
        (("data", "prepare", "actionfaces/films"), "films"),
        (("pretrain", "tiny", "--towers", "ear"), "ear"),
    ],
)
def test_bad_names_and_values(capsys, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *args)


def test_data_not_prepared(capsys, tmp_path):
    folder = f"data.dir={tmp_path / 'none'}"
    err = refused(capsys, "train", "tiny", folder, "--out", tmp_path / "run")
    assert "emollama data prepare" in err


def test_every_verb_has_help_for_each_field(capsys):
    nested = [f"{outer} {verb}" for outer, verbs in cli.NESTED.items() for verb in verbs]
    for verb in [*(verb for verb in cli.VERBS if verb not in cli.NESTED), *nested]:
        with pytest.raises(SystemExit) as stop:
            cli.main([*verb.split(), "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0
        for line in out.splitlines():
            assert "(required)" not in line or "  " in line
        assert "help" in out


def test_inspect_counts_and_draws(capsys, tmp_path):
    sizes = {"train": 3, "validation": 1, "test": 1}
    for config in ("images", "clips"):
        actionfaces.prepare(tmp_path, config_name=config, sizes=sizes, processes=1)
        sheet = tmp_path / f"{config}.png"
        name = f"actionfaces/{config}"
        cli.main(["data", "inspect", name, "--dir", str(tmp_path), "--sheet", str(sheet)])
        out = capsys.readouterr().out
        assert sheet.stat().st_size > 1000
        counts = [int(line.split()[1]) for line in out.splitlines()[:7]]
        assert sum(counts) == 3
    sheet = data_inspect.contact_sheet(tmp_path, "actionfaces/clips", "train")
    assert sheet.width == data_inspect.TILE * data_inspect.STRIP
