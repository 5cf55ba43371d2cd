"""Training with packed rows beside one example a row, in turns: real tokens per second.

    python benchmarks/packed_rows.py DATA [--config tiny] [--steps 12] [--rounds 5]

DATA holds the config's prepared sets. Both sides draw, decode and train; each turn is the same
number of steps. The side without packing has the batches of `train.image_batch` and `clip_batch`
and steps of both kinds in equal number, as `tiny` had before rows were packed.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax

from emollama_jax import compile_cache, config
from emollama_jax.base import base_values
from emollama_jax.config import Config
from emollama_jax.data.pipeline import make_train_iterator
from emollama_jax.data.rows import real
from emollama_jax.sharding.distributed import place_batch
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.train.setup import set_up

WARM = 6  # steps before timing: both kinds of step are compiled


class Side:
    """A run in memory."""

    def __init__(self, cfg: Config):
        self.mesh = make_mesh(cfg.mesh)
        self.batches = make_train_iterator(cfg)
        with jax.set_mesh(self.mesh):
            self.setup = set_up(cfg, self.mesh)
            values = base_values(self.setup.model)
            self.frozen = {path: values[path] for path in self.setup.frozen}
            self.state = self.setup.start({path: values[path] for path in self.setup.state.params})
        self.run(WARM)

    def run(self, steps: int) -> dict[str, float]:
        """Trains; real tokens, examples, frames and seconds."""
        counts = {"tokens": 0, "frames": 0, "examples": 0, "places": 0}
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                batch = next(self.batches)
                held = real(batch) | {"places": batch.ids.size}
                counts = {name: counts[name] + held[name] for name in counts}
                placed = place_batch(batch, self.mesh)
                self.state, _ = self.setup.step(self.frozen, self.state, placed)
        jax.block_until_ready(self.state)
        return counts | {"seconds": time.perf_counter() - start}


def unpacked(cfg: Config) -> Config:
    """An example a row, half of the steps of each kind."""
    total = {kind: sum(s.weight for s in cfg.data.sources if s.kind == kind) for kind in KINDS}
    sources = tuple(
        dataclasses.replace(s, weight=s.weight / total[s.kind]) for s in cfg.data.sources
    )
    data = dataclasses.replace(cfg.data, packed=None, sources=sources)
    return dataclasses.replace(cfg, data=data)


KINDS = ("image", "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of prepared sets")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=12, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("overrides", nargs="*", help="changes of the config, key=value")
    options = parser.parse_args()
    compile_cache.start()
    cfg = config.load(options.config, [f"data.dir={options.data}", *options.overrides])
    sides = {"packed": Side(cfg), "one a row": Side(unpacked(cfg))}
    found = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            found[name].append(side.run(options.steps))

    def speeds(name: str, what: str) -> list[float]:
        return [turn[what] / turn["seconds"] for turn in found[name]]

    for name, turns in found.items():
        line = f"{name:<10}"
        for what in ("tokens", "examples", "frames"):
            line += f"{statistics.median(speeds(name, what)):10.1f} {what}/s"
        real_share = sum(t["tokens"] for t in turns) / sum(t["places"] for t in turns)
        print(f"{line}   {real_share:.1%} real tokens")
    pairs = zip(speeds("packed", "tokens"), speeds("one a row", "tokens"), strict=True)
    ratios = sorted(a / b for a, b in pairs)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"ratio of real tokens/s {statistics.median(ratios):.2f} ({spread})")
    print(json.dumps(found))
    for side in sides.values():
        side.batches.close()


if __name__ == "__main__":
    main()
