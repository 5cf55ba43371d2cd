"""Every setting of a run as frozen dataclasses: YAML in, typed overrides, unknown keys refused.

The model sections hold no defaults: what a network computes is written out in `configs/*.yaml`.
Every number has its bounds beside it; `fields_help` lists them.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, dataclass_transform

import pydantic
from pydantic import dataclasses as pydantic_dataclasses

from emollama_jax import config_content, config_fields, config_weights, yaml_file
from emollama_jax.bounds import (
    Amount,
    Axis,
    Bounds,
    Brightness,
    Decay,
    Epsilon,
    Examples,
    Few,
    Margin,
    Number,
    Rate,
    Seed,
    Share,
    Side,
    Size,
    Spread,
    regular_expressions,
)
from emollama_jax.config_overrides import apply, brief
from emollama_jax.errors import UserError
from emollama_jax.paths import as_path
from emollama_jax.terms import (
    Attention,
    Branches,
    DType,
    Frozen,
    Kept,
    Kind,
    LlamaRemat,
    Preset,
    Remat,
    Template,
)

RUN_SECTIONS = ("mesh", "distributed", "generate")  # may be overridden for a trained run
RUN_SETTINGS = ("model.llama.frozen", "model.vision.frozen", "model.face.frozen")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _config(cls):
    """A frozen dataclass whose fields are checked and that refuses unknown ones."""
    options = pydantic.ConfigDict(extra="forbid")
    cls = pydantic_dataclasses.dataclass(frozen=True, kw_only=True, config=options)(cls)
    checked = cls.__init__

    @functools.wraps(checked)
    def init(self, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            section = config_fields.section_of(cls, Config)
            raise UserError(config_fields.explain(error, Config, section)) from None

    cls.__init__ = init
    return cls


@_config
class LoraConfig:
    """Low-rank adapters on a network's Linear layers (Hu et al. 2021), named as PEFT names them."""

    rank: Annotated[int, Bounds(0, 2**16)]  # 0: no adapters
    alpha: Amount  # the update is scaled by alpha / rank
    dropout: Decay
    targets: tuple[str, ...]  # leaf names, e.g. ("q_proj", "v_proj")


@_config
class RopeLlama3Config:
    """Llama 3.1's scaling of rotary angles: waves longer than `original_max_positions /
    low_freq_factor` grow by `factor`, those below the same of `high_freq_factor` stay."""

    factor: Rate
    low_freq_factor: Rate
    high_freq_factor: Rate  # above low_freq_factor
    original_max_positions: Number  # positions of the original training


@_config
class LlamaConfig:
    """LLaMA / Vicuna decoder (`transformers` `LlamaConfig`, renamed to axis words)."""

    vocab_size: Size  # number of token ids
    vocab_multiple: Size  # embedding and head are padded to a multiple of this, for the mesh
    width: Size
    mlp_width: Size
    layers: Few
    heads: Size
    kv_heads: Size
    head_dim: Size
    norm_eps: Epsilon
    rope_theta: Rate
    rope_scaling: Rate  # divisor of positions; 1 for none (LLaMA-VID stage 3: 16)
    rope_llama3: RopeLlama3Config | None  # Llama 3.1's scaling, where rope_scaling is 1
    max_positions: Number
    tied: bool  # embedding and head share one array
    dtype: DType
    remat: LlamaRemat
    remat_keep: tuple[Kept, ...] = ()  # what layers keep beside what `remat` says, by name
    remat_offload: tuple[Kept, ...] = ()  # what waits in the host's memory instead
    frozen: Frozen = "float"  # the layers' kernels; int8 halves their memory
    attention: Attention
    lora: LoraConfig

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and columns of the head, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def reach(self) -> int:
        """Tokens that positions reach. Llama 3.1's `max_positions` counts its scaling already."""
        return int(self.max_positions * self.rope_scaling)


@_config
class EvaVitConfig:
    """EVA-CLIP's ViT as LAVIS builds it: pre-norm, learned positions. DINOv2 is one too."""

    image_size: Side
    patch_size: Side
    width: Size
    depth: Few
    heads: Size
    mlp_width: Size
    norm_eps: Epsilon
    last_norm: bool  # norm after the last block: in DINOv2, not in LLaMA-VID's EVA
    image_mean: tuple[Brightness, Brightness, Brightness]
    image_std: tuple[Spread, Spread, Spread]
    dtype: DType
    remat: Remat
    frozen: Frozen = "float"  # the blocks' kernels
    attention: Attention

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@_config
class QFormerConfig:
    """BERT with learned queries and cross-attention in every n-th layer (InstructBLIP)."""

    vocab_size: Size
    width: Size
    layers: Few
    heads: Size
    mlp_width: Size
    max_positions: Number
    encoder_width: Size
    encoder_norm_eps: Epsilon  # norm over the vision tokens (LLaMA-VID's vlm_att_ln)
    cross_attention_every: Few
    queries: Size
    norm_eps: Epsilon
    dropout: Decay
    dtype: DType
    remat: Remat


