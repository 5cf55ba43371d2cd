"""The six sets from their official layouts to a number: prepare, faces, instruct, train, evaluate.

One run trains on images of three sets and clips of three. What it learns in a few steps is nothing;
what is tested is that every set goes the whole way, and that a wrong number is refused.
"""

import json
import shutil

import pytest
from rich.console import Console

from emollama_jax import cli, config
from emollama_jax.base import load_face
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.data.items import category_question
from emollama_jax.data.sets import Preparation, label_space
from emollama_jax.evaluate.of_run import evaluate_run
from emollama_jax.evaluate.options import Asking
from emollama_jax.evaluate.protocol import evaluate, read_predictions
from emollama_jax.evaluate.publish import publish
from emollama_jax.evaluate.trace import file_hash, folder_hash
from emollama_jax.instruct.command import instruct
from emollama_jax.instruct.options import InstructOptions
from emollama_jax.prepare import prepare_source
from emollama_jax.train.loop import fit
from tests.helpers import official_trees

SETS = {
    "raf_db": official_trees.raf_db,
    "ferplus": official_trees.ferplus,
    "affectnet8": official_trees.affectnet_lists,
    "dfew/fold1": official_trees.dfew,
    "ferv39k": official_trees.ferv39k,
    "mafw/fold1": official_trees.mafw,
}
IMAGES = ("raf_db", "ferplus", "affectnet8")
QUIET = Console(quiet=True)


def source(name: str) -> str:
    kind = "image" if name in IMAGES else "clip"
    items = "category" if name == "ferplus" else "both"
    return f"{{name: {name}, split: train, kind: {kind}, weight: 1.0, items: {items}}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps on all six sets, in a folder beside their prepared data."""
    folder = tmp_path_factory.mktemp("six")
    cfg = config.load(
        "tiny",
        [
            f"data.dir={folder / 'data'}",
            f"data.sources=[{', '.join(map(source, SETS))}]",
            "data.clip_frames=4",
            "train.steps=4",
            "data.packed=null",
            "train.image_batch=4",
            "train.clip_batch=2",
            "train.accumulation=1",
            "train.save_every=4",
        ],
    )
    face = load_face(cfg)
    for name, make in SETS.items():
        tree = make(folder / name.replace("/", "-"))
        prepare_source(
            cfg,
            face,
            name,
            Preparation(source=tree),
            splits=("train", "test"),
            console=QUIET,
        )
        if name != "ferplus":
            options = InstructOptions(name=name, dir=cfg.data.dir, by="template")
            assert instruct(options, QUIET)[1].stopped == ""
    result = fit(cfg, folder / "run", console=QUIET)
    assert (result.step, result.exit_status) == (4, 0)
    return folder / "run"


def command(*args) -> None:
    cli.main(["eval", *map(str, args)])


@pytest.fixture(scope="module")
def assess(run):
    """Evaluates the run's model, loaded once."""
    cfg, model = load_for_inference(run)

    def evaluate_one(name, out, **how):
        asking = Asking(batch=8, **how)
        result = evaluate_run(cfg, model, name, "test", asking, console=QUIET, run=str(run))
        publish(result, out)

    return evaluate_one


@pytest.fixture(scope="module")
def evaluated(assess, tmp_path_factory):
    """Set → the folder of its evaluation."""
    out = tmp_path_factory.mktemp("evaluated")
    for name in SETS:
        assess(name, out / name)
    return out


def test_images_and_clips_were_in_one_run(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["frames"] for row in rows} == {4, 2 * 4}


@pytest.mark.parametrize("name", SETS)
def test_every_set_goes_the_whole_way(evaluated, name):
    tree = json.loads((evaluated / name / "evaluation.json").read_text())
    space = label_space(name)
    assert tree["classes"] == list(space.classes)
    assert tree["n"] == len(read_predictions(evaluated / name / "predictions.jsonl")) >= 3
    assert list(tree["ways"]) == ["written answers", "label scoring"]
    assert tree["ways"]["label scoring"]["unparsed"] == 0
    kind = "image" if name in IMAGES else "clip"
    assert tree["trace"]["question"] == category_question(space.classes, kind)
    page = (evaluated / name / "report.html").read_text(encoding="utf-8")
    assert "<image" not in page  # research licence: no pictures unless asked for
    assert "GPT-4V" in page or "GPT-4o" in page  # the field's numbers stand beside
    assert (evaluated / name / "table.tex").exists()


