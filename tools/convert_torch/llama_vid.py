"""Weight tables of LLaMA-VID: LLaMA, EVA-ViT, Q-Former and what stands between them.

Keys are those of a full fine-tuned checkpoint. Paths are those of `EmoLlama`: `llama`, `vision`,
`qformer`, `visual_tokens`.
"""

from tools.convert_torch.engine import (
    PATCHES,
    QKV,
    TRANSPOSE,
    Row,
    drop_leading,
    linear,
    norm,
)

IGNORE = {
    r".*\.rotary_emb\.inv_freq": "buffer: follows from rope_theta",
    r".*\.embeddings\.position_ids": "buffer: 0, 1, 2, …",
}
KEEP = {
    r".*/lora_[AB]": "adapters are not part of the base weights",
    r"(fim|face)/.*": "LLaMA-VID has no face network",
}


def llama(prefix: str = "") -> list[Row]:
    """LLaMA as `transformers` names it; `prefix` as in "language_model."."""
    layer = f"{prefix}model.layers.{{i}}"
    ours = "llama/layers"
    rows = [
        Row(f"{prefix}model.embed_tokens.weight", "llama/embed_tokens"),
        Row(f"{prefix}model.norm.weight", "llama/norm/scale"),
        Row(f"{prefix}lm_head.weight", "llama/lm_head/kernel", TRANSPOSE),
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Row(f"{layer}.{name}.weight", f"{ours}/{name}/scale"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += linear(f"{layer}.self_attn.{name}", f"{ours}/{name}", bias=False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += linear(f"{layer}.mlp.{name}", f"{ours}/{name}", bias=False)
    return rows


def eva_vit(prefix: str = "") -> list[Row]:
    """EVA-ViT; no prefix in `eva_vit_g.pth`, "model.vision_tower.vision_tower." in LLaMA-VID."""
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


def qformer(cross_attention_every: int, *, prefix: str = "model.vlm_att_encoder.") -> list[Row]:
    """The Q-Former without its queries, e.g. of InstructBLIP (prefix "Qformer.")."""
    embeddings = f"{prefix}bert.embeddings"
    rows = [
        Row(f"{embeddings}.word_embeddings.weight", "qformer/word_embeddings"),
        Row(f"{embeddings}.position_embeddings.weight", "qformer/position_embeddings"),
        *norm(f"{embeddings}.LayerNorm", "qformer/norm"),
    ]
    for k in range(cross_attention_every):
        layer = f"{prefix}bert.encoder.layer.{{i}}"
        ours = "qformer/groups/" + ("cross" if k == 0 else f"plain/{k - 1}")
        numbering = {"first": k, "stride": cross_attention_every}
        for name in ("attention", "crossattention") if k == 0 else ("attention",):
            for part in ("query", "key", "value"):
                rows += linear(
                    f"{layer}.{name}.self.{part}", f"{ours}/{name}/{part}", bias=True, **numbering
                )
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


def visual_tokens(prefix: str = "model.") -> list[Row]:
    """Queries, norm and projectors: with the Q-Former, all of stage 1's `mm_projector.bin`."""
    ours = "visual_tokens"
    rows = [
        Row(f"{prefix}vlm_att_query", "qformer/query", drop_leading(1)),
        *norm(f"{prefix}vlm_att_ln", f"{ours}/ln"),
        *linear(f"{prefix}mm_projector.0", f"{ours}/mm_projector_in", bias=True),
        *linear(f"{prefix}mm_projector.2", f"{ours}/mm_projector_out", bias=True),
    ]
    for name in ("projector", "key_projector", "val_projector"):
        rows += linear(f"{prefix}vlm_att_{name}", f"{ours}/{name}", bias=True)
    return rows


def llama_vid(cross_attention_every: int) -> list[Row]:
    """A full LLaMA-VID checkpoint."""
    return [
        *llama(),
        *eva_vit("model.vision_tower.vision_tower."),
        *qformer(cross_attention_every),
        *visual_tokens(),
    ]