@_config
class SwinConfig:
    """Swin v1 (torchvision `swin_b`)."""

    image_size: Side
    patch_size: Side
    width: Size  # width of stage 0; doubles at each stage
    depths: tuple[Few, ...]
    heads: tuple[Size, ...]
    window: Side
    mlp_ratio: Few
    norm_eps: Epsilon


@_config
class FaceXFormerConfig:
    """FaceXFormer (Narayan et al. 2024): Swin, multi-scale fusion, two-way decoder, eight heads."""

    swin: SwinConfig
    width: Size  # width of the fused face map and the task tokens
    decoder_depth: Few
    decoder_heads: Size
    decoder_mlp_width: Size
    attention_downsample: Size  # divisor of the cross-attentions' inner width
    upscale_widths: tuple[Size, Size]  # widths of the parsing head
    norm_eps: Epsilon
    parsing_norm_eps: Epsilon
    race_labels: Literal["measured", "as_published", "untaught"]  # see docs/model.md
    image_mean: tuple[Brightness, Brightness, Brightness]
    image_std: tuple[Spread, Spread, Spread]
    dtype: DType
    remat: Remat
    frozen: Frozen = "float"  # kernels of Swin's blocks


@_config
class FaceInfoMiningConfig:
    """Face Info Mining: our choice of equations (docs/model.md), each part switchable."""

    branches: Branches
    heads: Size
    head_dim: Size
    pool: Side  # the face map is pooled to pool × pool keys for the global branch
    fourier_bands: Annotated[int, Bounds(1, 64)]  # frequencies per landmark coordinate
    norm_eps: Epsilon


@_config
class EmoLlamaConfig:
    """The assembled model."""

    llama: LlamaConfig
    vision: EvaVitConfig
    qformer: QFormerConfig
    face: FaceXFormerConfig
    fim: FaceInfoMiningConfig
    content: str  # "all", "mean" or "grid:n": LLaMA-VID's content tokens
    frames_at_once: Number  # frames per device in one pass of the frozen towers
    # Mesh axes that split the towers' frames: all of them, or "batch": the batch axes alone, with
    # the towers' heads and feed-forward over `tensor` as in the LLM.
    frames_over: Literal["mesh", "batch"]

    @property
    def content_tokens(self) -> int:
        """Content tokens of a frame."""
        return config_content.tokens(self.content, self.vision.patches)

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
        return config_content.checked(value)


@_config
class TokenizerConfig:
    """A tokenizer file: `tiny` is the package's own, `weights` the LLM's in a folder of
    `weights`."""

    kind: Literal["sentencepiece", "bpe", "bert", "json"]  # "json": tokenizer.json, or its folder
    path: str


@_config
class SourceConfig:
    """One data set of a mixture."""

    name: str  # name of the data set, e.g. "actionfaces/images"
    split: str
    kind: Kind
    weight: Rate
    items: Literal["category", "conversation", "both"] = "both"
    balance: Share = 0.0  # of classes: 0 draws them as often as they are, 1 equally often


@_config
class PackedConfig:
    """One static shape of training rows, each of several examples: docs/data.md."""

    rows: Number  # B of a step, over all hosts
    examples: Number  # drawn for a row, on average: `rows` × `examples` for a step
    tokens: Size  # T of a row, visual tokens included
    frames: Number  # F of a row
    again: Annotated[int, Bounds(0, 2**16)] = 0  # X of a row: its frames in second and later rounds
    question_length: Size  # L, where all of a step's questions fit; else data.question_length


@_config
class DataConfig:
    """Data sources and the static shapes of batches."""

    dir: str
    sources: tuple[SourceConfig, ...]
    clip_frames: Annotated[int, Bounds(1, 2**16)]  # M of a clip batch; an image batch has M = 1
    sampling: Literal["segments", "fps"]
    fps: Annotated[float, Bounds(0.0, 1000.0, above=True)]  # frame rate of "fps" sampling
    pad_images: bool  # LLaMA-VID's image_aspect_ratio: pad
    text_length: Size  # T of an image batch, visual tokens included
    clip_text_length: Size  # T of a clip batch
    rounds: Few  # R: human turns of a training prompt, each with its own visual tokens
    question_length: Size  # L: question tokens of the Q-Former
    agr: bool  # add the age-gender-race sentence
    agr_threshold: Share  # attributes below this probability are left out of the sentence
    face_margin: Margin  # margin of the face crop, as a share of the box (FaceXFormer: 0.5)
    workers: Annotated[int, Bounds(0, 1024)]  # Grain worker processes; 0: the main process reads
    blank_share: Share  # share of training examples shown black: teaches "no face"
    broken_share: Share  # share of unreadable media above which the run stops
    template: Template  # conversation format; "weights": as in a folder of `weights`
    llm_tokenizer: TokenizerConfig
    question_tokenizer: TokenizerConfig
    packed: PackedConfig | None = None  # null: one example a row, steps of one kind of media each


