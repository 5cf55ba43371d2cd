"""Sources that can be converted, each with its tables, its names and the tensors left out."""

import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from emollama_jax.config import EmoLlamaConfig
from emollama_jax.imported import FREE
from tools.convert_torch import (
    adapters,
    bert,
    dinov2,
    facexformer,
    language,
    llama_vid,
    mtcnn,
    peft,
)
from tools.convert_torch.engine import Row
from tools.convert_torch.files import LANGUAGE, Opened, open_paths
from tools.convert_torch.settings import check_tower, from_transformers

_EVA = r"(cls_token|pos_embed|(patch_embed|blocks|norm|fc_norm|head)\..*)"
HEADS = "head of a pretraining task"
_OTHERS = {  # of a whole BLIP-2 or InstructBLIP checkpoint
    r"(model\.)?(language_model|llm_model|opt_model|t5_model)\..*": "another LLM",
    r"(model\.)?(language_projection|llm_proj|opt_proj|t5_proj)\..*": "leads to another LLM",
    r"(model\.)?(vision_projection|text_projection|vision_proj|text_proj|itm_head)\..*": HEADS,
    r"(model\.)?(temp|[Qq]former\.cls\..*)": HEADS,
}
_NOT_QFORMER = {
    r"(model\.)?(visual_encoder|vision_model)\.(?!post_layernorm\.).*": "the source eva-vit",
}
_NOT_VISION = {
    r"(model\.)?([Qq]former\.|embeddings\.(word|position)_embeddings\.).*": "the source qformer",
    r"(model\.)?query_tokens": "the source qformer",
    r"(model\.)?(ln_vision|(vision_model\.)?post_layernorm)\..*": "the source qformer",
}


@dataclass(frozen=True)
class Naming:
    """One way in which a source's tensors are called.

    Attributes:
        name: for people.
        sign: a key by which it is known, as a regular expression; its group is what stands before
            all of its keys.
        rows: the table, for a config and that prefix.
        ignore: keys not read, for a config: a pattern of the whole key → the reason.
    """

    name: str
    sign: str
    rows: Callable[[EmoLlamaConfig, str], list[Row]]
    ignore: Callable[[EmoLlamaConfig], Mapping[str, str]] = lambda cfg: {}

    def prefix(self, keys: Collection[str]) -> str | None:
        """Prefix of this naming's keys; None: these are not its keys."""
        found = [match[1] for key in keys if (match := re.fullmatch(self.sign, key))]
        return min(found, key=len) if found else None


def _as_it_is(opened: Opened, cfg: EmoLlamaConfig) -> tuple[EmoLlamaConfig, list[Row]]:
    return cfg, []


def _from_config(*sections: str) -> Callable[[Opened, EmoLlamaConfig], tuple[EmoLlamaConfig, list]]:
    """LLaMA's sizes from `config.json`, and its tokenizer."""

    def fit(opened: Opened, cfg: EmoLlamaConfig) -> tuple[EmoLlamaConfig, list[Row]]:
        cfg = from_transformers(cfg, opened, sections=sections)
        if cfg.llama.tied:
            _check_tied(opened)
        language.carry(opened)
        return cfg, []

    return fit


def _check_tied(opened: Opened) -> None:
    """A file may hold the head of a tied model a second time; it must be the same then."""
    for key, head in opened.tensors.items():
        if not key.endswith("lm_head.weight"):
            continue
        tables = [t for k, t in opened.tensors.items() if k.endswith("embed_tokens.weight")]
        if len(tables) == 1 and not np.array_equal(head.read(), tables[0].read()):
            opened.problems.append(
                f"{key}: is not the embedding, but tie_word_embeddings is true: set it to what the "
                "model was trained with"
            )


def _open_language(paths: Sequence[pathlib.Path]) -> Opened:
    return open_paths(paths, carried=LANGUAGE)


def _checked(section: str) -> Callable[[Opened, EmoLlamaConfig], tuple[EmoLlamaConfig, list]]:
    """A tower's settings, held against the config's."""
    return lambda opened, cfg: (check_tower(cfg, opened, section=section), [])


@dataclass(frozen=True)
class Source:
    """A kind of checkpoint.

    Attributes:
        about: one line of help.
        sections: sections of the model's config that its weights must fit.
        parts: parts of `EmoLlama` that it fills, or MTCNN.
        fills: our leaves that it fills: a pattern of whole paths.
        namings: in the order in which they are tried.
        open: reads paths.
        fit: function that adapts a config to the settings beside the weights, and gives rows for
            tensors that the naming lacks; it adds its problems and notes to what is opened.
        free: fields of its sections that its weights do not depend on.
    """

    about: str
    sections: tuple[str, ...]
    parts: tuple[str, ...]
    fills: str
    namings: tuple[Naming, ...]
    open: Callable[[Sequence[pathlib.Path]], Opened] = open_paths
    fit: Callable[[Opened, EmoLlamaConfig], tuple[EmoLlamaConfig, list[Row]]] = _as_it_is
    free: tuple[str, ...] = FREE

    def holding(self, rows: Sequence[Row]) -> "Source":
        """The source with leaves that some more rows fill."""
        if not rows:
            return self
        more = [path for row in rows for path in row.paths]
        return replace(
            self,
            parts=(*self.parts, "qformer"),
            sections=(*self.sections, "qformer"),
            fills="|".join([self.fills, *map(re.escape, more)]),
        )

    def naming(self, keys: Collection[str]) -> tuple[Naming, str] | None:
        """The naming that some keys follow, and their prefix; None: no known one."""
        for naming in self.namings:
            if (prefix := naming.prefix(keys)) is not None:
                return naming, prefix
        return None


