"""`emollama eval`: predictions, numbers and a page for one split, or for every fold of a set."""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax import config
from emollama_jax.checkpoint import load_for_inference, read_config
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.elements import Encoder
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.sets import parse
from emollama_jax.data.split import Split, space_of
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds, groups, report
from emollama_jax.evaluate import without as leaving
from emollama_jax.evaluate.asked import Asked, Order, map_classes, unanswerable
from emollama_jax.evaluate.of_run import Answering, predict
from emollama_jax.evaluate.parse.unparsed import warning
from emollama_jax.evaluate.protocol import (
    SEGMENTS,
    Prediction,
    protocol_of,
    write_predictions,
)
from emollama_jax.evaluate.publish import Tested, make_tested, summarise, worst, write_results
from emollama_jax.evaluate.trace import data_hash, file_hash, folder_hash, priors_hash
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.paths import as_path
from emollama_jax.runs import PACKAGE, find
from emollama_jax.sharding.distributed import leads
from emollama_jax.sharding.mesh import make_mesh

TITLES = {"generate": "written answers", "score": "label scoring"}
STRIP = 8  # frames of a clip that a picture of a mistake shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a model is asked, and what is shown of it."""

    answering: Answering | Literal["both"] = "both"
    batch: int = 32
    asked: str | None = None  # the set whose label words the question lists; None: the tested one's
    order: Order = "native"
    seed: int = 0  # of shuffled options
    pictures: bool = False  # show pictures of a set under a research licence
    without: str | None = None  # a split: a second number leaves out what also stands in it

    @property
    def ways(self) -> tuple[Answering, ...]:
        """The headline first."""
        return ("generate", "score") if self.answering == "both" else (self.answering,)


def evaluate_source(
    run: str,
    overrides: Sequence[str],
    source: str,
    split: str,
    *,
    fold: str | None,
    folder: str | None,
    how: How,
    out: str | None,
    as_json: bool,
    console: Console,
) -> str:
    """Evaluates a run, or one run for each fold, on a set.

    Args:
        run: of `emollama train`, or `package`; "{fold}" in it stands for the fold's number.
        overrides: key=value of the sections that may change after training.
        source: the set, e.g. "raf_db", "dfew", "dfew/fold1".
        split: of it.
        fold: its number, or "all"; None: as `source` says.
        folder: of the data; None: the run's.
        how: to ask.
        out: gets the results; None: RUN/eval, or runs/package/eval.
        as_json: say it as JSON.
        console: where progress goes.

    Returns:
        What the command prints.

    Raises:
        UserError: no such fold, a run that saw what is tested, no or unfitting data.
    """
    names = folds.names(source, fold)
    which = "all" if len(names) > 1 else str(names[0][0])
    writable = f"runs/{PACKAGE}" if run == PACKAGE else run.rstrip("/")
    home = out or f"{writable.replace('{fold}', which)}/eval"
    if len(names) > 1 and how.without is not None:
        raise UserError(f"--without {how.without}: of one fold, not of all")
    paths = [run.replace("{fold}", str(number)) for number, _ in names]
    runs = [config.override(read_config(path), overrides) for path in paths]
    for cfg, (_, name) in zip(runs, names, strict=True):  # before any model is loaded
        check_unseen(cfg, name, split)
    tested, loaded = [], ""
    for path, cfg, (number, name) in zip(paths, runs, names, strict=True):
        if path != loaded:
            _, model = load_for_inference(path, mesh=cfg.mesh)
            loaded = path
        if folder is not None:
            cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dir=folder))
        tested.append(
            evaluate_run(
                cfg,
                model,
                name,
                split,
                answering=how.answering,
                batch=how.batch,
                out=f"{home}/fold{number}" if len(names) > 1 else home,
                console=console,
                mesh=make_mesh(cfg.mesh),
                how=how,
                checkpoint=path,
            )
        )
    if len(tested) == 1:
        (ways,) = tested
        told = warning([ways[0].evaluation])
        if as_json:
            if told and leads():
                print(told, file=sys.stderr)
            return _json({**summarise(ways[0]), **_ways(ways), "report": f"{home}/report.html"})
        e, second = ways[0].evaluation, ways[0].without
        line = f"WAR {e.war:.4f}  UAR {e.uar:.4f}  n {e.n}: {home}/report.html"
        return "\n".join(filter(None, [told, line, "" if second is None else leaving.line(second)]))
    found = {number: ways[0].evaluation for (number, _), ways in zip(names, tested, strict=True)}
    if leads():
        data_dir = folder or runs[0].data.dir
        race_labels = runs[0].model.face.race_labels
        folds.write_joined(
            home,
            found,
            source=source,
            split=split,
            seen=groups.joined(
                groups.read_seen(data_dir, name, split, race_labels=race_labels)
                for _, name in names
            ),
            command=_command(source, split, how) + " --fold all",
            versions=_versions(),
        )
    mean = folds.join(found, source)
    if as_json:
        told = folds.summary(list(found.values()), mean)
        return _json({**told, "report": f"{home}/report.html"})
    return folds.line(mean, home)