@_config
class MeshConfig:
    """Number of devices along each axis; −1 in one of them takes all that are left."""

    data: Axis  # copies of the parameters; with several slices, a multiple of their number
    fsdp: Axis  # parts of the parameters and of the batch
    tensor: Axis  # parts of heads, feed-forward and vocabulary
    slices: Annotated[int, Bounds(1, 2**20)] = 1  # TPU slices joined by the data-centre network
    preset: Preset = "fsdp+tensor"


@_config
class DistributedConfig:
    """How the processes of a run on several hosts connect; see docs/cloud_tpu.md."""

    coordinator: str = "auto"  # "auto": from Cloud TPU, GKE or Slurm; "none"; or "host:port"
    processes: Annotated[int, Bounds(1, 2**20)] = 1  # with "host:port": number of processes
    process_id: Annotated[int, Bounds(0, 2**20)] = 0  # with "host:port": index of this one


@_config
class TrainConfig:
    steps: Number
    seed: Seed
    image_batch: Examples  # examples per image step, over all hosts
    clip_batch: Examples  # examples per clip step, over all hosts
    accumulation: Number  # micro-batches per optimizer step
    loss_chunk: Number  # text positions with logits in memory at once
    trainable: tuple[str, ...]  # regular expressions over parameter paths, "llama/.*lora_[AB]"
    learning_rate: Rate
    projector_learning_rate: Rate  # for parameters that `projector` matches
    projector: tuple[str, ...]
    warmup: Share  # share of the steps
    weight_decay: Amount
    b1: Decay
    b2: Decay
    clip_norm: Rate
    frozen_dtype: DType
    save_every: Number
    keep: Number
    log_every: Number

    _patterns = pydantic.field_validator("trainable", "projector")(regular_expressions)


@_config
class GenerateConfig:
    max_new_tokens: Annotated[int, Bounds(1, 2**20)]
    temperature: Annotated[float, Bounds(0.0, 100.0)]  # 0: greedy
    top_p: Annotated[float, Bounds(0.0, 1.0, above=True)]
    seed: Seed


@_config
class Config:
    """A whole run."""

    name: str
    model: EmoLlamaConfig
    data: DataConfig
    mesh: MeshConfig
    train: TrainConfig
    generate: GenerateConfig
    # Initial weights: the package's tiny towers, random numbers, or a list of folders that
    # `python -m tools.convert_torch` wrote and of package towers, e.g. "tiny:face".
    weights: str | tuple[str, ...] = "none"
    # XLA flags for training and answering on a TPU, each "name=value", e.g.
    # "xla_tpu_enable_async_collective_fusion=true"; `emollama plan` shows what they change.
    xla: tuple[str, ...] = ()
    distributed: DistributedConfig = DistributedConfig()

    @pydantic.field_validator("weights")
    @classmethod
    def _weights(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return config_weights.checked(value)

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
        UserError: no such file, broken YAML, an unknown key, a value of the wrong type or out of
            bounds.
    """
    path = as_path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = as_path(config_dir() / f"{name}.yaml")
    if not path.exists():
        known = sorted(p.stem for p in config_dir().glob("*.yaml"))
        near = config_fields.near(pathlib.PurePath(name).stem, known)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{brief(name)}: no such config ({hint}known: {', '.join(known)}; or give a path to a "
            ".yaml file)"
        )
    tree = yaml_file.read(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    tree.setdefault("distributed", {})  # a section that files may leave out
    for override in overrides:
        apply(tree, override, Config)
    return from_dict(tree, origin=str(name))


def how_to_run(overrides: Sequence[str]) -> DistributedConfig:
    """The section `distributed` of overrides of a trained run, before the run is read.

    Raises:
        UserError: an override of what training fixed, or a value of the wrong type.
    """
    tree: dict[str, Any] = {"distributed": {}}
    for change in overrides:
        key = change.partition("=")[0]
        if key.split(".")[0] not in RUN_SECTIONS and key not in RUN_SETTINGS:
            free = ", ".join((*RUN_SECTIONS, *RUN_SETTINGS))
            raise UserError(f"{change}: training fixed this; only {free} may change")
        if change.startswith("distributed."):
            apply(tree, change, Config)
    return _checked(DistributedConfig, tree["distributed"], "distributed")


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A config with `key=value` overrides, as of `load`."""
    tree = to_dict(config)
    for change in overrides:
        apply(tree, change, Config)
    return from_dict(tree, origin=config.name)


def from_dict(tree: Mapping[str, Any], *, origin: str) -> Config:
    """Checks a plain tree, e.g. of a YAML file or a checkpoint, and makes the config."""
    try:
        return _checked(Config, completed(tree), "")
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plain tree with the settings that are newer than it."""
    return config_fields.completed(tree, config_fields.BEFORE)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain tree that `from_dict` reads back."""
    return dataclasses.asdict(config)


def fields_help() -> str:
    """Every setting with its kind or bounds, default and meaning, as `train --help` prints it."""
    return config_fields.table(Config)


def _checked(cls: Any, tree: Any, section: str) -> Any:
    try:
        return pydantic.TypeAdapter(cls).validate_python(tree)
    except pydantic.ValidationError as error:
        raise UserError(config_fields.explain(error, Config, section)) from None
