"""What a decoder layer keeps for its backward pass, by name; all else is run again there.

A layer names what it computes (`jax.ad_checkpoint.checkpoint_name`), and a policy says which of the
names stay on the device, and which wait in the host's memory. Words and sets are MaxText's
(`remat_policy` in its `configs/types.py`, August 2026); names are ours:

    q_proj, k_proj      queries and keys, rotated
    v_proj              values
    attention           its result, and what its backward pass makes its weights from
    o_proj              its output
    gate_proj, up_proj  their outputs
    down_proj           its output, which no backward pass reads: it is never kept
"""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax

from emollama_jax.config import LlamaConfig, Remat
from emollama_jax.errors import UserError
from emollama_jax.terms import Kept, LlamaRemat


@dataclasses.dataclass(frozen=True)
class Policy:
    """Names of what is kept on the device, and of what is kept on the host."""

    keep: tuple[Kept, ...] = ()
    offload: tuple[Kept, ...] = ()

    def keeps_more_than(self, other: "Policy") -> bool:
        """Whether it keeps all on the device that another does."""
        return set(self.keep) >= set(other.keep)


QKV: tuple[Kept, ...] = ("q_proj", "k_proj", "v_proj")
PRODUCTS: tuple[Kept, ...] = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
POLICIES: dict[LlamaRemat, Policy] = {  # the most thrifty first
    "full": Policy(),
    "minimal_offloaded": Policy(offload=PRODUCTS),
    "qkv_proj_offloaded": Policy(offload=QKV),
    "save_out_proj": Policy(("o_proj",)),
    "save_qkv_proj": Policy(QKV),
    "save_dot_except_mlp": Policy((*QKV, "o_proj")),
    "save_dot_with_context_except_mlp": Policy((*QKV, "attention", "o_proj")),
    "minimal": Policy(PRODUCTS),
    "minimal_with_context": Policy((*PRODUCTS, "attention")),
}


def policy_of(cfg: LlamaConfig) -> Remat | Policy:
    """The policy of a decoder's layers: that of its word, with `remat_keep` and `remat_offload`.

    Raises:
        UserError: names beside a word that has no names, or a name in both lists.
    """
    named = cfg.remat_keep + cfg.remat_offload
    if cfg.remat not in POLICIES:
        if named:
            raise UserError(
                f"model.llama: remat {cfg.remat} beside names to keep or offload "
                f"({', '.join(named)}): set remat=full to keep these alone"
            )
        return cfg.remat
    both = set(cfg.remat_keep) & set(cfg.remat_offload)
    if both:
        raise UserError(
            f"model.llama: {', '.join(sorted(both))} both in remat_keep and in remat_offload: "
            "leave it in one of them"
        )
    of_word = POLICIES[cfg.remat]

    def chosen(names: tuple[Kept, ...], but: tuple[Kept, ...]) -> tuple[Kept, ...]:
        return tuple(name for name in get_args(Kept) if name in names and name not in but)

    return Policy(
        keep=chosen(of_word.keep + cfg.remat_keep, cfg.remat_offload),
        offload=chosen(of_word.offload + cfg.remat_offload, cfg.remat_keep),
    )


def keeps(policy: Remat | Policy, name: Kept) -> bool:
    """Whether something is there in the backward pass, and not run again."""
    if isinstance(policy, Policy):
        return name in policy.keep + policy.offload
    return policy == "none"


def checkpointed(body: Callable[..., Any], policy: Remat | Policy) -> Callable[..., Any]:
    """A scanned layer's function, under a policy.

    Args:
        body: function of one layer.
        policy: "none" keeps all activations, "dots" matrix products, "full" nothing.
    """
    if policy == "none":
        return body
    names = jax.checkpoint_policies
    if policy == "dots":
        how = names.dots_with_no_batch_dims_saveable
    elif policy == "full" or policy == Policy():
        how = None
    elif not policy.offload:
        how = names.save_only_these_names(*policy.keep)
    else:
        how = names.save_and_offload_only_these_names(
            names_which_can_be_saved=policy.keep,
            names_which_can_be_offloaded=policy.offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(body, prevent_cse=False, policy=how)  # scan keeps the two passes apart
