"""The program `emollama`: one verb per wish. Bad input is one line and exit status 2."""

import json
import pathlib
import sys
from typing import Literal

import tyro

from emollama_jax.bench.options import TrainSizes
from emollama_jax.errors import UserError
from emollama_jax.evaluate.options import ZeroShot
from emollama_jax.instruct.options import Options as InstructOptions

Positional = tyro.conf.Positional
Inline = tyro.conf.OmitArgPrefixes


def demo(
    out: pathlib.Path = pathlib.Path("demo_out"), quick: bool = False, ablation: bool = False
) -> None:
    """The whole story on the embedded data set: prepare, face priors, train, stop and resume,
    evaluate, ask; ends with a report page. Started again in the same folder, it continues.

    Args:
        out: folder of everything it writes; open report.html there.
        quick: a shortened run that shows that everything works; its numbers mean nothing.
        ablation: also train without FIM, without its branches and without AGR, three seeds each.
    """
    from emollama_jax.demo import run

    summary = run(out, quick=quick, ablation=ablation, console=_console())
    for kind in ("image", "clip"):
        print(f"{kind}s: WAR {summary[kind]['WAR']:.3f}  UAR {summary[kind]['UAR']:.3f}")
    print(f"report: {out / 'report.html'}")


def data_prepare(
    name: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    source: pathlib.Path | None = None,
    fold: int | None = None,
    config: str = "tiny",
    out: str | None = None,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    missing_share: float = 0.01,
    processes: int = 2,
) -> None:
    """Prepares a data set: its examples as ArrayRecord, and the priors of every face, once.

    Sets: raf_db, ferplus, affectnet7, affectnet8, dfew, ferv39k, mafw from their official layouts;
    own/NAME from your own folder per class, or table of paths and labels; actionfaces/images and
    actionfaces/clips, which are drawn. Stopped, the same command goes on.

    Args:
        name: of the data set.
        overrides: of the config, key=value, e.g. data.face_margin=0.4.
        source: folder of the official layout; for own/NAME a folder, .csv, .tsv or .jsonl file.
        fold: of dfew and mafw, 1 … 5; all that --source has lists of by default.
        config: whose FaceXFormer and face margin hold: a name in configs/ or a .yaml file.
        out: data folder; the config's data.dir by default.
        splits: that get face priors; none after --splits computes none.
        missing_share: of the listed files that may be missing; more stop the preparation.
        processes: that read or draw side by side.
    """
    from emollama_jax.faces.prepare import check, load_face, prepare_source

    check(name, source)  # before the weights are read
    where = () if out is None else (f"data.dir={json.dumps(out)}",)
    cfg = _load(config, (*where, *overrides))
    folder = prepare_source(
        cfg,
        load_face(cfg),
        name,
        source=source,
        fold=fold,
        missing_share=missing_share,
        splits=splits,
        processes=processes,
        console=_console(),
    )
    print(f"prepared {folder}")


def data_inspect(
    name: Positional[str],
    dir: str = "data",
    split: str | None = None,
    fold: int | None = None,
    sheet: pathlib.Path | None = None,
) -> None:
    """Counts of a prepared data set beside the published ones, faults, and a contact sheet.

    ≠ marks a count that differs from the published one. Faults are examples that are listed twice
    or stand in two splits, by their name or their content, and folds that test the same clip.

    Args:
        name: of the data set, e.g. raf_db, dfew, dfew/fold1, own/NAME, actionfaces/images.
        dir: data folder.
        split: of the data set; all by default.
        fold: of dfew and mafw; all that are prepared by default.
        sheet: where the contact sheet goes; NAME-SPLIT.png by default.
    """
    from emollama_jax.data.inspect import contact_sheet, inspect

    found = inspect(dir, name if fold is None else f"{name}/fold{fold}", split)
    print("\n".join(found.lines()))
    path = sheet or pathlib.Path(f"{found.first.name.replace('/', '-')}-{found.first.split}.png")
    contact_sheet(dir, found.first.name, found.first.split).save(path)
    print(f"contact sheet: {path}")