def evaluate_run(
    cfg: Config,
    model: EmoLlama,
    name: str,
    split: str,
    *,
    answering: Answering | Literal["both"],
    batch: int,
    out: epath.PathLike,
    console: Console,
    mesh: Mesh | None = None,
    how: How | None = None,
    checkpoint: str | None = None,
) -> list[Tested]:
    """Evaluates a model on a prepared split and writes down everything.

    On several hosts the first one writes.

    Args:
        cfg: of the model's run.
        model: trained.
        name: data set and builder config, e.g. "actionfaces/clips".
        split: of it.
        answering: how the model answers.
        batch: examples at a time.
        out: gets `predictions.jsonl` (label scoring beside writing: `predictions-score.jsonl`),
            `evaluation.json`, `table.tex` and `report.html`.
        console: where progress goes.
        mesh: that the model is spread over; None for one device.
        how: the rest of how to ask; None: natively.
        checkpoint: where the model came from, to be traced; None: untraced.

    Returns:
        The numbers of each way of answering; the headline, written answers if there are, first.

    Raises:
        UserError: no or unfitting data; no split of the name that `how.without` gives.
    """
    how = dataclasses.replace(how or How(), answering=answering, batch=batch)
    out = as_path(out)
    console = console if leads() else Console(quiet=True)
    left_out, opened = None, Split(cfg.data.dir, name, split)
    if how.without is not None:
        left_out = how.without, opened.also_in(how.without)
    data, kind, space = opened.examples, opened.kind, opened.space
    source = SourceConfig(name=name, split=split, kind=kind, weight=1.0)
    listed = space if how.asked is None else space_of(cfg.data.dir, how.asked)
    asked = Asked(listed, how.order, how.seed)
    native = how.asked is None and how.order == "native"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task(f"{name}, {split}", total=len(data))
        found = predict(
            cfg,
            model,
            source,
            answerings=how.ways,
            batch=batch,
            progress=lambda done: bars.update(task, completed=done),
            mesh=mesh,
            asked=None if native else asked,
        )
    seen = groups.read_seen(cfg.data.dir, name, split, race_labels=cfg.model.face.race_labels)
    tested = [
        make_tested(TITLES[way], items, space, seen=seen, left_out=left_out)
        for way, items in found.items()
    ]
    if not leads():
        return tested
    trace = {}
    for number, (way, item) in enumerate(zip(how.ways, tested, strict=True)):
        file = out / (f"predictions-{way}.jsonl" if number else "predictions.jsonl")
        write_predictions(file, item.predictions)
        trace[file.name] = file_hash(file)
    if checkpoint is not None:
        where = PACKAGE if checkpoint == PACKAGE else find(checkpoint)
        trace[f"checkpoint {where}"] = folder_hash(find(checkpoint))
    priors = opened.priors
    trace[f"data, {name}, {split}"] = data_hash(data, space)
    trace[f"face priors, {name}, {split}"] = priors_hash(priors[i] for i in range(len(priors)))
    trace["question"] = asked.question(data[0]["id"], kind)
    protocol = protocol_of(name)
    mistakes = []
    if how.pictures or (protocol is not None and protocol.open):
        mistakes = _pictures(cfg, source, tested[0].predictions)
    verbs = {"generate": "writing", "score": "scoring the label words"}
    ways = " and by ".join(verbs[way] for way in how.ways)
    write_results(
        out,
        title=f"{name}, {split}",
        lede=f"{len(data):,} examples; the model answers by {ways}.",
        source=name,
        tested=tested,
        notes=[_protocol(cfg, name, kind), *_mapping(asked, space, tested[0])],
        mistakes=mistakes,
        command=_command(name, split, how),
        config=yaml.safe_dump(json.loads(json.dumps(config.to_dict(cfg))), sort_keys=False),
        versions=_versions(),
        trace=trace,
    )
    return tested


