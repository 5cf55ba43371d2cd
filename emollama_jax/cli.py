"""The program `emollama`: one verb per task. Bad input is one line and exit status 2.

Each verb refuses what it can before it imports JAX: a wrong word costs less than a second.
"""

import json
import pathlib
import sys
from typing import Annotated

import tyro

from emollama_jax import compile_cache, dispatch
from emollama_jax.cli_results import evaluate, zero_shot
from emollama_jax.cli_serve import serve
from emollama_jax.cli_speed import bench_data, bench_decode, bench_serve, bench_train, plan
from emollama_jax.cli_words import (
    FLAT,
    ConfigName,
    DataSet,
    Folder,
    LogLines,
    Media,
    Overrides,
    load_config,
    new_console,
    remove_handlers,
)
from emollama_jax.config_weights import TOWERS
from emollama_jax.data import sets
from emollama_jax.errors import UserError
from emollama_jax.instruct.options import InstructOptions
from emollama_jax.preflight import at_least, check_picture, check_writable
from emollama_jax.runs import refuse_packed
from emollama_jax.tiny.towers.recipe import Recipe

ABOUT = "EMO-LLaMA in JAX: names, describes and answers questions about facial expressions."

Inline = tyro.conf.OmitArgPrefixes
PREPARATION = sets.Preparation(processes=2)


def demo(
    out: pathlib.Path = pathlib.Path("demo_out"), quick: bool = False, ablation: bool = False
) -> None:
    """Runs every step on the embedded data set and writes a report page: prepare, face priors,
    train, stop and resume, evaluate, ask. Stopped? Re-run the command to resume.

    Args:
        out: output folder; open report.html there.
        quick: shortened run to check that everything works; its numbers mean nothing.
        ablation: also train without FIM, without its branches and without AGR, three seeds each.
    """
    check_writable(out)
    from emollama_jax.tiny.demo import run

    summary = run(out, quick=quick, ablation=ablation, console=new_console())
    for kind in ("image", "clip"):
        print(f"{kind}s: WAR {summary[kind]['WAR']:.3f}  UAR {summary[kind]['UAR']:.3f}")
    print(f"report: {out / 'report.html'}")


def data_prepare(
    name: DataSet,
    overrides: Overrides = (),
    how: Annotated[sets.Preparation, FLAT] = PREPARATION,
    config: str = "tiny",
    dir: Annotated[str | None, tyro.conf.arg(metavar="DIR", aliases=("--out",))] = None,
    splits: tuple[str, ...] = ("train", "validation", "test"),
) -> None:
    """Prepares a data set: stores its examples as ArrayRecord and computes the face priors once.

    Sets: raf_db, ferplus, affectnet7, affectnet8, dfew, ferv39k, mafw from their official layouts;
    own/NAME from a folder per class or a table of paths and labels; actionfaces/images and
    actionfaces/clips, which are drawn. Stopped? Re-run the command to resume.

    Args:
        name: data set.
        overrides: changes of the config, e.g. data.face_margin=0.4.
        how: source, fold and worker processes.
        config: config of FaceXFormer and the face margin: a name in configs/ or a .yaml file.
        dir: data folder; the config's data.dir by default.
        splits: splits to compute face priors for; --splits without a name computes none.
    """
    sets.check_source(name, how)  # before the weights are read
    at_least(1, processes=how.processes)
    at_least(0, missing_share=how.missing_share)
    where = () if dir is None else (f"data.dir={json.dumps(dir)}",)
    cfg = load_config(config, (*where, *overrides))
    from emollama_jax.paths import on_disk

    on_disk(cfg.data.dir, instead=sets.PREPARE_HERE)
    check_writable(cfg.data.dir, option="--dir")
    compile_cache.start()
    from emollama_jax.base import load_face
    from emollama_jax.prepare import prepare_source

    folder = prepare_source(cfg, load_face(cfg), name, how, splits=splits, console=new_console())
    print(f"prepared {folder}")


