"""Every setting of a run as frozen dataclasses: YAML in, typed overrides, unknown keys refused.

The model sections hold no defaults: what a network computes is written out in `configs/*.yaml`.
"""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Literal, dataclass_transform

import pydantic
import yaml
from pydantic import dataclasses as pydantic_dataclasses

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Branches = Literal["both", "global", "local", "none"]
Attention = Literal["xla", "auto", "splash", "cudnn"]  # see models/attention.py
RUN_SECTIONS = ("mesh", "distributed", "generate")  # that a trained run may be used with others
Preset = Literal["fsdp", "fsdp+tensor", "replicated-frozen"]  # see sharding/rules.py


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _config(cls):
    """A frozen dataclass whose fields are checked and that refuses unknown ones."""
    options = pydantic.ConfigDict(extra="forbid")
    return pydantic_dataclasses.dataclass(frozen=True, kw_only=True, config=options)(cls)


@_config
class LoraConfig:
    """Low-rank adapters on a network's Linear layers (Hu et al. 2021), named as PEFT names them."""

    rank: int  # 0: no adapters
    alpha: float  # the update is scaled by alpha / rank
    dropout: float
    targets: tuple[str, ...]  # leaf names, e.g. ("q_proj", "v_proj")


@_config
class LlamaConfig:
    """LLaMA / Vicuna decoder (`transformers` `LlamaConfig`, renamed to axis words)."""

    vocab_size: int  # the tokenizer's ids
    vocab_multiple: int  # embedding and head are padded to a multiple of it, for the mesh
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: float  # positions are divided by it; 1 for none (LLaMA-VID stage 3: 16)
    max_positions: int
    dtype: DType
    remat: Remat
    attention: Attention
    lora: LoraConfig

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and columns of the head, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@_config
class EvaVitConfig:
    """EVA-CLIP's ViT as LAVIS builds it: pre-norm, learned positions, no final norm."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    norm_eps: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    dtype: DType
    remat: Remat
    attention: Attention

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@_config
class QFormerConfig:
    """BERT with learned queries and cross-attention in every n-th layer (InstructBLIP)."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int
    encoder_width: int
    encoder_norm_eps: float  # of the norm over the vision tokens (LLaMA-VID's vlm_att_ln)
    cross_attention_every: int
    queries: int
    norm_eps: float
    dropout: float
    dtype: DType
    remat: Remat


@_config
class SwinConfig:
    """Swin v1 (torchvision `swin_b`)."""

    image_size: int
    patch_size: int
    width: int  # of stage 0; doubles at each stage
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp_ratio: int
    norm_eps: float


@_config
class FaceXFormerConfig:
    """FaceXFormer (Narayan et al. 2024): Swin, multi-scale fusion, two-way decoder, eight heads."""

    swin: SwinConfig
    width: int  # of the fused face map and the task tokens
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int
    attention_downsample: int  # of the cross-attentions' inner width
    upscale_widths: tuple[int, int]  # of the parsing head
    norm_eps: float
    parsing_norm_eps: float
    race_labels: Literal["measured", "as_published"]  # see docs/model.md
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    dtype: DType
    remat: Remat


@_config
class FaceInfoMiningConfig:
    """Face Info Mining: our choice of equations (docs/model.md), each part switchable."""

    branches: Branches
    heads: int
    head_dim: int
    pool: int  # the face map is pooled to pool × pool keys for the global branch
    fourier_bands: int  # of a landmark's position
    norm_eps: float


