"""What frozen weights in 8 bits cost in quality: perplexity of a LLaMA, and WAR of a run.

    PYTHONPATH=. python benchmarks/eight_bits.py perplexity weights/smollm2_135m
    PYTHONPATH=. python benchmarks/eight_bits.py war package --source ferplus --split validation

Both compare float32 with weights alone in 8 bits, and with activations in 8 bits too, which is
what `frozen: int8` takes on a chip that gains by it (models/eight_bits.py). The text is the
descriptions of the installed packages, in the order of their names, 1,000 tokens of each at most;
windows of 512 tokens do not see each other. Exit status 1 where a cost is above its limit.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from emollama_jax import config
from emollama_jax.bench.decode import Work, load_folder
from emollama_jax.models import eight_bits
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract

WAYS = ("float", "int8_weights", "int8_products")
WINDOW, EACH, TOGETHER = 512, 1000, 4
PERPLEXITY, WAR = 0.01, 0.5  # limits: a share, and points


def text(tokenizer: Tokenizer, count: int) -> tuple[np.ndarray, list[str]]:
    """Ids of `count` tokens, and the packages that they are from."""
    ids: list[int] = []
    names: list[str] = []
    found = {
        distribution.metadata["Name"].lower(): distribution
        for distribution in importlib.metadata.distributions()
    }
    for name, distribution in sorted(found.items()):
        words = distribution.metadata.get_payload()
        if not isinstance(words, str) or len(words) < 2000:
            continue
        names.append(f"{name} {distribution.version}")
        ids += tokenizer.encode(words).ids[:EACH]
        if len(ids) >= count:
            return np.array(ids[:count], np.int32), names
    raise SystemExit(f"the installed packages describe themselves in {len(ids)} tokens")


def decoder(work: Work, frozen: str) -> Llama:
    """A LLaMA with its kernels kept in a way."""
    cfg = dataclasses.replace(work.cfg, frozen=frozen)
    llama = abstract(lambda rngs: Llama(cfg, rngs=rngs))
    leaves = named_parameters(llama)
    for path, value in work.params.items():
        if path + eight_bits.SCALE in leaves:
            whole, scale = eight_bits.narrow(jnp.asarray(value), axis=1)
            leaves[path].set_value(whole)
            leaves[path + eight_bits.SCALE].set_value(scale)
        else:
            leaves[path].set_value(jnp.asarray(value))
    return llama


def likelihoods(llama: Llama, ids: np.ndarray) -> Iterator[float]:
    """Negative log-likelihood of the tokens of a few windows, but each one's first, summed."""
    graphdef, state = nnx.split(llama)

    @jax.jit
    def sums(state: nnx.State, rows: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden = model(model.embed(rows)).hidden[:, :-1]
        logits = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1).sum()

    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    for start in range(0, len(windows), TOGETHER):
        yield float(sums(state, jnp.asarray(windows[start : start + TOGETHER])))


def perplexities(folder: pathlib.Path, count: int) -> dict[str, object]:
    """Perplexity by way, and what it was measured on."""
    work = load_folder(folder)
    ids, names = text(Tokenizer.from_file(str(folder / "tokenizer.json")), count)
    predicted = len(ids) // WINDOW * (WINDOW - 1)
    found = {}
    for way in WAYS:
        found[way] = float(np.exp(sum(likelihoods(decoder(work, way), ids)) / predicted))
        print(f"{folder.name:16} {way:14} perplexity {found[way]:.4f}", flush=True)
    return {"perplexity": found, "tokens": predicted, "packages": names}


def wars(run: str, source: str, split: str, data: str) -> dict[str, object]:
    """WAR in points by way, of the likeliest label, as `emollama eval` gives it."""
    found = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as out:
            command = [*(sys.executable, "-m", "emollama_jax.cli", "eval", run)]
            command += [f"{name}={way}" for name in config.RUN_SETTINGS]
            command += ["--source", source, "--split", split, "--dir", data]
            command += ["--answering", "score", "--json", "--out", f"{out}/eval"]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[way] = 100 * json.loads(told)["war"]
        print(f"{run:16} {way:14} WAR {found[way]:.2f}", flush=True)
    return {"war": found}


def main() -> int:
    """Prints a line a way, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("perplexity")
    one.add_argument("folder", type=pathlib.Path, help="LLaMA that tools.convert_torch wrote")
    one.add_argument("--tokens", type=int, default=20_000)
    other = kinds.add_parser("war")
    other.add_argument("run", help="a run, or package")
    other.add_argument("--source", default="ferplus")
    other.add_argument("--split", default="validation")
    other.add_argument("--dir", default="data")
    args = parser.parse_args()
    if args.kind == "perplexity":
        told, limit = perplexities(args.folder, args.tokens), PERPLEXITY
        base, *rest = (told["perplexity"][way] for way in WAYS)
        cost = max(rest) / base - 1
    else:
        told, limit = wars(args.run, args.source, args.split, args.dir), WAR
        base, *rest = (told["war"][way] for way in WAYS)
        cost = base - min(rest)
    print(json.dumps({**told, "cost": cost, "limit": limit}, indent=1))
    return int(cost > limit)


if __name__ == "__main__":
    sys.exit(main())
