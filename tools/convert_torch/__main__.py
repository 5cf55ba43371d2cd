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
CONFIG = "emollama_7b"  # gives the sizes that a checkpoint does not
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
        src: weight files (.gguf too, for a LLaMA), or folders of them in Hugging Face's layout.
        out: folder to make; name it under `weights` in a config.
        dtype: dtype to write: bf16 (training, answering), f32, or each tensor's own.
        config: config with the model's sizes: a name in configs/ or a .yaml file. A config.json
            beside the weights, or a GGUF's metadata, overrides LLaMA's.
        set: overrides of that config, e.g. model.vision.image_size=336.
        mesh: data, fsdp and tensor devices to hold the arrays during conversion.
    """
    return command


def inspect(
    src: Positional[Paths],
    source: str | None = None,
    config: str = CONFIG,
    set: tuple[str, ...] = (),
) -> None:
    """Shows a checkpoint's tensors beside our leaves, and the keys that match nothing.

    Args:
        src: weight files or folders of them; or one folder that this tool wrote.
        source: name of the conversion table; the one that reads most of it by default.
        config: config with the model's sizes.
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
        out: folder (for ours: file) to make.
        base: more folders of weights to take leaves from, if `src` is one.
        merge: fold the LoRA adapters into the kernels; otherwise they are left out (export them
            with `export peft`).
        dtype: dtype to write.
        shard_gb: largest size of a shard, in GB.
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
    """Checks the converter and the networks against recorded outputs of the original PyTorch code.

    Exit status 1 if an array is off by more than 5e-5 of its largest value (MTCNN's boxes and
    points by 0.01 pixels, its probabilities by 1e-4).

    Args:
        dir: folder with any of facexformer.json and .npz, llama_vid.json and .npz,
            llama_vid_tiny.npz, mtcnn.json.
        seed: random seed of facexformer's weights and pictures.
        images: folder of the pictures that mtcnn.json names; not needed for those of the packages
            scikit-image and matplotlib.
        layouts: file layouts to write and convert: one PyTorch file, PyTorch shards, safetensors
            shards, one safetensors file.
    """
    from tools.convert_torch.check import check as prove

    sys.exit(0 if prove(dir, seed=seed, images=images, layouts=layouts, console=_console()) else 1)


def _known(source: str | None) -> None:
    from tools.convert_torch.sources import SOURCES

    if source is not None and source not in SOURCES:
        raise UserError(f"--source {source}: unknown (known: {', '.join(SOURCES)})")


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Turns the garbage collector off: imports and a conversion leave few cycles, and the search
    for them took a tenth of the time."""
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