def _llama(cfg: EmoLlamaConfig, prefix: str) -> list[Row]:
    # A multimodal model of `transformers` 5 nests its LLaMA, but not the head.
    head = "" if prefix == "model.language_model." else prefix.removesuffix("model.")
    return llama_vid.llama(cfg.llama, model=prefix, head=f"{head}lm_head.")


def _eva_ignore(cfg: EmoLlamaConfig) -> dict[str, str]:
    depth = cfg.vision.depth
    return {
        rf"(.*\.)?blocks\.{depth}\..*": f"EVA's block {depth + 1}: LLaMA-VID stops before it",
        r"(.*\.)?(norm|fc_norm|head)\.(weight|bias)": "EVA's last norm and head: not used",
    }


def _llama_vid(cfg: EmoLlamaConfig, prefix: str) -> list[Row]:
    return llama_vid.llama_vid(cfg.llama, cfg.qformer.cross_attention_every)


def _qformer(names: llama_vid.QFormerNames) -> Callable[[EmoLlamaConfig, str], list[Row]]:
    return lambda cfg, prefix: llama_vid.qformer(
        cfg.qformer.cross_attention_every, names, prefix=prefix
    )


def _always(ignore: Mapping[str, str]) -> Callable[[EmoLlamaConfig], Mapping[str, str]]:
    return lambda cfg: ignore


def _open_llama_vid(paths: Sequence[pathlib.Path]) -> Opened:
    """A checkpoint and, beside it, what is read instead of a part of it.

    `eva_vit_g.pth`, whose keys get their place in the checkpoint, as in the original's loader; and
    the weights that LLaVA's trainers save beside an adapter, whose keys PEFT has wrapped.
    """
    opened = _open_language(paths)
    tensors = opened.tensors
    eva = [key for key in tensors if re.fullmatch(_EVA, key)]
    _instead(opened, {key: llama_vid.TOWER + key for key in eva}, llama_vid.TOWER)
    trained = [key for key in tensors if key.startswith(adapters.WHOLE) and ".lora_" not in key]
    _instead(opened, {key: key.removeprefix(adapters.WHOLE) for key in trained}, None)
    return opened


def _instead(opened: Opened, names: Mapping[str, str], whole: str | None) -> None:
    """Renames tensors, and leaves out those that had the names (or all that begin so)."""
    if not names:
        return
    tensors = opened.tensors
    taken = set(names.values())
    gone = [key for key in tensors if key.startswith(whole)] if whole else taken & tensors.keys()
    for key in gone:
        del tensors[key]
    files = ", ".join(dict.fromkeys(tensors[key].file for key in names))
    if gone:
        what = "the checkpoint's own tower" if whole else "the checkpoint's own"
        opened.notes.append(f"left out {len(gone)} tensors: {what}; {files} is read instead")
    for key, name in names.items():
        tensors[name] = tensors.pop(key)


_QFORMER_IGNORE = _always({**llama_vid.BUFFERS, **_OTHERS, **_NOT_QFORMER})
_LLAMA = Naming(
    "transformers",
    r"(.*)layers\.0\.self_attn\.q_proj\.weight",
    _llama,
    lambda cfg: {**llama_vid.BUFFERS, **(llama_vid.TIED if cfg.llama.tied else {})},
)

