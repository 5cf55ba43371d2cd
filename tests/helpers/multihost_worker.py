"""One process of a run on several hosts, as the multi-host tests start it.

To train, the model is the toy, and all else is real: the pipeline reads small sets, Orbax writes.
What the process draws goes to `OUT/drawn-ID.jsonl`, one line a step. To evaluate, the model is an
EmoLlama of one layer a tower.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from emollama_jax.config import Config, MeshConfig, SourceConfig
from emollama_jax.data.pipeline import TrainIterator
from emollama_jax.evaluate import speaker
from emollama_jax.evaluate.options import Asking
from emollama_jax.evaluate.protocol import Prediction, write_predictions
from emollama_jax.models import parameters
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract
from emollama_jax.sharding import distributed
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.sharding.rules import param_shardings
from emollama_jax.testing.toy_model import WIDTH, Toy
from emollama_jax.testing.toy_sets import Store, iterator, make_config, small_bpe
from emollama_jax.train.loop import FitResult, fit

STEPS = 12


def config(bpe: str, mesh: tuple[int, int, int], *overrides: str) -> Config:
    """Small sets, the toy's sizes, checkpoints every three steps."""
    data, fsdp, tensor = mesh
    cfg = make_config(
        bpe,
        f"train.steps={STEPS}",
        "train.image_batch=8",
        "train.clip_batch=8",
        "train.trainable=['llama/.*lora_[AB]', 'fim/.*', 'llama/norm/scale']",
        "train.projector=['fim/.*']",
        "train.learning_rate=1.0e-2",
        "train.save_every=3",
        "train.log_every=1",
        "weights=['tiny:llama']",
        *overrides,
    )
    lora = dataclasses.replace(cfg.model.llama.lora, rank=2, dropout=0.1)
    llama = dataclasses.replace(
        cfg.model.llama, vocab_size=cfg.model.llama.vocab_size, width=WIDTH, layers=3, lora=lora
    )
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, llama=llama),
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    )


class Drawn:
    """The real iterator, which writes down what it gives."""

    def __init__(self, batches: TrainIterator, path: pathlib.Path, pause: float):
        self._batches, self._path, self._pause = batches, path, pause

    def __getattr__(self, name: str):
        return getattr(self._batches, name)

    def __next__(self):
        step = self._batches.get_state()["step"]
        batch = next(self._batches)
        kind = "image" if batch.frames.shape[1] == 1 else "clip"
        line = {"step": step, "kind": kind, "index": batch.index.reshape(-1).tolist()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(self._pause)
        return batch


def prepare(folder: pathlib.Path) -> str:
    """Writes a tokenizer and the weights that the toy's decoder starts from; gives the former."""
    bpe = str(folder / "bpe.json")
    pathlib.Path(bpe).write_text(small_bpe())
    toy = Toy(config(bpe, (1, 1, 1)).model, rngs=nnx.Rngs(3))
    parameters.save(toy.llama, folder / "tiny_llama.safetensors")
    return bpe


@contextlib.contextmanager
def towers(bpe: str) -> Iterator[None]:
    """Takes what `prepare` wrote for the package's towers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "WEIGHTS", pathlib.Path(bpe).parent)
        yield


def train(
    cfg: Config,
    out: epath.PathLike,
    *,
    drawn: pathlib.Path | None = None,
    process: int,
    pause: float,
    **how,
) -> FitResult:
    """Trains the toy on the small sets, from `towers`, and notes in `drawn` what it draws."""

    def data(cfg: Config, part: distributed.Share) -> Drawn:
        batches = iterator(cfg, Store(), host_index=part.index, host_count=part.count)
        return Drawn(batches, (drawn or pathlib.Path(out)) / f"drawn-{process}.jsonl", pause)

    return fit(cfg, out, build=Toy, data=data, **how)


def random_model(cfg: Config, mesh: Mesh) -> EmoLlama:
    """NumPy's random numbers: making them with JAX would take most of the test's time."""
    model = abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs))
    leaves = named_parameters(model)
    places = param_shardings(leaves, mesh, preset=cfg.mesh.preset).params
    rng = np.random.Generator(np.random.PCG64(0))
    for name, leaf in sorted(leaves.items()):
        value = (rng.standard_normal(leaf.shape) * 0.05).astype(leaf.dtype)
        leaf.set_value(distributed.put(value, places[name]))
    return model


def evaluated(bpe: str, mesh: tuple[int, int, int], batch: int) -> dict[str, list[Prediction]]:
    """Both ways of answering about the eleven pictures, by a small EmoLlama of random weights."""
    data, fsdp, tensor = mesh
    cfg = make_config(
        bpe,
        "weights=none",
        "model.llama.layers=1",
        "model.vision.depth=1",
        "model.qformer.layers=2",
        "model.face.swin.depths=[2,2,2,2]",
        "model.face.decoder_depth=1",
        f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}}}",
    )
    store = Store()
    for number, example in enumerate(store.data["actionfaces/images"]):
        example["subject"] = number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaker, "Split", lambda folder, name, split: store.split(name, split))
        spread = make_mesh(cfg.mesh)
        return speaker.predict(
            cfg,
            random_model(cfg, spread),
            SourceConfig(name="actionfaces/images", split="test", kind="image", weight=1.0),
            Asking(batch=batch),
            mesh=spread,
        )


def main() -> None:
    task = json.loads(sys.argv[1])
    out, process = pathlib.Path(task["out"]), task["process"]
    cfg = config(
        task["bpe"],
        task["mesh"],
        f"distributed.coordinator={task['coordinator']}",
        "distributed.processes=2",
        f"distributed.process_id={process}",
    )
    distributed.start(cfg.distributed, saves_on_notice=True)
    if task["evaluate"]:
        for way, predictions in evaluated(task["bpe"], task["mesh"], batch=8).items():
            write_predictions(out / f"{way}-{process}.jsonl", predictions)
        return
    console = Console(file=sys.stdout, width=200)
    with towers(task["bpe"]):
        result = train(cfg, out, process=process, pause=task["pause"], console=console)
    sys.exit(result.exit_status)


if __name__ == "__main__":
    main()
