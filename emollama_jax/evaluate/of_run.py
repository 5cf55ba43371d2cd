"""The `Result` of a trained run on one prepared split, or on every fold of a set."""

import contextlib
import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh
from rich.console import Console

from emollama_jax import config
from emollama_jax.checkpoint import load_for_inference, read_config
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.elements import Encoder
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.sets import SEGMENTS, parse, testing_of
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds, groups
from emollama_jax.evaluate.asked import Asked, map_classes, unanswerable
from emollama_jax.evaluate.copies import find_copies
from emollama_jax.evaluate.options import Asking, Tested
from emollama_jax.evaluate.protocol import Prediction, folds_of
from emollama_jax.evaluate.publish import publish, worst
from emollama_jax.evaluate.report import Exhibit, Table
from emollama_jax.evaluate.result import Answers, Result, Settings
from emollama_jax.evaluate.speaker import asked_in, predict
from emollama_jax.evaluate.trace import (
    config_text,
    data_hash,
    folder_hash,
    predictions_hash,
    priors_hash,
    versions,
)
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.runs import PACKAGE, find
from emollama_jax.sharding.distributed import hold_together, leads
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.status import Bars

TITLES = {"generate": "written answers", "score": "label scoring"}
VERBS = {"generate": "writing", "score": "scoring the label words"}
VERBS["both"] = " and by ".join(VERBS.values())
PACKAGES = ("emollama-jax", "jax", "flax")
STRIP = 8  # frames of a clip that a picture of a mistake shows


def evaluate_runs(
    what: Tested, how: Asking, out: str | None, console: Console
) -> tuple[Result, str]:
    """Evaluates a run, or one run for each fold, on a set, and publishes every result.

    On several hosts the first one writes.

    Args:
        what: run, changes of its config, set, split and fold.
        how: way of asking.
        out: folder of the results; None: RUN/eval, or runs/package/eval.
        console: terminal for progress.

    Returns:
        The result, or that of all folds, and its folder.

    Raises:
        UserError: no such fold, a run that saw what is tested, no or unfitting data.
    """
    names = folds.names(what.name, what.fold, without=how.without)
    which = "all" if len(names) > 1 else str(names[0][0])
    writable = f"runs/{PACKAGE}" if what.run == PACKAGE else what.run.rstrip("/")
    home = out or f"{writable.replace('{fold}', which)}/eval"
    paths = [what.run.replace("{fold}", str(number)) for number, _ in names]
    configs = [config.override(read_config(path), what.overrides) for path in paths]
    for cfg, (_, name) in zip(configs, names, strict=True):  # before any model is loaded
        check_unseen(cfg, name, what.split)
    console = console if leads() else Console(quiet=True)
    with contextlib.ExitStack() as stack:
        hold_together(home, stack, instead="choose another --out")
        return _evaluate_folds(what, how, paths, configs, home, console), home


def _evaluate_folds(
    what: Tested,
    how: Asking,
    paths: Sequence[str],
    configs: Sequence[Config],
    home: str,
    console: Console,
) -> Result:
    """Evaluates the run of each fold, and publishes every result."""
    names = folds.names(what.name, what.fold, without=how.without)
    results, loaded = [], ""
    for path, cfg, (number, name) in zip(paths, configs, names, strict=True):
        if path != loaded:
            changes = [change for change in what.overrides if change.startswith("model.")]
            _, model = load_for_inference(path, mesh=cfg.mesh, changes=changes)
            loaded = path
        if what.dir is not None:
            cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dir=what.dir))
        result = evaluate_run(
            cfg, model, name, what.split, how, console=console, mesh=make_mesh(cfg.mesh), run=path
        )
        if leads():
            publish(result, f"{home}/fold{number}" if len(names) > 1 else home)
        results.append(result)
    if len(results) == 1:
        return results[0]
    title = f"{folds.title_of(what.name)}, {what.split}"
    command = _command(what.name, what.split, how) + " --fold all"
    result = folds.join(results, what.name, what=title, command=command)
    if leads():
        publish(result, home)
    return result


def evaluate_run(
    cfg: Config,
    model: EmoLlama,
    name: str,
    split: str,
    how: Asking,
    *,
    console: Console,
    mesh: Mesh | None = None,
    run: str | None = None,
) -> Result:
    """The result of a model on a prepared split.

    Args:
        cfg: config of the model's run.
        model: trained.
        name: data set and builder config, e.g. "actionfaces/clips".
        split: split of it.
        how: way of asking.
        console: terminal for progress.
        mesh: mesh that the model is spread over; None for one device.
        run: origin of the model, for the trace; None: untraced.

    Returns:
        The result, whose headline are written answers, if there are any; hashes of what it was
        made of, and pictures, are there on the first host only.

    Raises:
        UserError: no or unfitting data; no split of the name that `how.without` gives.
    """
    copies = find_copies(cfg.data.dir, name, split, how.without)
    opened = Split(cfg.data.dir, name, split)
    data, space, asked = opened.examples, opened.space, asked_in(cfg, name, how)
    source = SourceConfig(name=name, split=split, kind=opened.kind, weight=1.0)
    with Bars(console) as bars:
        progress = bars.bar(f"{name}, {split}", len(data))
        found = predict(cfg, model, source, how, progress=progress, mesh=mesh)
    seen = groups.read_seen(cfg.data.dir, name, split, race_labels=cfg.model.face.race_labels)
    answers = [
        Answers.of(TITLES[way], items, space, seen=seen, copies=copies)
        for way, items in found.items()
    ]
    names = ("predictions.jsonl", *(f"predictions-{way}.jsonl" for way in how.ways[1:]))
    files = dict(zip(names, found.values(), strict=True))
    trace, mistakes = {file: predictions_hash(items) for file, items in files.items()}, []
    if leads():
        trace |= _origin(opened, run)
        trace["question"] = asked.question(data[0]["id"], source.kind)
        mistakes = _pictures(cfg, opened, how, answers[0].predictions)
    return Result(
        title=f"{name}, {split}",
        lede=f"{len(data):,} examples; the model answers by {VERBS[how.answering]}.",
        source=name,
        answers=answers,
        predictions=files,
        settings=Settings(_command(name, split, how), config_text(cfg), versions(*PACKAGES)),
        trace=trace,
        notes=[_protocol(cfg, source), *_mapping(asked, space, answers[0])],
        mistakes=mistakes,
    )


