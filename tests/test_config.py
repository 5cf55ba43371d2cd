"""Configs: every shipped file loads, and every mistake gets one clear line."""

import dataclasses

import pytest
import yaml

from emollama_jax import config
from emollama_jax.errors import UserError


def named_configs():
    return sorted(path.stem for path in config.config_dir().glob("*.yaml"))


@pytest.mark.parametrize("name", named_configs())
def test_shipped_configs_load_and_are_named_after_their_file(name):
    assert config.load(name).name == name


@pytest.mark.parametrize("name", named_configs())
def test_round_trip(name):
    loaded = config.load(name)
    tree = yaml.safe_load(yaml.safe_dump(_plain(config.to_dict(loaded))))
    assert config.from_dict(tree, origin="round trip") == loaded


def _plain(tree):
    """Tuples as lists, which is what YAML and JSON make of them."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, tuple | list) else tree


def test_configs_are_frozen_and_hashable(tiny_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config.train.steps = 1
    assert hash(tiny_config) == hash(config.load("tiny"))


def test_model_sections_have_no_defaults():
    def leaves(cls):
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                yield from leaves(field.type)
            else:
                yield cls.__name__, field

    given = [
        f"{owner}.{field.name}"
        for owner, field in leaves(config.EmoLlamaConfig)
        if field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    ]
    assert given == []


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", 7),
        ("train.learning_rate=1e-3", 1e-3),  # YAML 1.1 reads this one as text
        ("train.learning_rate=1", 1.0),
        ("data.agr=false", False),
        ("model.fim.branches=local", "local"),
        ("model.face.swin.depths=[2, 2, 2, 2]", (2, 2, 2, 2)),
        ("train.trainable=[fim/.*]", ("fim/.*",)),
        ("data.dir=elsewhere", "elsewhere"),
        ("name=mine", "mine"),
    ],
)
def test_overrides_are_typed(override, value):
    loaded = config.load("tiny", [override])
    for part in override.partition("=")[0].split("."):
        loaded = getattr(loaded, part)
    assert loaded == value
    assert type(loaded) is type(value)


def test_later_override_wins():
    assert config.load("tiny", ["train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lr=1e-3"], ["train.lr", "did you mean train.learning_rate?"]),
        (["train.step=3"], ["train.step", "did you mean train.steps?"]),
        (["model.llama.lora.ranks=3"], ["model.llama.lora.rank?"]),
        (["training.steps=3"], ["training.steps=3", "'training'"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["train.steps=1.5"], ["train.steps", "1.5"]),
        (["data.agr=perhaps"], ["data.agr", "perhaps"]),
        (["model.llama.dtype=float16"], ["model.llama.dtype", "float16", "bfloat16"]),
        (["model.fim.branches=all"], ["model.fim.branches", "all", "local"]),
        (["model.content=grid:1"], ["model.content", "grid:1", "grid:n"]),
        (["model.content=some"], ["model.content", "some", "mean"]),
        (["train=3"], ["train", "3"]),
        (["train.steps"], ["train.steps", "key=value"]),
        (["train.steps=[1"], ["train.steps=[1", "not a YAML value"]),
        (["data.sources=[{name: a}]"], ["data.sources.0.split", "missing"]),
        (["train.steps=a", "train.seed=b"], ["train.steps", "train.seed"]),
    ],
)
def test_mistakes_get_one_clear_line(overrides, words):
    with pytest.raises(UserError) as error:
        config.load("tiny", overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_names_the_known_ones():
    with pytest.raises(UserError, match=r"huge: no such config \(known: .*tiny"):
        config.load("huge")


@pytest.mark.parametrize(
    ("text", "words"),
    [("name: [", "not YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")],
)
def test_broken_files(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        config.load(str(path))
    assert "\n" not in str(error.value)
    assert "broken.yaml" in str(error.value)


def test_missing_field_is_named(tmp_path):
    tree = yaml.safe_load((config.config_dir() / "tiny.yaml").read_text())
    del tree["model"]["llama"]["rope_theta"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"model\.llama\.rope_theta is missing"):
        config.load(str(path))


@pytest.mark.parametrize(
    ("content", "tokens"),
    [("mean", 1), ("all", 64), ("grid:2", 4), ("grid:3", 16), ("grid:4", 16), ("grid:8", 64)],
)
def test_content_tokens_of_eight_by_eight_patches(content, tokens):
    # grid:3 pools windows of 8 // 3 = 2, so it has 4 × 4 cells: LLaMA-VID's rule.
    size = ("model.vision.image_size=64", "model.vision.patch_size=8")
    model = config.load("tiny", [*size, f"model.content={content}"]).model
    assert model.content_tokens == tokens
    assert model.tokens_per_frame == 1 + tokens + 2


@pytest.mark.parametrize(("branches", "n"), [("both", 2), ("global", 1), ("local", 1), ("none", 0)])
def test_face_tokens(branches, n):
    assert config.load("tiny", [f"model.fim.branches={branches}"]).model.face_tokens == n