def _ways(tested: Sequence[Tested]) -> dict[str, Any]:
    """The numbers of each way of answering, where there are two."""
    if len(tested) == 1:
        return {}
    return {"ways": {item.title: summarise(item) for item in tested}}


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False)


def check_unseen(cfg: Config, name: str, split: str) -> None:
    """Refuses a number about examples that the run was trained on.

    Raises:
        UserError: the run's sources hold the tested split, or another fold of the set, whose
            training list holds most of this fold's test items.
    """
    builder, view = parse(name)
    protocol = protocol_of(name)
    for source in cfg.data.sources:
        other, trained = parse(source.name)
        if source.name == name and source.split == split:
            raise UserError(f"{name}: the run was trained on its split {split!r}; test another")
        folds = protocol is not None and protocol.folds > 1 and other == builder
        if folds and trained != view:
            raise UserError(
                f"{name}: the run was trained on {source.name}, whose training list holds test "
                f"items of {view}: test it on {source.name}, or name one run a fold, RUN{{fold}}"
            )


def _command(name: str, split: str, how: How) -> str:
    words = f"emollama eval RUN --source {name} --split {split} --answering {how.answering}"
    if how.asked is not None:
        words += f" --asked {how.asked}"
    if how.without is not None:
        words += f" --without {how.without}"
    return words + (f" --order shuffled --seed {how.seed}" if how.order == "shuffled" else "")


def _versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in ("emollama-jax", "jax", "flax")}


def _protocol(cfg: Config, name: str, kind: Literal["image", "clip"]) -> report.Table:
    """The set's protocol beside what this run did."""
    protocol = protocol_of(name)
    rows = []
    if protocol is not None:
        rows = [("frames", protocol.frames), ("face", protocol.crop)]
    if kind == "clip":
        data = cfg.data
        done = f"{data.clip_frames} frames, sampling={data.sampling}"
        usual = data.sampling == "segments" and data.clip_frames == SEGMENTS
        rows.append(("this run", done + ("" if usual else ": differs from the protocol")))
    margin = f"the box and {cfg.data.face_margin:g} of its side"
    rows.append(("face crop of this run", margin))
    return report.Table(title="Protocol", note="", head=("", ""), rows=rows)


def _mapping(asked: Asked, space: LabelSpace, tested: Tested) -> list[report.Table]:
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
    return [report.Table(title="Labels across sets", note=note, head=head, rows=rows)]


def _pictures(
    cfg: Config, source: SourceConfig, predictions: Sequence[Prediction]
) -> list[report.Item]:
    """The worst mistakes as the model saw them."""
    encoder = Encoder(cfg)
    split = Split(cfg.data.dir, source.name, source.split)
    data, priors = split.examples, split.priors
    found = []
    for number in worst(predictions):
        item = predictions[number]
        try:
            look = encoder.look(data[number]["media"], kind=source.kind, prior=priors[number])
        except UserError:
            continue  # unreadable media were answered blind; there is nothing to show
        frames = list(look.frames[:: max(1, -(-len(look.frames) // STRIP))])
        found.append(
            report.Item(
                id=item.id,
                frames=frames,
                landmarks=[None] * len(frames),
                label=item.label,
                predicted=item.predicted,
                text=item.text or "",
            )
        )
    return found
