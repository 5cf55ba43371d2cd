"""The PyTorch side of `emollama bench data`: a `DataLoader` over a `Dataset` that reads with PyAV.

Started by `emollama_jax/bench/data.py` in a process of its own: reads one JSON request a line,
answers with one line. `build` describes the work; `measure` is a number of batches, answered with
the frames per second that the loader gave.

Written as people write it: every frame up to the last wanted one is decoded, `to_image` makes the
wanted ones pictures, Pillow resizes and crops them, and workers are processes that hand tensors
over in shared memory. The prompt's tokens come from the package's own functions, on both sides.
"""

import json
import pathlib
import sys
import time

import av
import numpy as np
import torch
from PIL import Image

from emollama_jax import config
from emollama_jax.data import prompts
from emollama_jax.data.chat import open_chat
from emollama_jax.data.face_crop import crop_box
from emollama_jax.data.tokenizers import load_tokenizer


def segments(count: int, wanted: int, rng: np.random.Generator | None) -> np.ndarray:
    """A random frame of each segment, or its centre."""
    edges = np.arange(wanted + 1) * count // wanted
    if rng is None:
        return ((np.arange(wanted) + 0.5) * (count / wanted)).astype(int)
    return rng.integers(edges[:-1], edges[1:])


def read(path: pathlib.Path, choose) -> tuple[list[Image.Image], np.ndarray]:
    """The wanted frames of a clip; `choose` gives their indices from the number of frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        wanted = choose(stream.frames)
        kept = {}
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                kept[index] = frame.to_image()
            if index == wanted[-1]:
                break
    return [kept[index] for index in wanted], wanted


def square(image: Image.Image, size: int) -> np.ndarray:
    """Shortest edge to `size`, centre crop."""
    short, long = min(image.size), max(image.size)
    other = int(size * long / short)
    width, height = (size, other) if image.width <= image.height else (other, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Clips(torch.utils.data.Dataset):
    """Clips of a folder as training examples."""

    def __init__(self, cfg: config.Config, folder: pathlib.Path, clips: int, length: int):
        self.cfg, self.folder, self.clips, self.length = cfg, folder, clips, length
        self.chat = open_chat(cfg)
        self.question = load_tokenizer(cfg.data.question_tokenizer)
        self.priors = [dict(np.load(folder / f"{i}.npz")) for i in range(clips)]
        self.items = [json.loads((folder / f"{i}.json").read_text()) for i in range(clips)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        index = number % self.clips
        return self.example(index, np.random.default_rng(number))

    def example(self, index: int, rng: np.random.Generator | None) -> dict[str, torch.Tensor]:
        data, model = self.cfg.data, self.cfg.model
        prior = self.priors[index]
        images, chosen = read(
            self.folder / f"{index}.mp4", lambda count: segments(count, data.clip_frames, rng)
        )
        faces = []
        for image, place in zip(images, chosen, strict=True):
            box = prior["boxes"][place]
            crop = crop_box(box, data.face_margin, width=image.width, height=image.height)
            corners = (crop.x, crop.y, crop.x + crop.width, crop.y + crop.height)
            side = model.face.swin.image_size
            faces.append(np.asarray(image.crop(corners).resize((side, side), Image.BICUBIC)))
        turns = prompts.read_turns(self.items[index][0])
        agr = prompts.agr_sentence(
            kind="clip",
            age=int(prior["agr"][0]),
            gender=int(prior["agr"][1]),
            race=int(prior["agr"][2]),
            probability=prior["agr_probability"].tolist(),
            threshold=data.agr_threshold,
            race_labels=model.face.race_labels,
        )
        text = prompts.build_training(
            turns,
            n_visual=data.clip_frames * model.tokens_per_frame,
            agr=agr if data.agr else "",
            chat=self.chat,
            text_length=data.clip_text_length,
        )
        question, mask = prompts.encode_question(
            turns[0].question, tokenizer=self.question, length=data.question_length
        )
        arrays = {
            "frames": np.stack([square(image, model.vision.image_size) for image in images]),
            "faces": np.stack(faces),
            "face_found": prior["found"][chosen],
            "landmarks": prior["landmarks"][chosen],
            "ids": text.ids,
            "labels": text.labels,
            "length": np.array(text.length),
            "questions": question,
            "question_mask": mask,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def speed(dataset: Clips, *, batch: int, workers: int, warm: int, batches: int) -> float:
    """Frames per second of a loader, its first batches left out."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=workers)
    iterator = iter(loader)
    for _ in range(warm):
        next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - began
    del iterator
    return batches * batch * dataset.cfg.data.clip_frames / seconds


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "build":
            work, cfg = request, config.from_dict(request["config"], origin="bench data")
            folder = pathlib.Path(work["folder"])
            dataset, answer = Clips(cfg, folder, work["clips"], length=1_000_000), {}
        else:
            found = speed(
                dataset,
                batch=cfg.train.clip_batch,
                workers=work["workers"],
                warm=work["warm"],
                batches=request["batches"],
            )
            answer = {"speed": found}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
