"""Configs: every shipped file loads, and every mistake gets one clear line."""

import copy
import dataclasses
import math
import re
import subprocess
import sys
import typing

import pytest
import yaml

from emollama_jax import config, config_fields
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
    # Newer than the first runs; each default is what those runs had.
    newer = ["LlamaConfig.remat_keep", "LlamaConfig.remat_offload", "LlamaConfig.frozen"]
    assert given == [*newer, "EvaVitConfig.frozen", "FaceXFormerConfig.frozen"]


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
        (["train.steps=[1"], ["train.steps=[1", "not YAML", "line 1"]),
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


# --- bounds ---


def holds_number(kind):
    if typing.get_origin(kind) is typing.Literal:
        return False
    return kind in (int, float) or any(map(holds_number, typing.get_args(kind)))


NUMBERS = [
    (key, field) for key, field in config_fields.fields(config.Config) if holds_number(field.type)
]


def outside(bounds, whole):
    """Values beside the bounds, and what is never a number of a run."""
    step = (lambda x, way: x + way) if whole else (lambda x, way: math.nextafter(x, way * math.inf))
    yield bounds.low if bounds.above else step(bounds.low, -1)
    yield bounds.high if bounds.below else step(bounds.high, 1)
    yield from (2**70, -(2**70)) if whole else (math.inf, -math.inf, math.nan)


LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_positions": 8192}


def put(tree, key, value):
    """Sets one number of a plain tree, in lists the first."""
    tree["model"]["llama"]["rope_llama3"] = dict(LLAMA3)
    *parents, leaf = re.split(r"\.", key)
    for part in parents:
        tree = tree[part.removesuffix("[]")]
        tree = tree[0] if part.endswith("[]") else tree
    tree[leaf] = [value, *tree[leaf][1:]] if isinstance(tree[leaf], list | tuple) else value


def test_files_from_before_a_setting_mean_what_they_did():
    tree = _plain(config.to_dict(config.load("tiny")))
    for key in ("tied", "rope_llama3"):
        del tree["model"]["llama"][key]
    del tree["data"]["template"]
    before = copy.deepcopy(tree)
    assert config.from_dict(tree, origin="old") == config.load("tiny")
    assert tree == before
    assert config.completed(tree) == _plain(config.to_dict(config.load("tiny")))


def test_every_number_of_every_section_is_found():
    sections = {key.rpartition(".")[0] for key, _ in NUMBERS}
    assert {"model.llama.lora", "data.sources[]", "mesh", "distributed", "generate"} <= sections
    assert len(NUMBERS) > 90
    assert all(config_fields.bounds_of(field) for _, field in NUMBERS)


@pytest.mark.parametrize(("key", "field"), NUMBERS, ids=[key for key, _ in NUMBERS])
def test_a_number_beside_its_bounds_is_refused(key, field):
    bounds = config_fields.bounds_of(field)
    whole = isinstance(bounds.low, int)
    plain = _plain(config.to_dict(config.load("tiny")))
    for value in outside(bounds, whole):
        tree = copy.deepcopy(plain)
        put(tree, key, value)
        with pytest.raises(UserError) as error:
            config.from_dict(tree, origin="mine")
        name = re.escape(key).replace(r"\[\]", r"\.0")
        said = (
            rf"mine: {name}(\.0)?: found {re.escape(repr(value))}, wanted {re.escape(str(bounds))}"
        )
        assert re.fullmatch(said, str(error.value))
    inside = [bounds.high - 1 if bounds.below else bounds.high, bounds.also]
    if not bounds.above:
        inside.append(bounds.low)
    for value in (value for value in inside if value is not None):
        tree = copy.deepcopy(plain)
        put(tree, key, value)
        config.from_dict(tree, origin="mine")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=-1.0", "train.learning_rate: found -1.0, wanted > 0"),
        ("train.keep=0", "train.keep: found 0, wanted 1 …"),
        ("train.warmup=5", "train.warmup: found 5, wanted 0 … 1"),
        ("train.b2=1e23", "train.b2: found '1e23', wanted ≥ 0 and < 1"),
        ("model.llama.rope_theta=1e400", "model.llama.rope_theta: found '1e400', wanted > 0"),
        ("mesh.fsdp=0", "mesh.fsdp: found 0, wanted -1 or 1 …"),
        ("model.face.swin.depths=[2, 0]", "model.face.swin.depths.1: found 0, wanted 1 …"),
        ("train.steps=true", "train.steps: found True, wanted a number, 1 …"),
        ("train.steps=3.5", "train.steps: found 3.5, wanted a whole number, 1 …"),
        ("train.steps=", "train.steps: found None, wanted a whole number"),
        (f"train.steps={'9' * 5000}", "limit (4300 digits)"),
        (f"train.steps={'9' * 4000}", "train.steps: found 9999"),
        (f"name=[{'[' * 50}{']' * 50}]", "name: found [[[...]]], wanted text"),
        ("train.trainable=fim", "train.trainable: found 'fim', wanted a list"),
        ("data.sources.0.weight=1", "data.sources is not a section; set the whole value"),
        ("=3", "an override is key=value"),
        ("train.=3", "an override is key=value"),
        ("train.steps={a: 1, a: 2}", "key 'a' is given twice"),
    ],
)
def test_found_and_wanted(override, said):
    with pytest.raises(UserError) as error:
        config.load("tiny", [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_section_made_in_code_is_checked_too():
    generate = config.load("tiny").generate
    with pytest.raises(UserError, match=r"^generate\.temperature: found -1, wanted 0 … 100$"):
        dataclasses.replace(generate, temperature=-1)
    with pytest.raises(UserError, match=r"^data\.sources\[\]\.weight: found 0, wanted > 0"):
        config.SourceConfig(name="a", split="train", kind="image", weight=0)
    with pytest.raises(UserError, match=r"^path is missing$"):  # of which tokenizer?
        config.TokenizerConfig(kind="bpe")
    with pytest.raises(UserError, match=r"^distributed\.processes: found 0"):
        config.how_to_run(["distributed.processes=0"])


def test_help_lists_every_setting():
    lines = config.fields_help().splitlines()
    keys = [key for key, _ in config_fields.fields(config.Config)]
    assert [line.split()[0] for line in lines] == keys
    for (key, field), line in zip(config_fields.fields(config.Config), lines, strict=True):
        bounds = config_fields.bounds_of(field)
        assert bounds is None or f", {bounds}" in line or f"each {bounds}" in line, key
    text = "\n".join(lines)
    assert re.search(r"^model\.llama\.lora\.rank +int, 0 … 65,536  # 0: no adapters$", text, re.M)
    assert re.search(r"^mesh\.slices +int, 1 … 1,048,576; 1 if left out  # TPU slices", text, re.M)
    assert re.search(r"^model\.llama\.dtype +float32 \| bfloat16$", text, re.M)
    assert re.search(r"^weights .*# Initial weights", text, re.M)


def test_configs_are_read_without_jax(root):
    code = "import sys; from emollama_jax import config; config.fields_help(); "
    code += "config.load('tiny'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# --- did you mean ---


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trian.steps=3", "train"),
        ("Train.steps=3", "train"),
        ("modle.llama.layers=3", "model"),
        ("model.lama.layers=3", "model.llama"),
        ("steps=3", "train.steps"),
        ("max_new_tokens=3", "generate.max_new_tokens"),
        ("train.keeps=3", "train.keep"),
        ("train.temperature=0", "generate.temperature"),
        ("wieghts=none", "weights"),
    ],
)
def test_misspelt_keys(override, meant):
    with pytest.raises(UserError, match=rf"\(did you mean {re.escape(meant)}\?\)"):
        config.load("tiny", [override])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("emollama_7B", "emollama_7b"),
        ("tiny.yml", "tiny"),
        ("Tiny", "tiny"),
        ("emolama_13b", "emollama_13b"),
    ],
)
def test_misspelt_config_names(name, meant):
    with pytest.raises(UserError, match=rf"no such config \(did you mean {meant}\?"):
        config.load(name)


