"""The key-value cache of a decode: its static size, and the prefill that fills the prompts in.

A cache has S = T + N slots: T for the padded prompts, N for new tokens. A token's slot is its
position, so a row's first new token overwrites that row's first padding slot. Two prompts, of
five and of three tokens, padded to T = 5, with N = 3:

    slot          0   1   2   3   4 | 5   6   7
    prefill       a   b   c   d   e | ·   ·   ·        · zeros
                  f   g   h   _   _ | ·   ·   ·        _ keys of padding, never looked at
    1st token     a   b   c   d   e | A   ·   ·        A sees slots 0 … 5
                  f   g   h   F   _ | ·   ·   ·        F sees slots 0 … 3
    2nd token     a   b   c   d   e | A   B   ·
                  f   g   h   F   G | ·   ·   ·

A query sees the slots up to its own, and those all hold real tokens by then: no mask has to
remember the padding, and what a row answers does not depend on how far its neighbours made it pad.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from emollama_jax.config import LlamaConfig
from emollama_jax.generate.prompt import Prompt
from emollama_jax.models.llama import KVCache, Llama


def init_cache(cfg: LlamaConfig, *, rows: int, slots: int) -> KVCache:
    """An empty cache, keys and values [L, rows, slots, K·H] in the decoder's dtype."""
    shape = (cfg.layers, rows, slots, cfg.kv_heads * cfg.head_dim)
    return KVCache(k=jnp.zeros(shape, cfg.dtype), v=jnp.zeros(shape, cfg.dtype))


def prefill(llama: Llama, prompt: Prompt, *, extra: int) -> tuple[KVCache, Float[Array, "b d"]]:
    """Runs the prompts once.

    Args:
        llama: the decoder.
        prompt: prompt of T tokens, padding included.
        extra: slots to keep for tokens to come.

    Returns:
        The cache with T + extra slots, and the hidden state of each prompt's last token.
    """
    rows, width = prompt.embeds.shape[:2]
    cache = init_cache(llama.cfg, rows=rows, slots=width + extra)
    out = llama(prompt.embeds, cache=cache)
    last = (prompt.length - 1)[:, None, None]
    return out.cache, jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
