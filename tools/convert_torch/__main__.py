"""PyTorch weights in and out: `python -m tools.convert_torch SOURCE --src PATH… --out DIR`."""

import contextlib
import gc
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import tyro

from emollama_jax.errors import UserError
from tools.command import run

Positional = tyro.conf.Positional
Paths = tuple[pathlib.Path, ...]
DType = Literal["bf16", "f32", "source"]
Layout = Literal["file", "bin-shards", "safetensors-shards", "safetensors"]
CONFIG = "emollama_7b"  # whose sizes hold where a checkpoint says none
WIDTH = max(shutil.get_terminal_size().columns, 180)  # of tables: keys are long


def _converts(source: str, about: str) -> Callable[..., None]:
    """The subcommand of one source."""

    def command(
        src: Paths,
        out: pathlib.Path,
        dtype: DType = "bf16",
        config: str = CONFIG,
        set: tuple[str, ...] = (),
        mesh: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        from emollama_jax.config import MeshConfig

        data, fsdp, tensor = mesh
        with _no_collector():
            from tools.convert_torch.convert import convert, load_model

            summary = convert(
                source,
                src,
                out,
                dtype=dtype,
                model=load_model(config, set),
                mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
                console=_console(),
            )
        for note in summary.notes:
            print(f"note: {note}")
        print(f"{out}: {summary}")

    command.__doc__ = f"""Converts {about}.

    Args:
        src: weight files (a LLaMA's may be a .gguf), or folders of them as Hugging Face lays them
            out.
        out: the folder to make; a config names it under `weights`.
        dtype: of what is written: bf16 (training, answering), f32, or each tensor's own.
        config: whose model section gives the sizes: a name in configs/ or a .yaml file. A
            config.json beside the weights, or a GGUF's metadata, overrides LLaMA's.
        set: overrides of that config, e.g. model.vision.image_size=336.
        mesh: data, fsdp and tensor devices that hold the arrays meanwhile.
    """
    return command


def inspect(
    src: Positional[Paths],
    source: str | None = None,
    config: str = CONFIG,
    set: tuple[str, ...] = (),
) -> None:
    """Shows what a checkpoint holds beside what it becomes, and the keys that match nothing.

    Args:
        src: weight files or folders of them; or one folder that this tool wrote.
        source: whose table to show; the one that reads most of it by default.
        config: whose model section gives the sizes.
        set: overrides of that config, e.g. model.llama.layers=40.
    """
    from rich.console import Console

    from tools.convert_torch.convert import load_model
    from tools.convert_torch.inspect import inspect as show

    _known(source)
    show(src, source=source, model=load_model(config, set), console=Console(width=WIDTH))


def export(
    to: Positional[str],
    src: pathlib.Path,
    out: pathlib.Path,
    base: tuple[pathlib.Path, ...] = (),
    merge: bool = True,
    dtype: DType = "source",
    shard_gb: float = 5.0,
) -> None:
    """Writes our weights for PyTorch.

    Args:
        to: llama, peft, llama-vid, eva-vit, qformer, facexformer, mtcnn, or ours (one file of
            safetensors under our names).
        src: a run of `emollama train`, `package`, or a folder of weights that this tool wrote.
        out: the folder (for ours: the file) to make.
        base: more folders of weights to take leaves from, where `src` is one.
        merge: fold the LoRA adapters into the kernels; otherwise they are left out (export them
            with `export peft`).
        dtype: of what is written.
        shard_gb: largest file, in GB, of what is cut into several.
    """
    from tools.convert_torch.export import export as write

    print(
        write(
            to, src, out, base=base, merge=merge, dtype=dtype, shard_gb=shard_gb, console=_console()
        )
    )


def check(
    dir: Positional[pathlib.Path],
    seed: int = 11,
    images: pathlib.Path | None = None,
    layouts: tuple[Layout, ...] = ("file", "bin-shards", "safetensors-shards", "safetensors"),
) -> None:
    """Proves the converter and the networks on recorded outputs of the original PyTorch code.

    Exit status 1 where an array is off by more than 5e-5 of its largest value (MTCNN's boxes and
    points by 0.01 pixels, its probabilities by 1e-4).

    Args:
        dir: with any of facexformer.json and .npz, llama_vid.json and .npz, llama_vid_tiny.npz,
            mtcnn.json.
        seed: of facexformer's weights and pictures.
        images: folder of the pictures that mtcnn.json names; those of the packages scikit-image
            and matplotlib are found without it.
        layouts: of the files that are written and converted: one PyTorch file, PyTorch shards,
            safetensors shards, one safetensors file.
    """
    from tools.convert_torch.check import check as prove

    sys.exit(0 if prove(dir, seed=seed, images=images, layouts=layouts, console=_console()) else 1)


def _known(source: str | None) -> None:
    from tools.convert_torch.sources import SOURCES

    if source is not None and source not in SOURCES:
        raise UserError(f"--source {source}: unknown (known: {', '.join(SOURCES)})")


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's search for garbage in cycles: imports and a conversion leave little, and the
    search took a tenth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _console():
    from rich.console import Console

    return Console(file=sys.stderr)


def main(args: list[str] | None = None) -> None:
    """Runs one subcommand."""
    with _no_collector():
        from tools.convert_torch.sources import SOURCES

    verbs: dict[str, Callable[..., None]] = {
        name: _converts(name, source.about) for name, source in SOURCES.items()
    }
    verbs |= {"export": export, "inspect": inspect, "check": check}
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of folders it cleans up
    prog = "python -m tools.convert_torch"
    cli = tyro.extras.subcommand_cli_from_dict
    run("convert_torch", lambda: cli(verbs, prog=prog, description=__doc__, args=args))


if __name__ == "__main__":
    main()