def data_instruct(options: Inline[InstructOptions], dry_run: bool = False) -> None:
    """Makes the instruction data of a prepared split: the category question of every example, and
    conversations that Gemini writes about picture and label. Training then reads them.

    Begin with --dry-run, which says what it would cost and sends nothing; then --limit 20, and
    read DIR/instruct/NAME/SPLIT/conversations.json; then all, with a --budget. Stopped or killed,
    the same command goes on: what was paid is not asked again. The key is read from
    GEMINI_API_KEY; without one, templates stand in, at no cost, marked as such.

    Args:
        options: what to make.
        dry_run: print items, tokens and estimated cost, send nothing.
    """
    from emollama_jax.instruct.command import estimate, instruct

    if dry_run:
        print("\n".join(estimate(options).lines()))
        return
    folder, outcome = instruct(options, _console())
    print(f"conversations: {outcome.summary}: {folder}")
    _stopped(outcome.stopped)


def pretrain(
    config: Positional[str] = "tiny",
    out: pathlib.Path = pathlib.Path("pretrained"),
    pictures: int = 36_000,
    clips: int = 1_200,
    vision_steps: int = 2_500,
    face_steps: int = 2_500,
    llama_steps: int = 800,
    seed: int = 0,
    towers: tuple[str, ...] = ("llama", "vision", "face"),
) -> None:
    """Makes the small pretrained towers that the package carries (hours on two cores); resumable.

    Args:
        config: whose model section gives the sizes.
        out: gets the weights, their metrics and the drawn pictures.
        pictures: drawn pictures of training identities.
        clips: whose frames join them.
        vision_steps: of the vision tower.
        face_steps: of FaceXFormer.
        llama_steps: of the language model.
        seed: of everything.
        towers: which to train; two processes in one folder may share the work.
    """
    from emollama_jax.train import pretrain as module

    if unknown := set(towers) - {"llama", "vision", "face"}:
        raise UserError(f"--towers: unknown {', '.join(sorted(unknown))} (llama, vision, face)")
    plan = module.Plan(
        pictures=pictures,
        clips=clips,
        vision_steps=vision_steps,
        face_steps=face_steps,
        llama_steps=llama_steps,
        seed=seed,
    )
    module.pretrain(_load(config), plan, out, _console(), towers)


def train(
    config: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    data: tuple[str, ...] = (),
    out: str = "runs/train",
) -> None:
    """Trains a run, or continues it. Ctrl-C or SIGTERM saves; the same command goes on.

    On several hosts, the same command runs on each: docs/cloud_tpu.md. Exit status 143: stopped by
    SIGTERM, start it again; 2: an error that a restart does not heal.

    Args:
        config: a name in configs/ or a .yaml file.
        overrides: key=value, e.g. train.steps=200 model.fim.branches=global.
        data: prepared sets in place of the config's sources, e.g. own/mine; kind and split are
            found.
        out: folder of the run: checkpoints, metrics.jsonl, tensorboard; gs:// too.
    """
    from emollama_jax.sharding import distributed
    from emollama_jax.train.loop import fit

    cfg = _load(config, overrides)
    distributed.start(cfg.distributed, saves_on_notice=True)
    if data:
        from emollama_jax.train import sources

        cfg, told = sources.use(cfg, data)
        if distributed.leads():
            print("\n".join(told), file=sys.stderr)
    result = fit(cfg, out, console=_console())
    if result.exit_status:
        sys.exit(result.exit_status)
    if distributed.leads():
        print(f"step {result.step} of {result.steps}, loss {result.loss:.4f}: {out}")