@_config
class EmoLlamaConfig:
    """The assembled model."""

    llama: LlamaConfig
    vision: EvaVitConfig
    qformer: QFormerConfig
    face: FaceXFormerConfig
    fim: FaceInfoMiningConfig
    content: str  # "all", "mean" or "grid:n": LLaMA-VID's content tokens
    frames_at_once: int  # frames of a device that pass the frozen towers together
    # The mesh axes over which the towers' frames are split: all of them, or "batch": those of the
    # batch alone, with the towers' heads and feed-forward over `tensor` as in the LLM.
    frames_over: Literal["mesh", "batch"]

    @property
    def content_tokens(self) -> int:
        """Content tokens of a frame. LLaMA-VID's `grid:g` is not always g × g (6 on 16 gives 8)."""
        if self.content == "all":
            return self.vision.patches
        if self.content == "mean":
            return 1
        side = self.vision.image_size // self.vision.patch_size
        n = int(self.content.removeprefix("grid:"))
        if n > side:
            raise UserError(
                f"model.content: {self.content}, but a frame has {side} × {side} patches: choose "
                f"grid:{side} or smaller, or all"
            )
        return (side // (side // n)) ** 2

    @property
    def face_tokens(self) -> int:
        """Face tokens of a frame: one for each branch of Face Info Mining."""
        return {"both": 2, "global": 1, "local": 1, "none": 0}[self.fim.branches]

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame: context, content, face."""
        return 1 + self.content_tokens + self.face_tokens

    @pydantic.field_validator("content")
    @classmethod
    def _content(cls, value: str) -> str:
        if value not in ("all", "mean"):
            kind, _, n = value.partition(":")
            if kind != "grid" or not n.isdigit() or int(n) < 2:
                raise ValueError(f"{value!r} is neither 'all' nor 'mean' nor 'grid:n' with n > 1")
        return value


@_config
class TokenizerConfig:
    """A tokenizer file. `tiny` names the one that the package carries."""

    kind: Literal["sentencepiece", "bpe", "bert"]
    path: str


@_config
class SourceConfig:
    """One data set of a mixture."""

    name: str  # builder and its config, e.g. "actionfaces/images"
    split: str
    kind: Literal["image", "clip"]
    weight: float
    items: Literal["category", "conversation", "both"] = "both"


@_config
class DataConfig:
    """What the pipeline reads and the static shapes it makes."""

    dir: str
    sources: tuple[SourceConfig, ...]
    clip_frames: int  # M of a clip batch; an image batch has M = 1
    sampling: Literal["segments", "fps"]
    fps: float  # of "fps" sampling
    pad_images: bool  # LLaMA-VID's image_aspect_ratio: pad
    text_length: int  # T of an image batch, visual tokens included
    clip_text_length: int  # T of a clip batch
    rounds: int  # R: human turns of a training prompt, each with its own visual tokens
    question_length: int  # L, tokens the Q-Former reads
    agr: bool  # the age-gender-race sentence
    agr_threshold: float  # attributes below this probability are left out of it
    face_margin: float  # of the face crop, as a share of the box (FaceXFormer: 0.5)
    workers: int  # Grain worker processes; 0 reads in the main process
    blank_share: float  # of training examples shown black, without a face: trains "no face"
    broken_share: float  # of media that may be unreadable before the run stops
    llm_tokenizer: TokenizerConfig
    question_tokenizer: TokenizerConfig


@_config
class MeshConfig:
    """How many devices along each axis; −1 in one of them takes all that are left."""

    data: int  # copies of the parameters; over several slices, a multiple of their number
    fsdp: int  # parts of the parameters and of the batch
    tensor: int  # parts of heads, feed-forward and vocabulary
    slices: int = 1  # TPU slices that the data-centre network joins
    preset: Preset = "fsdp+tensor"


@_config
class DistributedConfig:
    """How the processes of a run on several hosts find one another; see docs/cloud_tpu.md."""

    coordinator: str = "auto"  # "auto": as Cloud TPU, GKE or Slurm say; "none"; or "host:port"
    processes: int = 1  # with "host:port": how many there are,
    process_id: int = 0  # and which of them this is


@_config
class TrainConfig:
    steps: int
    seed: int
    image_batch: int  # examples of an image step, all hosts together
    clip_batch: int
    accumulation: int  # micro-batches of an optimizer step
    loss_chunk: int  # text positions whose logits exist together
    trainable: tuple[str, ...]  # regular expressions over parameter paths, "llama/.*lora_[AB]"
    learning_rate: float
    projector_learning_rate: float  # of what `projector` matches
    projector: tuple[str, ...]
    warmup: float  # share of the steps
    weight_decay: float
    b1: float
    b2: float
    clip_norm: float
    frozen_dtype: DType
    save_every: int
    keep: int
    log_every: int


@_config
class GenerateConfig:
    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    seed: int


@_config
class Config:
    """A whole run."""

    name: str
    model: EmoLlamaConfig
    data: DataConfig
    mesh: MeshConfig
    train: TrainConfig
    generate: GenerateConfig
    # What a run starts from: the package's tiny towers, random numbers, or imported weights: the
    # folders that `python -m tools.convert_torch` wrote, which may be several.
    weights: str | tuple[str, ...] = "none"
    # Flags of XLA for what trains and answers on a TPU, each "name=value", e.g.
    # "xla_tpu_enable_async_collective_fusion=true"; `emollama plan` shows what they change.
    xla: tuple[str, ...] = ()
    distributed: DistributedConfig = DistributedConfig()

    @pydantic.field_validator("weights")
    @classmethod
    def _weights(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str) and value not in ("tiny", "none"):
            raise ValueError(f"{value!r} is neither 'tiny' nor 'none' nor a list of folders")
        return value

    @pydantic.field_validator("xla")
    @classmethod
    def _xla(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for flag in value:
            if not re.fullmatch(r"\w+=\S+", flag):
                raise ValueError(f"{flag!r} is not name=value")
        return value

    @property
    def xla_flags(self) -> dict[str, str]:
        """`xla` as `jax.jit(compiler_options=…)` takes it."""
        return dict(flag.split("=", 1) for flag in self.xla)


def config_dir() -> pathlib.Path:
    """The folder of the named configs: inside an installed package, else the checkout's."""
    inside = pathlib.Path(__file__).parent / "configs"
    return inside if inside.is_dir() else pathlib.Path(__file__).parent.parent / "configs"


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config and applies `key=value` overrides.

    Args:
        name: a path, or the name of a file in `configs/` without its ending.
        overrides: "train.steps=200"; values are read as YAML and checked against the field's type.

    Raises:
        UserError: no such file, broken YAML, an unknown key, a value of the wrong type.
    """
    path = as_path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = as_path(config_dir() / f"{name}.yaml")
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in config_dir().glob("*.yaml")))
        raise UserError(f"{name}: no such config (known: {known}; or give a path to a .yaml file)")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    tree.setdefault("distributed", {})  # a section that files may leave out
    for override in overrides:
        _override(tree, override)
    return from_dict(tree, origin=str(name))


def how_to_run(overrides: Sequence[str]) -> DistributedConfig:
    """The section `distributed` of overrides of a trained run, before the run is read.

    Raises:
        UserError: an override of what training fixed, or a value of the wrong type.
    """
    for change in overrides:
        if change.split(".")[0] not in RUN_SECTIONS:
            raise UserError(
                f"{change}: training fixed this; only {', '.join(RUN_SECTIONS)} may change"
            )
    tree: dict[str, Any] = {"distributed": {}}
    for change in overrides:
        if change.startswith("distributed."):
            _override(tree, change)
    try:
        return DistributedConfig(**tree["distributed"])
    except pydantic.ValidationError as error:
        raise UserError("distributed: " + "; ".join(map(_explain, error.errors()))) from None


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A config with `key=value` overrides, as of `load`."""
    tree = to_dict(config)
    for change in overrides:
        _override(tree, change)
    return from_dict(tree, origin=config.name)


def from_dict(tree: dict[str, Any], *, origin: str) -> Config:
    """Checks a plain tree, e.g. of a YAML file or a checkpoint, and makes the config."""
    try:
        return pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(map(_explain, error.errors()))) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The plain tree that `from_dict` reads back."""
    return dataclasses.asdict(config)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override}: an override is key=value, e.g. train.steps=200")
    *parents, leaf = key.split(".")
    node: Any = tree
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UserError(f"{override}: no section {part!r} in the config")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{override}: {value!r} is not a YAML value") from None


def _explain(error: Any) -> str:
    """One pydantic error as `key: found …, wanted …`."""
    location = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        names = _field_names(location[:-1])
        near = difflib.get_close_matches(location[-1], names, n=1) or [
            name for name in names if "".join(word[0] for word in name.split("_")) == location[-1]
        ]
        path = ".".join([*location[:-1], *near])
        hint = f" (did you mean {path}?)" if near else ""
        return f"unknown key {key}{hint}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    return f"{key}: {error['msg']}, found {error['input']!r}"


def _field_names(sections: Sequence[str]) -> list[str]:
    cls: Any = Config
    for section in sections:
        cls = {field.name: field.type for field in dataclasses.fields(cls)}.get(section)
        if not dataclasses.is_dataclass(cls):
            return []
    return [field.name for field in dataclasses.fields(cls)]
