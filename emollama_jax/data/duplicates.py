"""Items of a split that stand in another split too, by their name or by the content of their media.

A model that was trained on one of them has seen it. Digests of the media are in the index that
preparation wrote, so nothing is decoded.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath

from emollama_jax.data.builders.registry import open_split
from emollama_jax.data.index import read_index
from emollama_jax.errors import UserError


def also_in(data_dir: epath.PathLike, name: str, split: str, other: str) -> Sequence[str]:
    """The names of a split's items that stand in another one, in the split's order.

    More names than `emollama data inspect` counts where one content stands twice in the split.

    Args:
        data_dir: where sets are prepared.
        name: of the set.
        split: of it.
        other: another split of it.

    Raises:
        UserError: not prepared, no such split, or the same one.
    """
    if split == other:
        raise UserError(f"--without {other}: it is the tested split itself: name another")
    here, there = (
        read_index(data_dir, name, part, open_split(data_dir, name, part))
        for part in (split, other)
    )
    twice = np.isin(here.digests, there.digests) | np.isin(here.ids, there.ids)
    return [here.ids[n] for n in np.flatnonzero(twice)]