def evaluate(
    run: Positional[str] = "",
    overrides: Positional[tuple[str, ...]] = (),
    source: str | None = None,
    split: str = "test",
    fold: str | None = None,
    dir: str | None = None,
    answering: Literal["both", "generate", "score"] = "both",
    asked: str | None = None,
    order: Literal["native", "shuffled"] = "native",
    seed: int = 0,
    batch: int = 32,
    pictures: bool = False,
    predictions: tuple[pathlib.Path, ...] = (),
    truth_column: str = "label",
    prediction_column: str = "predicted",
    id_column: str | None = None,
    classes: str | None = None,
    json: bool = False,
    out: str | None = None,
) -> None:
    """WAR, UAR, per-class recall and confusion matrix of a trained run on a prepared split, or of
    anyone's predictions in a file (--predictions), for which no model is needed.

    The model is spread over devices as it was in training; to change that: mesh.fsdp=-1. On several
    hosts, the same command runs on each, as for training.

    Args:
        run: folder of `emollama train`, or one checkpoint in it; gs:// too. With --fold all,
            {fold} in it stands for the number: one run for each fold.
        overrides: key=value of the sections mesh, distributed and generate.
        source: the data set, e.g. raf_db, dfew; actionfaces/images by default. Of predictions: the
            set whose classes count; what the file says by default.
        split: of the data set.
        fold: of dfew and mafw: 1 … 5, or all: the mean over the five.
        dir: data folder; the run's by default.
        answering: the written answer, parsed; the likeliest label word; or both.
        asked: the set whose label words the question lists, e.g. the one that was trained on.
        order: of the options in the question; shuffled measures position bias.
        seed: of shuffled options.
        batch: examples at a time.
        pictures: show mistakes of a set under a research licence in the report.
        predictions: a CSV, JSON or JSON lines file; or five, one for each fold of --source.
        truth_column: of the true label in it.
        prediction_column: of the answer: a label, a ranked list (its first counts), or free text.
        id_column: of the item's name, each once; items are named by their line by default.
        classes: label words with commas, for sets that are not known here.
        json: print WAR, UAR, n, unparsed and recall of --predictions as JSON, as shares.
        out: gets predictions.jsonl, evaluation.json, table.tex and report.html; RUN/eval by
            default, nothing for --predictions.
    """
    if predictions:
        from emollama_jax.evaluate.score import report_files

        columns = (truth_column, prediction_column, id_column)
        print(report_files(predictions, columns, source, classes, out=out, as_json=json))
        return
    if not run:
        raise UserError("name a run (emollama eval RUN), or a file: --predictions FILE")
    from emollama_jax import config
    from emollama_jax.sharding import distributed

    distributed.start(config.how_to_run(overrides), saves_on_notice=False)
    from emollama_jax.evaluate.command import How, evaluate_source

    said = evaluate_source(
        run,
        overrides,
        source or "actionfaces/images",
        split,
        fold=fold,
        folder=dir,
        how=How(
            answering=answering,
            batch=batch,
            asked=asked,
            order=order,
            seed=seed,
            pictures=pictures,
        ),
        out=out,
        console=_console(),
    )
    if distributed.leads():
        print(said)


def zero_shot(options: Inline[ZeroShot]) -> None:
    """WAR, UAR and the rest of any other model, under the same protocol: a Hugging Face
    image-text model, an OpenAI-compatible endpoint, or Gemini.

    Begin with --limit 20. Answers are kept in the journal of the output folder: stopped or killed,
    the same command goes on, and a second run asks nothing. Keys are read from the environment:
    GEMINI_API_KEY, and OPENAI_API_KEY where the endpoint wants one.

    Args:
        options: which model, about what.
    """
    from emollama_jax.evaluate.zero_shot import run

    print(run(options, _console()))


def ask(
    media: Positional[tuple[str, ...]],
    run: str = "demo_out/run",
    face: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    chat: bool = False,
    without_face: bool = False,
    json: bool = False,
) -> None:
    """Answers a question about the face in each picture or clip; the answer streams.

    emollama ask photo.jpg "What emotion does the person in the image show?"

    Without a question, or with --chat, it reads questions line by line and remembers what was said.

    Args:
        media: picture files, video files or folders of frames, then the question in plain words.
        run: trained run, e.g. what `make demo` left in demo_out/run.
        face: which face of a picture, 0 the largest; the largest by default.
        temperature: 0 gives the likeliest answer; the run's by default.
        max_new_tokens: longest answer; the run's by default.
        chat: read more questions after the first.
        without_face: ask the model even where no face was found; it may make one up.
        json: one line of JSON for each answer: question, answer, faces, label scores, seconds.
    """
    from emollama_jax.serve import terminal

    if not media:
        raise UserError('name a picture or clip: emollama ask photo.jpg "a question"')
    paths, question = terminal.split_arguments(media)
    wish = terminal.Wish(
        media=paths,
        question=question,
        chat=chat or question is None,
        run=run,
        face=face,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        as_json=json,
        without_face=without_face,
    )
    terminal.ask(wish, _console())


