"""The program `emollama`: one verb per wish. Bad input is one line and exit status 2."""

import dataclasses
import json
import pathlib
import sys
from typing import Literal

import tyro

from emollama_jax.errors import UserError

Positional = tyro.conf.Positional


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
    config: str = "tiny",
    out: pathlib.Path | None = None,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    processes: int = 2,
) -> None:
    """Prepares a data set: its examples as ArrayRecord, and the priors of every face, once.

    Args:
        name: data set and builder config, e.g. actionfaces/images or actionfaces/clips.
        config: whose FaceXFormer and face margin hold: a name in configs/ or a .yaml file.
        out: data folder; the config's data.dir by default.
        splits: that get face priors.
        processes: that draw side by side.
    """
    from emollama_jax.checkpoint import init_model
    from emollama_jax.faces.prepare import check, prepare_source
    from emollama_jax.sharding.mesh import make_mesh

    check(name)  # before the model is made
    cfg = _load(config, () if out is None else (f"data.dir={json.dumps(str(out))}",))
    folder = prepare_source(
        cfg,
        init_model(cfg, make_mesh(cfg.mesh)),
        name,
        sizes=None,
        splits=splits,
        processes=processes,
        console=_console(),
    )
    print(f"prepared {folder}")


def data_inspect(
    name: Positional[str],
    dir: pathlib.Path = pathlib.Path("data"),
    split: str = "train",
    sheet: pathlib.Path | None = None,
) -> None:
    """Counts of a prepared data set per class, and a contact sheet to look at.

    Args:
        name: data set and builder config, e.g. actionfaces/images.
        dir: data folder.
        split: of the data set.
        sheet: where the contact sheet goes; NAME-SPLIT.png by default.
    """
    from emollama_jax.data.inspect import contact_sheet, count_classes

    for label, count, share in count_classes(dir, name, split):
        print(f"{label:<12}{count:>8}{share:>8.1%}")
    path = sheet or pathlib.Path(f"{name.replace('/', '-')}-{split}.png")
    contact_sheet(dir, name, split).save(path)
    print(f"contact sheet: {path}")


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
    out: pathlib.Path = pathlib.Path("runs/train"),
) -> None:
    """Trains a run, or continues it. Ctrl-C or SIGTERM saves; the same command goes on.

    Args:
        config: a name in configs/ or a .yaml file.
        overrides: key=value, e.g. train.steps=200 model.fim.branches=global.
        out: folder of the run: checkpoints, metrics.jsonl, tensorboard.
    """
    from emollama_jax.train.loop import fit

    result = fit(_load(config, overrides), out, console=_console())
    if result.exit_status:
        sys.exit(result.exit_status)
    print(f"step {result.step} of {result.steps}, loss {result.loss:.4f}: {out}")


def evaluate(
    run: Positional[pathlib.Path],
    source: str = "actionfaces/images",
    split: str = "test",
    dir: pathlib.Path | None = None,
    answering: Literal["generate", "score"] = "generate",
    batch: int = 32,
    out: pathlib.Path | None = None,
) -> None:
    """WAR, UAR, per-class recall and confusion matrix of a trained run on a prepared split.

    Args:
        run: folder of `emollama train`, or one checkpoint in it.
        source: data set and builder config.
        split: of the data set.
        dir: data folder; the run's by default.
        answering: the written answer, parsed, or the likeliest label word.
        batch: examples at a time.
        out: gets predictions.jsonl, evaluation.json and report.html; RUN/eval by default.
    """
    from emollama_jax.checkpoint import load_for_inference
    from emollama_jax.evaluate.command import evaluate_run

    cfg, model = load_for_inference(run)
    if dir is not None:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dir=str(dir)))
    folder = out or run / "eval"
    result = evaluate_run(
        cfg, model, source, split, answering=answering, batch=batch, out=folder, console=_console()
    )
    print(f"WAR {result.war:.4f}  UAR {result.uar:.4f}  n {result.n}: {folder / 'report.html'}")


def ask(
    media: Positional[pathlib.Path],
    question: Positional[str],
    run: pathlib.Path = pathlib.Path("demo_out/run"),
    face: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Answers a question about the face in a picture or a clip; the answer streams.

    Args:
        media: a picture or video file, or a folder of frames.
        question: in plain words.
        run: a trained run, e.g. what `emollama demo` left in demo_out/run.
        face: which face of a picture, 0 the largest; the largest by default.
        temperature: 0 gives the likeliest answer; the run's by default.
        max_new_tokens: length of the answer at most; the run's by default.
    """
    from emollama_jax.checkpoint import load_for_inference
    from emollama_jax.data.media import is_video
    from emollama_jax.serve.answer import Answerer

    is_video(media)  # unreadable media are refused before the model is loaded
    cfg, model = load_for_inference(run)
    given = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    how = dataclasses.replace(cfg.generate, **{k: v for k, v in given.items() if v is not None})
    answerer = Answerer(cfg, model)
    seen = answerer.look(media, face=face)
    if not seen.prior.found.any():
        print(f"{media}: no face found; the answer is about the whole picture", file=sys.stderr)
    for piece in answerer.ask(seen, question, how=how):
        print(piece, end="", flush=True)
    print()


def data() -> None:
    """Data sets: prepare, inspect. `emollama data --help` lists them."""
    main(["data", "--help"])


VERBS = {
    "demo": demo,
    "data": data,
    "pretrain": pretrain,
    "train": train,
    "eval": evaluate,
    "ask": ask,
}
DATA_VERBS = {"prepare": data_prepare, "inspect": data_inspect}


def main(args: list[str] | None = None) -> None:
    """Runs one verb."""
    args = sys.argv[1:] if args is None else args
    verbs, prog = VERBS, "emollama"
    if args[:1] == ["data"] and len(args) > 1:
        verbs, prog, args = DATA_VERBS, "emollama data", args[1:]
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


def _console():
    from rich.console import Console

    return Console(file=sys.stderr)


if __name__ == "__main__":
    main()
