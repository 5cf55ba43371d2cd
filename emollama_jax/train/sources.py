"""`emollama train CONFIG --data own/mine`: what a config must say about data, found in the data.

The kind is what is prepared, the split is "train", sets are mixed by their number of examples, and
conversations are read where `emollama data instruct` made some. A text length that the set's
category question does not fit into is raised, and packed rows are fitted to what the sets hold.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from emollama_jax.config import Config, SourceConfig
from emollama_jax.data import prompts
from emollama_jax.data.elements import Encoder
from emollama_jax.data.face_labels import AGE_LABELS, GENDER_LABELS, RACE_LABELS
from emollama_jax.data.items import category_item
from emollama_jax.data.lengths import fitted
from emollama_jax.data.split import Split, space_of
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

SPLIT = "train"
MULTIPLE = 8  # that raised text lengths are rounded up to


def use(cfg: Config, names: Sequence[str]) -> tuple[Config, list[str]]:
    """A config that trains on prepared sets in place of its own sources.

    Args:
        cfg: config whose `data.dir` holds them.
        names: names of the sets, e.g. "own/mine", "dfew/fold1".

    Returns:
        The config, and what was found, a line each.

    Raises:
        UserError: a set is not prepared, or has no training split.
    """
    if len(set(names)) < len(names):
        raise UserError(f"--data {' '.join(names)}: name each set once")
    sources, told = [], []
    for name in names:
        split = Split(cfg.data.dir, name, SPLIT)
        data, kind = split.examples, split.kind
        items = "both" if split.has_conversations else "category"
        sources.append(
            SourceConfig(name=name, split=SPLIT, kind=kind, weight=float(len(data)), items=items)
        )
        what = "pictures" if kind == "image" else "clips"
        talk = " and their conversations" if items == "both" else ""
        told.append(f"data: {name}, {len(data):,} {what} of its split {SPLIT!r}{talk}")
    total = sum(source.weight for source in sources)
    shares = tuple(dataclasses.replace(s, weight=s.weight / total) for s in sources)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=shares))
    for field, needed in _lengths(cfg).items():
        found = getattr(cfg.data, field)
        if needed > found:
            raised = -(-needed // MULTIPLE) * MULTIPLE
            told.append(f"data.{field}: raised from {found} to {raised}, for the class words")
            cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **{field: raised}))
    if cfg.data.packed is not None:
        packed = fitted(cfg)
        told.append(
            f"data.packed: {packed.examples} examples in a row of {packed.tokens} tokens and "
            f"{packed.frames} frames"
        )
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packed=packed))
    return cfg, told


def _lengths(cfg: Config) -> dict[str, int]:
    """Tokens that the longest category item of each kind takes, by the field that bounds them."""
    encoder = Encoder(cfg)
    needed: dict[str, int] = {}
    for source in cfg.data.sources:
        classes = space_of(cfg.data.dir, source.name).classes
        field = {"image": "text_length", "clip": "clip_text_length"}[source.kind]
        for label in range(len(classes)):
            turns = prompts.read_turns(category_item(classes, label, source.kind))
            encoded = prompts.build_training(
                turns,
                n_visual=encoder.visual(source.kind),
                agr=_longest_sentence(cfg, source.kind),
                chat=encoder.chat,
                text_length=cfg.model.llama.max_positions,
            )
            length = encoded.length + encoded.lost
            if length > cfg.model.llama.max_positions:
                raise UserError(
                    f"{source.name}: its category question takes {length} tokens, more than "
                    f"model.llama.max_positions = {cfg.model.llama.max_positions}: fewer or "
                    "shorter class names, or a larger model"
                )
            needed[field] = max(needed.get(field, 0), length)
    return needed


def _longest_sentence(cfg: Config, kind: Kind) -> str:
    """The longest that may be said of age, gender and race."""
    if not cfg.data.agr:
        return ""
    order = cfg.model.face.race_labels
    numbers = itertools.product(
        range(len(AGE_LABELS)), range(len(GENDER_LABELS)), range(len(RACE_LABELS[order]))
    )
    sentences = [
        prompts.agr_sentence(
            kind=kind,
            age=age,
            gender=gender,
            race=race,
            probability=(1.0, 1.0, 1.0),
            threshold=0.0,
            race_labels=order,
        )
        for age, gender, race in numbers
    ]
    return max(sentences, key=len)