@pytest.mark.parametrize("name", ["raf_db", "mafw/fold1"])
def test_every_number_can_be_traced(run, evaluated, name):
    folder = evaluated / name
    tree = json.loads((folder / "evaluation.json").read_text())
    file = folder / "predictions.jsonl"
    again = evaluate(read_predictions(file), label_space(name))
    assert (again.war, again.uar) == (tree["war"], tree["uar"])
    assert again.summary()["n"] == tree["n"]
    assert tree["trace"]["predictions.jsonl"] == file_hash(file)
    (checkpoint,) = (run / "checkpoints").glob("[0-9]*")
    assert tree["trace"][f"checkpoint {checkpoint}"] == folder_hash(checkpoint)
    assert len(tree["trace"][f"data, {name}, test"]) == 64
    assert len(tree["trace"][f"face priors, {name}, test"]) == 64


def test_other_words_and_other_orders(assess, tmp_path):
    """Images' words asked about clips; MAFW has classes that they cannot name."""
    assess("mafw/fold1", tmp_path, answering="score", asked="raf_db", order="shuffled")
    found = read_predictions(tmp_path / "predictions.jsonl")
    assert {frozenset(item.options) for item in found} == {frozenset(label_space("raf_db").classes)}
    assert len({item.options for item in found}) > 1
    assert {item.predicted for item in found} <= set(label_space("raf_db").classes)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Position bias" in page
    assert "cannot be answered" in page and "helplessness" in page


def test_the_command_shows_pictures_where_they_are_asked_for(run, capsys, tmp_path):
    args = ["--answering", "score", "--batch", 8, "--pictures", "--out", tmp_path]
    command(run, "--source", "dfew", "--fold", 1, *args)
    assert f"{tmp_path}/report.html" in capsys.readouterr().out
    assert "<image" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_fold_with_the_run_that_did_not_see_it(run, capsys, tmp_path):
    """The same weights five times, each as a run that was trained on its own fold's list."""
    cfg = config.load("tiny", [f"data.dir={run.parent / 'data'}"])
    tree = run.parent / "dfew-fold1"
    how = Preparation(source=tree)
    prepare_source(cfg, load_face(cfg), "dfew", how, splits=("test",), console=QUIET)
    for fold in range(1, 6):
        copy = tmp_path / f"run{fold}"
        shutil.copytree(run, copy)
        given = [f for f in copy.rglob("*") if f.is_file() and b"dfew/fold1" in f.read_bytes()]
        assert given  # the config that a checkpoint keeps
        for file in given:
            saved = file.read_bytes()
            file.write_bytes(saved.replace(b"dfew/fold1", f"dfew/fold{fold}".encode()))
    args = ["--source", "dfew", "--fold", "all", "--answering", "score", "--batch", 8]
    command(f"{tmp_path}/run{{fold}}", *args, "--out", tmp_path / "out")
    assert "5 folds:" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    each = [
        json.loads((tmp_path / "out" / f"fold{fold}" / "evaluation.json").read_text())
        for fold in range(1, 6)
    ]
    assert told["wars"] == [one["war"] for one in each]
    assert told["war"] == pytest.approx(sum(told["wars"]) / 5)
    assert sum(one["n"] for one in each) == 15
    assert "--fold all" in told["command"] and len(told["trace"]) == 5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--source", "dfew"), "dfew has 5 folds: name one with --fold 1, or --fold all"),
        (("--source", "dfew", "--fold", "all"), "trained on dfew/fold1, whose training list"),
        (("--source", "dfew", "--fold", "6"), "has the folds 1 … 5"),
        (("--source", "raf_db", "--fold", "1"), "raf_db has no folds"),
        (("--source", "raf_db", "--split", "train"), "was trained on its split 'train'"),
    ],
)
def test_wrong_numbers_are_refused(run, capsys, tmp_path, args, said):
    with pytest.raises(SystemExit) as stop:
        command(run, *args, "--out", tmp_path / "none")
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in err.splitlines()[-1]
    assert not (tmp_path / "none" / "evaluation.json").exists()