def _origin(split: Split, run: str | None) -> dict[str, str]:
    """Hashes of the checkpoint, the data and the face priors."""
    trace = {}
    about, priors = f"{split.name}, {split.split}", split.priors
    if run is not None:
        found = find(run)
        trace[f"checkpoint {PACKAGE if run == PACKAGE else found}"] = folder_hash(found)
    trace[f"data, {about}"] = data_hash(split.examples, split.space)
    trace[f"face priors, {about}"] = priors_hash(priors[i] for i in range(len(priors)))
    return trace


def check_unseen(cfg: Config, name: str, split: str) -> None:
    """Refuses a number about examples that the run was trained on.

    Raises:
        UserError: the run's sources hold the tested split, or another fold of the set, whose
            training list holds most of this fold's test items.
    """
    builder, view = parse(name)
    for source in cfg.data.sources:
        other, trained = parse(source.name)
        if source.name == name and source.split == split:
            raise UserError(f"{name}: the run was trained on its split {split!r}; test another")
        if folds_of(name) > 1 and other == builder and trained != view:
            raise UserError(
                f"{name}: the run was trained on {source.name}, whose training list holds test "
                f"items of {view}: test it on {source.name}, or give one run per fold, RUN{{fold}}"
            )


def _command(name: str, split: str, how: Asking) -> str:
    words = f"emollama eval RUN --source {name} --split {split} --answering {how.answering}"
    if how.asked is not None:
        words += f" --asked {how.asked}"
    if how.without is not None:
        words += f" --without {how.without}"
    return words + (f" --order shuffled --seed {how.seed}" if how.order == "shuffled" else "")


def _protocol(cfg: Config, source: SourceConfig) -> Table:
    """The set's protocol beside what this run did."""
    testing = testing_of(source.name)
    rows = []
    if testing is not None:
        rows = [("frames", testing.frames), ("face", testing.crop)]
    if source.kind == "clip":
        data = cfg.data
        done = f"{data.clip_frames} frames, sampling={data.sampling}"
        usual = data.sampling == "segments" and data.clip_frames == SEGMENTS
        rows.append(("this run", done + ("" if usual else ": differs from the protocol")))
    margin = f"the box and {cfg.data.face_margin:g} of its side"
    rows.append(("face crop of this run", margin))
    return Table(title="Protocol", note="", head=("", ""), rows=rows)


def _mapping(asked: Asked, space: LabelSpace, tested: Answers) -> list[Table]:
    """What the question's words mean in the tested set, and what does not map."""
    if asked.space.classes == space.classes:
        return []
    support = dict(zip(space.classes, tested.evaluation.per_class.support.tolist(), strict=True))
    means = map_classes(asked.space, space)
    foreign = "– (an answer of this kind counts as wrong)"
    rows = [(word, name or foreign) for word, name in means.items()]
    rows += [
        (f"– (cannot be answered: {support[name]:,} items count as wrong)", name)
        for name in unanswerable(asked.space, space)
    ]
    note = f"The question lists the words of {asked.space.title}; they are mapped by meaning."
    head = (f"asked, {asked.space.title}", f"tested, {space.title}")
    return [Table(title="Labels across sets", note=note, head=head, rows=rows)]


def _pictures(
    cfg: Config, split: Split, how: Asking, predictions: Sequence[Prediction]
) -> list[Exhibit]:
    """The worst mistakes as the model saw them; none of a licensed set, unless asked for."""
    testing = testing_of(split.name)
    if not (how.pictures or (testing is not None and testing.open)):
        return []
    encoder, data, priors = Encoder(cfg), split.examples, split.priors
    found = []
    for number in worst(predictions):
        item = predictions[number]
        try:
            look = encoder.look(data[number]["media"], kind=split.kind, prior=priors[number])
        except UserError:
            continue  # unreadable media were answered blind; there is nothing to show
        frames = list(look.frames[:: max(1, -(-len(look.frames) // STRIP))])
        found.append(
            Exhibit(
                id=item.id,
                frames=frames,
                landmarks=[None] * len(frames),
                label=item.label,
                predicted=item.predicted,
                text=item.text or "",
            )
        )
    return found
