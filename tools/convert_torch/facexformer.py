"""FaceXFormer's weight table, for the release's `ckpts/model.pt` (Kartik-3004/facexformer).

The whole network lies in the file under `state_dict_backbone`, beside an optimizer's state. Paths
start at `face/`, as in `EmoLlama`. Swin's last LayerNorm and its index buffers are not read: the
outputs do not depend on the first, the second follow from the window. `unread` gives them back for
an export that PyTorch loads with `strict=True`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from emollama_jax.config import FaceXFormerConfig, SwinConfig
from emollama_jax.errors import UserError
from emollama_jax.models.facexformer import TASKS
from emollama_jax.models.swin import relative_index
from tools.convert_torch.engine import PATCHES, SAME, Row, Transform, linear, norm

CHECKPOINT_KEY = "state_dict_backbone"
IGNORE = {
    r"backbone\.1\.(weight|bias)": "Swin's last LayerNorm: its result is thrown away",
    r".*\.attn\.relative_position_index": "buffer: follows from the window",
}
POINTWISE = Transform(  # 1×1 convolution: [out, in, 1, 1], ours [in, out]
    "pointwise", lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[:, :, None, None]
)
UPSCALE = Transform(  # transposed convolution: [in, out, 2, 2], ours [in, 2, 2, out]
    "upscale", lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2)
)


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict inside a loaded release file, or the state dict itself.

    Raises:
        UserError: neither of them.
    """
    state = checkpoint.get(CHECKPOINT_KEY, checkpoint)
    if "linear_fuse.weight" not in state:
        raise UserError(
            f"not a FaceXFormer checkpoint: it holds {', '.join(sorted(map(str, state))[:5])}; "
            f"wanted the release's model.pt with {CHECKPOINT_KEY!r}, or the bare state dict"
        )
    return state


def swin(cfg: SwinConfig, *, torch: str = "backbone.0", path: str = "face/swin") -> list[Row]:
    """torchvision's `swin_*.features` under the key prefix `torch`."""
    rows = [
        Row(f"{torch}.0.0.weight", f"{path}/patch_embed/kernel", PATCHES),
        Row(f"{torch}.0.0.bias", f"{path}/patch_embed/bias"),
        *norm(f"{torch}.0.2", f"{path}/patch_norm"),
    ]
    for stage in range(len(cfg.depths)):
        for first, which in enumerate(("unshifted", "shifted")):
            theirs = f"{torch}.{2 * stage + 1}.{{i}}"
            ours = f"{path}/stages/{stage}/pairs/{which}"
            numbering = {"first": first, "stride": 2}
            table = "attn.relative_position_bias_table"
            rows += [
                *norm(f"{theirs}.norm1", f"{ours}/norm1", **numbering),
                Row(f"{theirs}.{table}", f"{ours}/{table.replace('.', '/')}", SAME, **numbering),
                *linear(f"{theirs}.attn.qkv", f"{ours}/attn/qkv", bias=True, **numbering),
                *linear(f"{theirs}.attn.proj", f"{ours}/attn/proj", bias=True, **numbering),
                *norm(f"{theirs}.norm2", f"{ours}/norm2", **numbering),
                *linear(f"{theirs}.mlp.0", f"{ours}/fc1", bias=True, **numbering),
                *linear(f"{theirs}.mlp.3", f"{ours}/fc2", bias=True, **numbering),
            ]
        if stage > 0:
            merging = f"{path}/stages/{stage}/downsample"
            rows += norm(f"{torch}.{2 * stage}.norm", f"{merging}/norm")
            rows += linear(f"{torch}.{2 * stage}.reduction", f"{merging}/reduction", bias=False)
    return rows


def two_way_transformer(
    depth: int,
    *,
    torch: str = "face_decoder.transformer",
    path: str = "face/transformer",
) -> list[Row]:
    """The decoder's blocks and its last attention."""

    def attention(name: str) -> list[Row]:
        ours = name.replace(".", "/")
        return [
            row
            for part in ("q_proj", "k_proj", "v_proj", "out_proj")
            for row in linear(f"{torch}.{name}.{part}", f"{path}/{ours}/{part}", bias=True)
        ]

    rows = attention("final_attn_token_to_image")
    rows += norm(f"{torch}.norm_final_attn", f"{path}/norm_final_attn")
    for index in range(depth):
        layer = f"layers.{index}"
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            rows += attention(f"{layer}.{name}")
        for k in range(1, 5):
            rows += norm(f"{torch}.{layer}.norm{k}", f"{path}/layers/{index}/norm{k}")
        for name in ("lin1", "lin2"):
            rows += linear(
                f"{torch}.{layer}.mlp.{name}", f"{path}/layers/{index}/{name}", bias=True
            )
    return rows


def facexformer(cfg: FaceXFormerConfig) -> list[Row]:
    """The whole release."""

    def head(torch: str, path: str) -> list[Row]:
        return [
            row
            for k in range(3)
            for row in linear(f"{torch}.layers.{k}", f"{path}/layers/{k}", bias=True)
        ]

    decoder = "face_decoder"
    rows = [
        *swin(cfg.swin),
        Row("pe_layer.positional_encoding_gaussian_matrix", "face/pe"),
        Row("linear_fuse.weight", "face/linear_fuse/kernel", POINTWISE),
        Row(f"{decoder}.mask_tokens.weight", "face/mask_tokens"),
        *two_way_transformer(cfg.decoder_depth),
        Row(f"{decoder}.output_upscaling.0.weight", "face/upscale1/kernel", UPSCALE),
        Row(f"{decoder}.output_upscaling.0.bias", "face/upscale1/bias"),
        *norm(f"{decoder}.output_upscaling.1", "face/upscale_norm"),
        Row(f"{decoder}.output_upscaling.3.weight", "face/upscale2/kernel", UPSCALE),
        Row(f"{decoder}.output_upscaling.3.bias", "face/upscale2/bias"),
        *head(f"{decoder}.output_hypernetwork_mlps", "face/hypernetwork"),
    ]
    for index in range(len(cfg.swin.depths)):
        rows += linear(f"linear_c.{index}.proj", f"face/linear_c/{index}", bias=True)
    for task in TASKS:
        rows.append(Row(f"{decoder}.{task}_token.weight", f"face/tokens/{task}"))
        rows += head(f"{decoder}.{task}_prediction_head", f"face/heads/{task}")
    return rows


def unread(cfg: FaceXFormerConfig) -> dict[str, np.ndarray]:
    """Entries of the original's state dict beyond our parameters: index buffers, the dead norm."""
    index = relative_index(cfg.swin.window).reshape(-1)
    tensors = {
        f"backbone.0.{2 * stage + 1}.{block}.attn.relative_position_index": index.astype(np.int64)
        for stage, depth in enumerate(cfg.swin.depths)
        for block in range(depth)
    }
    last = cfg.swin.width * 2 ** (len(cfg.swin.depths) - 1)
    tensors["backbone.1.weight"] = np.ones(last, np.float32)
    tensors["backbone.1.bias"] = np.zeros(last, np.float32)
    return tensors