def plan(
    config: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    *,
    topology: str,
    step: Literal["train", "prefill", "decode"] = "train",
    kind: Literal["image", "clip"] | None = None,
    batch: int | None = None,
    json: bool = False,
    search: bool = False,
) -> None:
    """Compiles the real step for a TPU slice that need not be here, and says what it would take:
    memory, FLOPs, collectives, and estimates of the time. Needs the extra `plan` (libtpu).

    No weights are read. A 7B takes minutes: of compiling on this machine, not of a TPU.

    Args:
        config: a name in configs/ or a .yaml file.
        overrides: key=value, e.g. mesh.fsdp=-1 model.llama.remat=dots.
        topology: of the slice, e.g. v5e:2x4 (8 chips) or v5p:4x4x4; a wrong one lists them all.
        step: train, prefill (towers, prompt, first token), or decode (one more token).
        kind: of batch; clips where the config has some.
        batch: examples of a step, all chips together; the config's training batch by default.
        json: print JSON instead of tables.
        search: find the largest batch that fits and the best preset; many compilations.
    """
    from emollama_jax.scale import topologies

    topologies.chip_of(topology)  # a wrong one is refused at once
    topologies.prepare()  # before JAX starts
    from emollama_jax.scale.command import run

    run(
        _load(config, overrides),
        topology,
        step=step,
        kind=kind,
        examples=batch,
        as_json=json,
        searching=search,
        console=_console(),
    )


def bench_data(
    config: str = "emollama_7b", clips: int = 8, batch: int = 4, batches: int = 10, rounds: int = 5
) -> None:
    """Frames per second of the input pipeline (decode, sample, crop, resize, tokenise, batch) on
    clips that are drawn, against PyTorch's DataLoader with PyAV, two workers each, in turns.

    Args:
        config: whose shapes are made: a name in configs/ or a .yaml file.
        clips: that are drawn: H.264 in MP4, 640 × 360, 4 s.
        batch: clips of a batch.
        batches: of a timing.
        rounds: timings of each side.
    """
    from emollama_jax.bench import data as bench

    cfg = bench.bench_config(config, batch=batch)
    speeds = bench.run(cfg, clips=clips, batches=batches, rounds=rounds, console=_console())
    print(bench.table(speeds))


def bench_train(
    sizes: Inline[TrainSizes], steps: int = 5, warm: int = 2, json: bool = False
) -> None:
    """Tokens per second of a LoRA train step on this CPU, against the same model, weights and batch
    in PyTorch, in turns; needs the extra `parity` and a checkout. Losses must agree.

    Args:
        sizes: of the LLaMA and its batch.
        steps: that count, of each side.
        warm: steps before them.
        json: print JSON instead of the table.
    """
    from emollama_jax.bench import train as module

    result = module.run(sizes, steps=steps, warm=warm, console=_console())
    print(result.report(as_json=json))


def bench() -> None:
    """Speed, against PyTorch in one run. `emollama bench --help` lists what is measured."""
    main(["bench", "--help"])


def data() -> None:
    """Data sets: prepare, inspect. `emollama data --help` lists them."""
    main(["data", "--help"])


VERBS = {
    "demo": demo,
    "data": data,
    "bench": bench,
    "pretrain": pretrain,
    "train": train,
    "eval": evaluate,
    "zero-shot": zero_shot,
    "ask": ask,
    "plan": plan,
}
DATA_VERBS = {"prepare": data_prepare, "inspect": data_inspect, "instruct": data_instruct}
BENCH_VERBS = {"data": bench_data, "train": bench_train}
NESTED = {"data": DATA_VERBS, "bench": BENCH_VERBS}


def main(args: list[str] | None = None) -> None:
    """Runs one verb."""
    args = sys.argv[1:] if args is None else args
    verbs, prog = VERBS, "emollama"
    if args[:1] and args[0] in NESTED and len(args) > 1:
        verbs, prog, args = NESTED[args[0]], f"emollama {args[0]}", args[1:]
    try:
        tyro.extras.subcommand_cli_from_dict(verbs, prog=prog, description=__doc__, args=args)
    except UserError as error:
        print(f"emollama: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _load(config: str, overrides: tuple[str, ...] = ()):
    from emollama_jax.config import load

    return load(config, overrides)


def _stopped(why: str) -> None:
    """Says why asking ended early; only a service that failed is an error."""
    if why.startswith("interrupted"):
        print(f"emollama: {why}", file=sys.stderr)
        sys.exit(130)
    if why:
        raise UserError(f"stopped: {why}")


def _console():
    from rich.console import Console

    return Console(file=sys.stderr)


if __name__ == "__main__":
    main()