def data_inspect(
    name: DataSet,
    dir: Folder = "data",
    split: str | None = None,
    fold: int | None = None,
    sheet: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Shows a prepared data set: counts beside the published ones, faults, and a contact sheet.

    ≠ marks a count that differs from the published one. Faults are examples that occur twice or
    in two splits, by name or by content, and folds that test the same clip.

    Args:
        name: data set, e.g. raf_db, dfew, dfew/fold1, own/NAME, actionfaces/images.
        dir: data folder.
        split: name of one split; all by default.
        fold: fold of dfew and mafw; all that are prepared by default.
        sheet: file of the contact sheet; NAME-SPLIT.png by default.
    """
    name = name if fold is None else f"{name}/fold{fold}"
    if sheet is not None:
        check_picture(sheet, option="--sheet")
    sets.check_prepared(dir, [name])
    from emollama_jax.data.inspect import contact_sheet, inspect
    from emollama_jax.data.split import Split

    found = inspect(dir, name, split)
    print("\n".join(found.lines()))
    path = sheet or pathlib.Path(f"{found.first.name.replace('/', '-')}-{found.first.split}.png")
    contact_sheet(Split(dir, found.first.name, found.first.split)).save(path)
    print(f"contact sheet: {path}")


def data_instruct(options: Inline[InstructOptions], dry_run: bool = False) -> None:
    """Makes the instruction data of a prepared split: the category question of every example, and
    conversations that Gemini writes from picture and label. Training then uses them.

    Start with --dry-run, which estimates the cost and sends nothing; then try --limit 20 and read
    DIR/instruct/NAME/SPLIT/conversations.json; then run it all with a --budget. Stopped or killed?
    Re-run the command to resume: nothing is paid for twice. The key is read from GEMINI_API_KEY;
    without one, templates are used instead, at no cost and marked as such.

    Args:
        options: split, generator and limits.
        dry_run: print items, tokens and estimated cost; send nothing.
    """
    sets.check_prepared(options.dir, [options.name])
    if not dry_run:
        check_writable(options.dir, option="--dir")
    from emollama_jax.instruct.command import estimate, instruct

    if dry_run:
        print("\n".join(estimate(options).lines()))
        return
    folder, outcome = instruct(options, new_console())
    print(f"conversations: {outcome.summary}: {folder}")
    _stopped(outcome.stopped)


def pretrain(
    recipe: Annotated[Recipe, FLAT],
    config: ConfigName = "tiny",
    out: pathlib.Path = pathlib.Path("pretrained"),
    towers: tuple[str, ...] = ("llama", "vision", "face"),
) -> None:
    """Trains the small towers that ship with the package (hours on two cores).

    Stopped? Re-run the command to resume.

    Args:
        recipe: amounts of data and training.
        config: config whose model section gives the sizes.
        out: folder for the weights, their metrics and the pictures.
        towers: towers to train; once pictures and teacher exist, two processes can share the work
            in one folder.
    """
    if unknown := set(towers) - set(TOWERS):
        raise UserError(f"--towers: unknown {', '.join(sorted(unknown))} (llama, vision, face)")
    recipe.check()
    cfg = load_config(config)
    check_writable(out)
    compile_cache.start()
    from emollama_jax.tiny.towers.pretrain import pretrain

    pretrain(cfg, recipe, out, new_console(), towers)


def train(
    config: ConfigName,
    overrides: Overrides = (),
    data: tuple[str, ...] = (),
    out: Folder = "runs/train",
) -> None:
    """Trains a run. Ctrl-C or SIGTERM saves and stops; re-run the command to resume.

    On several hosts, run the command on each (docs/cloud_tpu.md). Exit status 143: stopped by
    SIGTERM, re-run to resume; 2: an error that a restart does not fix. The learning-rate schedule
    spans train.steps: raising it on resume stretches the schedule, and a line says how.

    Args:
        config: a name in configs/ or a .yaml file.
        overrides: changes of the config, e.g. train.steps=200 model.fim.branches=global; settings
            and their bounds are listed below.
        data: prepared sets in place of the config's sources, e.g. own/mine; kind and split are
            detected.
        out: run folder: checkpoints, metrics.jsonl, tensorboard; gs:// too.
    """
    # No set's name contains "=": a word after --data that does is a setting.
    overrides = (*overrides, *(word for word in data if "=" in word))
    data = tuple(word for word in data if "=" not in word)
    cfg = load_config(config, overrides)
    refuse_packed(out)
    check_writable(out)
    wanted = data or [source.name for source in cfg.data.sources]
    for name in wanted:
        sets.check_one_fold(name)
    sets.check_prepared(cfg.data.dir, wanted)
    compile_cache.start()
    from emollama_jax.sharding import distributed
    from emollama_jax.train.loop import fit

    distributed.start(cfg.distributed, saves_on_notice=True)
    if data:
        from emollama_jax.train import sources

        cfg, told = sources.use(cfg, data)
        if distributed.leads():
            print("\n".join(told), file=sys.stderr)
    result = fit(cfg, out, console=new_console())
    if result.exit_status:
        sys.exit(result.exit_status)
    if distributed.leads():
        print(f"step {result.step} of {result.steps}, loss {result.loss:.4f}: {out}")


def ask(
    media: Media,
    run: str | None = None,
    face: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    chat: bool = False,
    without_face: bool = False,
    json: bool = False,
) -> None:
    """Answers a question about the face in each picture or clip; the answer streams.

    emollama ask photo.jpg "What emotion does the person in the image show?"

    Without a question it describes the face and names the emotion; in a terminal, and with --chat,
    it then reads more questions line by line and remembers what was said.

    Args:
        media: picture files, video files or folders of frames, then the question in plain words.
        run: trained run, e.g. demo_out/run after `make demo`; the run that ships with the package
            by default.
        face: index of the face in a picture, by size; 0, the largest, by default.
        temperature: sampling temperature, 0 for the likeliest answer; the run's by default.
        max_new_tokens: longest answer in tokens; the run's by default.
        chat: read more questions after the first.
        without_face: answer even if no face was found; the model may make one up.
        json: print one line of JSON per answer: question, answer, faces, label scores, seconds.
    """
    from emollama_jax.serve import terminal

    if not media:
        raise UserError('name a picture or clip: emollama ask photo.jpg "a question"')
    paths, question = terminal.split_arguments(media)
    wish = terminal.Wish(
        media=paths,
        question=question,
        chat=chat or question is None,
        run=terminal.default_run() if run is None else run,
        face=face,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        as_json=json,
        without_face=without_face,
    )
    terminal.ask(wish, new_console())


def bench() -> None:
    """Speed compared with PyTorch: data, train, decode, serve."""


def data() -> None:
    """Data sets: prepare, inspect, instruct."""


VERBS = {
    "demo": demo,
    "data": data,
    "bench": bench,
    "pretrain": pretrain,
    "train": train,
    "eval": evaluate,
    "zero-shot": zero_shot,
    "ask": ask,
    "serve": serve,
    "plan": plan,
}
DATA_VERBS = {"prepare": data_prepare, "inspect": data_inspect, "instruct": data_instruct}
BENCH_VERBS = {
    "data": bench_data,
    "train": bench_train,
    "decode": bench_decode,
    "serve": bench_serve,
}
NESTED = {"data": DATA_VERBS, "bench": BENCH_VERBS}


def main(args: list[str] | None = None) -> None:
    """Runs one verb."""
    words = sys.argv[1:] if args is None else args
    try:
        dispatch.main(VERBS, NESTED, words, ABOUT, after_help={train: _settings})
    finally:
        remove_handlers(LogLines)


def _settings() -> str:
    from emollama_jax.config import fields_help

    return f"settings of the config, with their bounds:\n\n{fields_help()}"


def _stopped(why: str) -> None:
    """Says why asking ended early; only a service that failed is an error."""
    if why.startswith("interrupted"):
        print(f"emollama: {why}", file=sys.stderr)
        sys.exit(130)
    if why:
        raise UserError(f"stopped: {why}")


if __name__ == "__main__":
    main()
