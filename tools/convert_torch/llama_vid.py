"""Weight tables of LLaMA-VID: LLaMA, EVA-ViT, Q-Former and the projections between them.

Each network has the names of the checkpoint that it is published in: LLaMA those of `transformers`;
EVA-ViT those of LAVIS (which LLaMA-VID keeps) or of `transformers`' BLIP-2; the Q-Former those of
LAVIS, of LLaMA-VID, or of `transformers`' InstructBLIP and BLIP-2. Paths are those of `EmoLlama`:
`llama`, `vision`, `qformer`, `visual_tokens`.
"""

from dataclasses import dataclass

from emollama_jax.config import LlamaConfig
from tools.convert_torch.engine import (
    PATCHES,
    QKV,
    QV_BIAS,
    Row,
    drop_leading,
    linear,
    norm,
    vocabulary,
)

BUFFERS = {
    r".*\.rotary_emb\.inv_freq": "buffer: follows from rope_theta",
    r".*embeddings\.position_ids": "buffer: 0, 1, 2, …",
}
TIED = {r"(.*\.)?lm_head\.weight": "tied: the same as the embedding"}
KEEP = {
    r".*/lora_[AB]": "adapters are not part of the base weights",
    r"(fim|face)/.*": "LLaMA-VID has no face network",
}
TOWER = "model.vision_tower.vision_tower."  # of EVA-ViT in a LLaMA-VID checkpoint


