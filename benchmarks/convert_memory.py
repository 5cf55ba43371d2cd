"""Peak memory and speed of converting a LLaMA of 2 B parameters in four shards.

    PYTHONPATH=. python benchmarks/convert_memory.py --dir /some/disk

makes the checkpoint (once), then copies its files, converts it, and copies them again, in one run.
Both are timed until the bytes are on the disk. It prints both speeds, their ratio and the
converter's peak memory, and ends with status 1 where the peak is above the largest shard + 1.5 GB,
or the speed below 40 % of the copy's.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

WIDTH, MLP, LAYERS, HEADS, VOCAB = 2560, 6912, 24, 20, 32000
SHARDS = 4
ROOM = 1.5e9  # bytes of memory above the largest shard
SPEED = 0.4  # of a copy's
# Seconds before each timing. Memory that has just been freed is quick to fill again, on virtual
# machines several times quicker: without a pause, whoever comes first after a deletion wins.
PAUSE = 10


def shapes() -> dict[str, tuple[int, int] | tuple[int]]:
    """The state dict of the model, in a checkpoint's order."""
    found: dict[str, tuple[int, int] | tuple[int]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = (WIDTH,)
        found[f"{layer}.post_attention_layernorm.weight"] = (WIDTH,)
        for name in "qkvo":
            found[f"{layer}.self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        found[f"{layer}.mlp.gate_proj.weight"] = (MLP, WIDTH)
        found[f"{layer}.mlp.up_proj.weight"] = (MLP, WIDTH)
        found[f"{layer}.mlp.down_proj.weight"] = (WIDTH, MLP)
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def make(folder: pathlib.Path, kind: str) -> int:
    """Writes the checkpoint, if it is not there; returns its number of parameters."""
    sizes = {key: int(np.prod(shape)) for key, shape in shapes().items()}
    total = sum(sizes.values())
    if (folder / "config.json").is_file():
        return total
    folder.mkdir(parents=True)
    suffix, stem = {"safetensors": (".safetensors", "model"), "bin": (".bin", "pytorch_model")}[
        kind
    ]
    noise = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
    noise = np.resize(noise.astype(ml_dtypes.bfloat16), max(sizes.values()) + 4096)
    shard: dict[str, np.ndarray] = {}
    where, number, held = {}, 1, 0
    for index, (key, shape) in enumerate(shapes().items()):
        start = index % 4096
        shard[key] = noise[start : start + sizes[key]].reshape(shape)
        held += sizes[key]
        if held >= total * number / SHARDS or index == len(sizes) - 1:
            name = f"{stem}-{number:05d}-of-{SHARDS:05d}{suffix}"
            save(shard, folder / name)
            where |= dict.fromkeys(shard, name)
            shard, number = {}, number + 1
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    settings = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return total


def save(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """One shard."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path)
        return
    import torch

    torch.save(
        {
            key: torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16)
            for key, value in tensors.items()
        },
        path,
    )


def copy(files: list[pathlib.Path], folder: pathlib.Path) -> float:
    """Seconds to copy files to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    time.sleep(PAUSE)
    start = time.monotonic()
    for file in files:
        shutil.copyfile(file, folder / file.name)
        with (folder / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(folder)
    return seconds


def convert(source: pathlib.Path, out: pathlib.Path) -> tuple[float, int]:
    """Seconds of the converter's own process, and its peak memory in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tools.convert_torch", "llama"]
    time.sleep(PAUSE)
    start = time.monotonic()
    subprocess.run([*command, "--src", str(source), "--out", str(out)], check=True)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(out)
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="a folder with 14 GB free")
    parser.add_argument("--kind", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--rounds", type=int, default=3, help="of copying and converting")
    arguments = parser.parse_args()
    source = arguments.dir / f"llama_2b_{arguments.kind}"
    parameters = make(source, arguments.kind)
    files = sorted(file for file in source.iterdir() if file.suffix != ".json")
    size, largest = (f(file.stat().st_size for file in files) for f in (sum, max))
    print(f"{parameters / 1e9:.2f} B parameters, {len(files)} files, {size / 1e9:.2f} GB")
    ratios, peaks = [], []
    for _ in range(arguments.rounds):
        before = copy(files, arguments.dir / "copy")
        seconds, peak = convert(source, arguments.dir / "converted")
        after = copy(files, arguments.dir / "copy")
        copied = size / ((before + after) / 2)
        ratios.append(size / seconds / copied)
        peaks.append(peak)
        print(
            f"copy {copied / 1e9:.2f} GB/s ({before:.1f} and {after:.1f} s), convert "
            f"{size / seconds / 1e9:.2f} GB/s ({seconds:.1f} s): {ratios[-1]:.0%}; peak memory "
            f"{peak / 1e9:.2f} GB"
        )
    ratio, peak = statistics.median(ratios), max(peaks)
    print(f"median speed {ratio:.0%} of a copy's (wanted {SPEED:.0%})")
    print(f"peak {peak / 1e9:.2f} GB (wanted below {(largest + ROOM) / 1e9:.2f} GB)")
    sys.exit(0 if ratio >= SPEED and peak < largest + ROOM else 1)


if __name__ == "__main__":
    main()