SOURCES: dict[str, Source] = {
    "llama": Source(
        about="LLaMA (1 to 3.2), Vicuna, SmolLM2 and their like: of Hugging Face, or a GGUF",
        sections=("llama",),
        parts=("llama",),
        fills=r"llama/.*(?<!lora_[AB])",
        namings=(_LLAMA,),
        open=_open_language,
        fit=_from_config("llama"),
    ),
    "llama-vid": Source(
        about="a LLaMA-VID checkpoint, with eva_vit_g.pth beside it",
        sections=("llama", "vision", "qformer"),
        parts=("llama", "vision", "qformer"),
        fills=r"(llama|vision|qformer|visual_tokens)/.*(?<!lora_[AB])",
        namings=(
            Naming(
                "LLaMA-VID",
                r"()model\.vlm_att_query",
                _llama_vid,
                lambda cfg: {
                    **(llama_vid.TIED if cfg.llama.tied else {}),
                    **llama_vid.BUFFERS,
                    **_eva_ignore(cfg),
                },
            ),
        ),
        open=_open_llama_vid,
        fit=_from_config("llama", "vision"),
    ),
    "eva-vit": Source(
        about="EVA-ViT-g: LAVIS' eva_vit_g.pth, or out of BLIP-2 / InstructBLIP",
        sections=("vision",),
        parts=("vision",),
        fills=r"vision/.*",
        fit=_checked("vision"),
        namings=(
            Naming(
                "LAVIS",
                r"(.*)blocks\.0\.attn\.qkv\.weight",
                lambda cfg, prefix: llama_vid.eva_vit(prefix),
                lambda cfg: {**llama_vid.BUFFERS, **_OTHERS, **_NOT_VISION, **_eva_ignore(cfg)},
            ),
            Naming(
                "transformers",
                r"(.*)encoder\.layers\.0\.self_attn\.qkv\.weight",
                lambda cfg, prefix: llama_vid.eva_vit_transformers(prefix),
                _always({**llama_vid.BUFFERS, **_OTHERS, **_NOT_VISION}),
            ),
        ),
    ),
    "dinov2": Source(
        about="DINOv2: Hugging Face's files, or an ONNX export",
        sections=("vision",),
        parts=("vision",),
        fills=r"vision/.*",
        open=dinov2.open_dinov2,
        fit=dinov2.fit,
        # Its pictures are not normalised as EVA's are: a config that says otherwise is refused.
        free=tuple(name for name in FREE if not name.startswith("image_")),
        namings=(
            Naming(
                "transformers",
                dinov2.SIGN,
                lambda cfg, prefix: dinov2.rows(prefix),
                _always(dinov2.IGNORE),
            ),
        ),
    ),
    "qformer": Source(
        about="the Q-Former of InstructBLIP or BLIP-2, of LAVIS or transformers",
        sections=("qformer",),
        parts=("qformer",),
        fills=r"(qformer|visual_tokens/ln)/.*",
        fit=_checked("qformer"),
        namings=(
            Naming(
                "LAVIS",
                r"(.*)Qformer\.bert\.encoder\.layer\.0\.attention\.self\.query\.weight",
                _qformer(llama_vid.LAVIS),
                _QFORMER_IGNORE,
            ),
            Naming(
                "transformers (InstructBLIP)",
                r"(.*)qformer\.embeddings\.layernorm\.weight",
                _qformer(llama_vid.INSTRUCT_BLIP),
                _QFORMER_IGNORE,
            ),
            Naming(
                "transformers (BLIP-2)",
                r"(.*)qformer\.layernorm\.weight",
                _qformer(llama_vid.BLIP2),
                _QFORMER_IGNORE,
            ),
        ),
    ),
    "bert": Source(
        about="a BERT as the start of a Q-Former",
        sections=("qformer",),
        parts=("qformer",),
        fills=bert.FILLS,
        open=bert.open_bert,
        fit=bert.fit,
        free=(*FREE, *bert.FREE),
        namings=(
            Naming(
                "transformers",
                bert.SIGN,
                lambda cfg, prefix: bert.rows(cfg.qformer.cross_attention_every, prefix),
                _always(bert.IGNORE),
            ),
        ),
    ),
    "facexformer": Source(
        about="FaceXFormer's ckpts/model.pt",
        sections=("face",),
        parts=("face",),
        fills=r"face/.*",
        namings=(
            Naming(
                "the release",
                r"()linear_fuse\.weight",
                lambda cfg, prefix: facexformer.facexformer(cfg.face),
                _always(facexformer.IGNORE),
            ),
        ),
    ),
    "mtcnn": Source(
        about="facenet-pytorch's pnet.pt, rnet.pt and onet.pt",
        sections=(),
        parts=("mtcnn",),
        fills=r"[pro]net/.*",
        namings=(
            Naming("facenet-pytorch", r"()pnet\.conv1\.weight", lambda cfg, prefix: mtcnn.mtcnn()),
        ),
        open=mtcnn.open_three,
    ),
    "peft": Source(
        about="a PEFT LoRA adapter's folder",
        sections=("llama", "lora"),
        parts=("llama",),
        fills=r"llama/.*lora_[AB]",
        namings=(Naming("PEFT", peft.SIGN, lambda cfg, prefix: peft.adapter(cfg.llama, prefix)),),
        open=adapters.open_adapter,
        fit=adapters.fit,
    ),
}


@dataclass
class Guess:
    """The source that some keys come from, and the share of them that its table reads."""

    source: str
    naming: Naming
    prefix: str
    share: float
    rows: list[Row] = field(default_factory=list)


def guess(keys: Collection[str], cfg: EmoLlamaConfig) -> Guess | None:
    """The source whose table reads most of some keys; None: no table knows them."""
    best = None
    for name, source in SOURCES.items():
        if (found := source.naming(keys)) is None:
            continue
        naming, prefix = found
        rows = naming.rows(cfg, prefix)
        share = sum(any(row.matches(key) for row in rows) for key in keys) / len(keys)
        if best is None or share > best.share:
            best = Guess(name, naming, prefix, share, rows)
    return best