def llama(cfg: LlamaConfig, *, model: str = "model.", head: str = "lm_head.") -> list[Row]:
    """LLaMA as `transformers` names it; `model` and `head` are what its keys begin with."""
    layer = f"{model}layers.{{i}}"
    ours = "llama/layers"
    sizes = (cfg.vocab_size, cfg.vocab_rows)
    rows = [
        Row(
            f"{model}embed_tokens.weight",
            "llama/embed_tokens",
            vocabulary(*sizes, transposed=False),
        ),
        Row(f"{model}norm.weight", "llama/norm/scale"),
    ]
    if not cfg.tied:
        lm_head = vocabulary(*sizes, transposed=True)
        rows.append(Row(f"{head}weight", "llama/lm_head/kernel", lm_head))
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Row(f"{layer}.{name}.weight", f"{ours}/{name}/scale"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += linear(f"{layer}.self_attn.{name}", f"{ours}/{name}", bias=False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += linear(f"{layer}.mlp.{name}", f"{ours}/{name}", bias=False)
    return rows


def eva_vit(prefix: str = "") -> list[Row]:
    """EVA-ViT as LAVIS names it; no prefix in `eva_vit_g.pth`, `TOWER` in LLaMA-VID."""
    block = f"{prefix}blocks.{{i}}"
    ours = "vision/blocks"
    return [
        Row(f"{prefix}cls_token", "vision/cls_token", drop_leading(2)),
        Row(f"{prefix}pos_embed", "vision/pos_embed", drop_leading(1)),
        Row(f"{prefix}patch_embed.proj.weight", "vision/patch_embed/kernel", PATCHES),
        Row(f"{prefix}patch_embed.proj.bias", "vision/patch_embed/bias"),
        *norm(f"{block}.norm1", f"{ours}/norm1"),
        Row(f"{block}.attn.qkv.weight", f"{ours}/attn/qkv", QKV),
        Row(f"{block}.attn.q_bias", f"{ours}/attn/q_bias"),
        Row(f"{block}.attn.v_bias", f"{ours}/attn/v_bias"),
        *linear(f"{block}.attn.proj", f"{ours}/attn/proj", bias=True),
        *norm(f"{block}.norm2", f"{ours}/norm2"),
        *linear(f"{block}.mlp.fc1", f"{ours}/fc1", bias=True),
        *linear(f"{block}.mlp.fc2", f"{ours}/fc2", bias=True),
    ]


def eva_vit_transformers(prefix: str = "vision_model.") -> list[Row]:
    """EVA-ViT as `transformers`' BLIP-2 and InstructBLIP name it."""
    block = f"{prefix}encoder.layers.{{i}}"
    ours = "vision/blocks"
    embeddings = f"{prefix}embeddings"
    biases = (f"{ours}/attn/q_bias", f"{ours}/attn/v_bias")
    return [
        Row(f"{embeddings}.class_embedding", "vision/cls_token", drop_leading(2)),
        Row(f"{embeddings}.position_embedding", "vision/pos_embed", drop_leading(1)),
        Row(f"{embeddings}.patch_embedding.weight", "vision/patch_embed/kernel", PATCHES),
        Row(f"{embeddings}.patch_embedding.bias", "vision/patch_embed/bias"),
        *norm(f"{block}.layer_norm1", f"{ours}/norm1"),
        Row(f"{block}.self_attn.qkv.weight", f"{ours}/attn/qkv", QKV),
        Row(f"{block}.self_attn.qkv.bias", biases, QV_BIAS),
        *linear(f"{block}.self_attn.projection", f"{ours}/attn/proj", bias=True),
        *norm(f"{block}.layer_norm2", f"{ours}/norm2"),
        *linear(f"{block}.mlp.fc1", f"{ours}/fc1", bias=True),
        *linear(f"{block}.mlp.fc2", f"{ours}/fc2", bias=True),
    ]


@dataclass(frozen=True)
class QFormerNames:
    """A checkpoint's names for the parts of a Q-Former."""

    embeddings: str  # word and position embeddings
    norm: str  # after them
    layers: str
    inner: str  # of an attention: its query, key and value
    query: str  # the learned queries
    vision_norm: str  # of the vision tokens that it reads


LAVIS = QFormerNames(
    embeddings="Qformer.bert.embeddings",
    norm="Qformer.bert.embeddings.LayerNorm",
    layers="Qformer.bert.encoder.layer",
    inner="self",
    query="query_tokens",
    vision_norm="ln_vision",
)
LLAMA_VID = QFormerNames(
    embeddings="model.vlm_att_encoder.bert.embeddings",
    norm="model.vlm_att_encoder.bert.embeddings.LayerNorm",
    layers="model.vlm_att_encoder.bert.encoder.layer",
    inner="self",
    query="model.vlm_att_query",
    vision_norm="model.vlm_att_ln",
)
INSTRUCT_BLIP = QFormerNames(
    embeddings="qformer.embeddings",
    norm="qformer.embeddings.layernorm",
    layers="qformer.encoder.layer",
    inner="attention",
    query="query_tokens",
    vision_norm="vision_model.post_layernorm",
)
BLIP2 = QFormerNames(
    embeddings="embeddings",
    norm="qformer.layernorm",
    layers="qformer.encoder.layer",
    inner="attention",
    query="query_tokens",
    vision_norm="vision_model.post_layernorm",
)


def qformer(every: int, names: QFormerNames, *, prefix: str = "") -> list[Row]:
    """The Q-Former with its queries and the norm of what it reads.

    Args:
        every: cross-attention in every n-th layer.
        names: key names of the checkpoint.
        prefix: before all of them.
    """
    rows = [
        Row(f"{prefix}{names.embeddings}.word_embeddings.weight", "qformer/word_embeddings"),
        Row(
            f"{prefix}{names.embeddings}.position_embeddings.weight", "qformer/position_embeddings"
        ),
        *norm(f"{prefix}{names.norm}", "qformer/norm"),
        Row(f"{prefix}{names.query}", "qformer/query", drop_leading(1)),
        *norm(f"{prefix}{names.vision_norm}", "visual_tokens/ln"),
    ]
    for k in range(every):
        layer = f"{prefix}{names.layers}.{{i}}"
        ours = "qformer/groups/" + ("cross" if k == 0 else f"plain/{k - 1}")
        numbering = {"first": k, "stride": every}
        for name in ("attention", "crossattention") if k == 0 else ("attention",):
            for part in ("query", "key", "value"):
                theirs = f"{layer}.{name}.{names.inner}.{part}"
                rows += linear(theirs, f"{ours}/{name}/{part}", bias=True, **numbering)
            output = f"{layer}.{name}.output"
            rows += linear(f"{output}.dense", f"{ours}/{name}/dense", bias=True, **numbering)
            rows += norm(f"{output}.LayerNorm", f"{ours}/{name}/norm", **numbering)
        for ffn, suffix in (("query_ffn", "_query"), ("text_ffn", "")):
            for part in ("intermediate", "output"):
                rows += linear(
                    f"{layer}.{part}{suffix}.dense", f"{ours}/{ffn}/{part}", bias=True, **numbering
                )
            rows += norm(f"{layer}.output{suffix}.LayerNorm", f"{ours}/{ffn}/norm", **numbering)
    return rows


def projectors(prefix: str = "model.") -> list[Row]:
    """With the Q-Former's rows, all of stage 1's `mm_projector.bin`."""
    ours = "visual_tokens"
    rows = [
        *linear(f"{prefix}mm_projector.0", f"{ours}/mm_projector_in", bias=True),
        *linear(f"{prefix}mm_projector.2", f"{ours}/mm_projector_out", bias=True),
    ]
    for name in ("projector", "key_projector", "val_projector"):
        rows += linear(f"{prefix}vlm_att_{name}", f"{ours}/{name}", bias=True)
    return rows


def llama_vid(cfg: LlamaConfig, every: int) -> list[Row]:
    """A full LLaMA-VID checkpoint; cross-attention in every n-th layer of its Q-Former."""
    return [
        *llama(cfg),
        *eva_vit(TOWER),
        *qformer(every, LLAMA_VID),
        *projectors(),
    ]