def test_misspelt_section_of_a_file(tmp_path):
    text = (config.config_dir() / "tiny.yaml").read_text().replace("\ntrain:", "\ntrian:")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"unknown key trian \(did you mean train\?\)"):
        config.load(str(tmp_path / "mine.yaml"))


# --- YAML ---

TINY = (config.config_dir() / "tiny.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TINY + "\ntrain: {steps: 3}\n", r"key 'train' is given twice, in lines \d+ and \d+"),
        (TINY.replace("  steps: 300", "  steps: 300\n  steps: 3"), "key 'steps' is given twice"),
        (TINY.replace("seed: 0}", "seed: 0, seed: 1}"), "key 'seed' is given twice"),
        (TINY.replace("name: tiny", "name: tïny").encode("latin-1"), "not UTF-8 .*0xef"),
        (TINY.encode("utf-16"), "not UTF-8"),
        (TINY.replace("name: tiny", "name: !!python/name:os.system"), "constructor for the tag"),
        (TINY.replace("name: tiny", "name: !mine x"), "constructor for the tag '!mine'"),
        (TINY.replace("steps: 300", "steps: !!int abc"), "not YAML: invalid literal"),
        (TINY.replace("steps: 300", "steps: !!float ''"), "not YAML"),
        (TINY.replace("steps: 300", "steps: 2024-01-01"), "steps: found '2024-01-01', wanted"),
        (TINY.replace("name: tiny", "name: no"), "name: found False, wanted text"),
        (TINY + "\n3: 4\n", "3: Keys should be strings"),
        (TINY + "\n? [1]\n: 2\n", "unhashable key"),
        (TINY + "\n---\na: 1\n", "another document"),
        (TINY.replace("\ntrain:", "\ntrain: &a\n  me: *a"), "unknown key train.me"),
        ("[" * 100_000, "not a config: more than 1,000 brackets"),
        ("a: " + "[" * 500 + "]" * 500, "nested too deeply"),
        ("a:\n  " + "- " * 20_000, "nested too deeply"),
        (TINY + "#" * 2**18, "wanted a config of at most 262,144"),
        (TINY.replace("steps: 300", "steps: 1:30"), "1:30 is a number in base 60"),
        (TINY.replace("trainable: [", "trainable: ['(', "), "'\\(' is no regular expression"),
        (b"\0\0", "not YAML"),
        ("\n".join(f"key{i}: 1" for i in range(1000)), "and 998 more"),
    ],
    ids=range(23),
)  # fmt: skip
def test_odd_yaml_gets_one_line(tmp_path, content, said):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        config.load(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_yaml_that_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.replace("name: tiny", "name: 2024-13-01").encode())
    assert config.load(str(path)).name == "2024-13-01"  # no date: a name
    merged = TINY.replace("generate: {", "generate: {<<: {seed: 4}, ").replace(", seed: 0}", "}")
    path.write_text(merged)
    assert config.load(str(path)).generate.seed == 4


def test_a_folder_is_no_config(tmp_path):
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(UserError, match=r"mine\.yaml: a folder, wanted a \.yaml file"):
        config.load(str(tmp_path / "mine.yaml"))
