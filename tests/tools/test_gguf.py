"""GGUF files and tied checkpoints beside `transformers`: numbers, answers, tokenizers, refusals."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from emollama_jax import config, imported
from emollama_jax.config import TokenizerConfig
from emollama_jax.data.chat import open_chat
from emollama_jax.data.prompts import build_prompt
from emollama_jax.data.tokenizers import load_tokenizer
from emollama_jax.errors import UserError
from emollama_jax.generate.decode import decode, make_ending
from emollama_jax.generate.prompt import Prompt
from tests.helpers.language_files import (
    NAMED,
    PROGRAM,
    TEXTS,
    gguf_name,
    write_gguf,
    write_tokenizer,
)
from tests.helpers.llama_vid_golden import NO_LORA
from tests.helpers.torch_checkpoints import convert, write_back
from tests.helpers.torch_models import (
    Language,
    assert_close,
    assert_same,
    filled,
    jitted,
    randomise,
    sized,
    torch,
    transformers,
)
from tools.convert_torch import gguf_tokenizer
from tools.convert_torch.files import open_paths
from tools.convert_torch.gguf_rope import from_factors

gguf = pytest.importorskip("gguf", reason="gguf, of the extra `convert`, writes the files")

VOCAB = 425
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SIZES = dict(  # Llama 3.2's shape; of eight wavelengths one is blended
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    rope_parameters=ROPE,
    tie_word_embeddings=True,
    bos_token_id=420,
    eos_token_id=424,
)
BASE = sized(llama=dict(vocab_multiple=1))


def state_of(model) -> dict[str, np.ndarray]:
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.fixture(scope="module")
def theirs():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return randomise(model, 5).eval()


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    """What is made of the model as Hugging Face's folder, and of its GGUF."""
    root = tmp_path_factory.mktemp("llama32")
    theirs.save_pretrained(root / "hf")
    write_tokenizer(root / "hf", "llama-bpe")
    write_gguf(root / "model.gguf", state_of(theirs), theirs.config, kind="llama-bpe")
    convert("llama", root / "hf", root / "of_hf", BASE)
    convert("llama", root / "model.gguf", root / "of_gguf", BASE)
    return root


@pytest.fixture(scope="module")
def ours(folders):
    found = imported.read_manifest(folders / "of_gguf").model["llama"]
    cfg = sized(llama=found | {"lora": NO_LORA}).llama
    return filled(Language, cfg, folders / "of_gguf")


def test_gguf_and_folder_are_the_same(folders):
    one, two = (imported.read_manifest(folders / name) for name in ("of_hf", "of_gguf"))
    assert one.model == two.model
    assert one.model["llama"]["tied"] is True
    assert one.model["llama"]["norm_eps"] == 1e-5  # float32 in the GGUF
    assert one.model["llama"]["rope_llama3"]["original_max_positions"] == 256
    assert_same(folders / "of_hf", folders / "of_gguf")
    assert not any("lm_head" in path for path in imported.leaves_of(folders / "of_hf"))


def test_logits_are_transformers(theirs, ours):
    ids = np.random.default_rng(2).integers(0, VOCAB, (1, 400))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    run = jitted(ours, Language.logits)
    assert_close(run(jnp.asarray(ids), jnp.arange(400)[None]), wanted)


def test_ten_greedy_answers_are_transformers(theirs, ours):
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, VOCAB, n) for n in range(3, 13)]
    ids = np.zeros((10, 12), np.int32)
    for row, one in zip(ids, rows, strict=True):
        row[: len(one)] = one
    prompt = Prompt(
        embeds=ours.llama.embed(jnp.asarray(ids)), length=jnp.asarray([len(row) for row in rows])
    )
    found = decode(*nnx.split(ours.llama), prompt, None, make_ending((), 0), max_new_tokens=64).ids
    left = np.stack([np.roll(row, 12 - len(one)) for row, one in zip(ids, rows, strict=True)])
    mask = np.arange(12) >= 12 - np.asarray([[len(row)] for row in rows])
    said = theirs.generate(
        torch.from_numpy(left).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(found, said[:, 12:].numpy())


def test_export_is_what_transformers_reads(theirs, folders, tmp_path):
    write_back("llama", folders / "of_gguf", tmp_path / "back")
    state = load_file(tmp_path / "back" / "model.safetensors")
    wanted = state_of(theirs)
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(state[key], value, key)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.config.tie_word_embeddings and again.config.rope_parameters == ROPE
    assert again.config.eos_token_id == 424 and again.config.bos_token_id == 420
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    mine = load_tokenizer(TokenizerConfig(kind="json", path=str(folders / "hf")))
    assert tokenizer(TEXTS[0]).input_ids == [420, *mine.encode(TEXTS[0])]  # its first token
    assert tokenizer.chat_template == PROGRAM["llama-bpe"]
    convert("llama", tmp_path / "back", tmp_path / "again", BASE)
    assert_same(tmp_path / "again", folders / "of_gguf")


def test_a_config_names_the_folder_and_nothing_else(folders):
    chats = []
    for name in ("of_gguf", "of_hf"):
        changes = [
            f"weights=[{folders / name}]",
            "data.template=weights",
            "data.llm_tokenizer={kind: json, path: weights}",
        ]
        chats.append(open_chat(config.load("tiny", changes)))
    one, two = chats
    assert one.template == two.template and one.template.name == "llama3"
    assert one.stop == two.stop and one.pad == two.pad
    for text in (*TEXTS, "<|eot_id|> and  12345\r\n 6 "):
        assert one.tokenizer.encode(text) == two.tokenizer.encode(text)
    how = {"n_visual": 0, "agr": "", "text_length": 60}
    prompts = [build_prompt("Who?", chat=chat, **how) for chat in chats]
    np.testing.assert_array_equal(prompts[0].ids, prompts[1].ids)


def test_smollms_tokenizer(theirs, folders, tmp_path):
    """Special tokens first, digits one by one."""
    write_gguf(tmp_path / "x.gguf", state_of(theirs), theirs.config, kind="smollm")
    convert("llama", tmp_path / "x.gguf", tmp_path / "ours", BASE)
    made = load_tokenizer(TokenizerConfig(kind="json", path=str(tmp_path / "ours")))
    folder = write_tokenizer(tmp_path / "hf", "smollm")
    wanted = load_tokenizer(TokenizerConfig(kind="json", path=str(folder)))
    for text in (*TEXTS, "<|im_end|> and  12345\r\n 6 "):
        assert made.encode(text) == wanted.encode(text)
    assert (made.bos, made.eos, made.pad) == (wanted.bos, wanted.eos, wanted.pad)
    found = json.loads((tmp_path / "ours" / "template.json").read_text())
    assert found["name"] == "chatml" and found["system"].startswith("You are a helpful AI")


def test_sentencepiece_out_of_a_gguf():
    mistral = pytest.importorskip("mistral_common", reason="brings a SentencePiece file")
    import sentencepiece

    path = pathlib.Path(mistral.__file__).parent / "data" / "tokenizer.model.v1"
    wanted = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = {wanted.is_unknown: 2, wanted.is_control: 3, wanted.is_byte: 6}
    every = range(wanted.vocab_size())
    held = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [wanted.id_to_piece(i) for i in every],
        "tokenizer.ggml.scores": [wanted.get_score(i) for i in every],
        "tokenizer.ggml.token_type": [
            next((kind for test, kind in kinds.items() if test(i)), 1) for i in every
        ],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    made = sentencepiece.SentencePieceProcessor(
        model_proto=gguf_tokenizer.files(held)["tokenizer.model"]
    )
    for text in (*TEXTS, "  two  spaces\n<s> </s> <unk> é \U0001f468‍\U0001f469‍\U0001f467", ""):
        assert made.encode(text) == wanted.encode(text)
        assert made.decode(made.encode(text)) == wanted.decode(wanted.encode(text))
    assert (made.bos_id(), made.eos_id(), made.unk_id()) == (1, 2, 0)
    for field in ("scores", "bos_token_id", "eos_token_id"):
        with pytest.raises(ValueError, match=r"scores|is missing"):
            gguf_tokenizer.files({k: v for k, v in held.items() if not k.endswith(field)})


# --- what a tensor may be stored as ---------------------------------------------------------------


def stored(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def dequantized(kind) -> bool:
    try:
        gguf.dequantize(np.zeros((1, stored(kind.name)[1]), np.uint8), kind)
    except RuntimeError:  # "not yet implemented"
        return False
    return True


READ = [kind.name for kind in gguf.GGMLQuantizationType if dequantized(kind)]


def test_every_type_that_the_package_dequantizes(theirs, tmp_path, monkeypatch):
    """Blocks of random bytes, more rows than are read at once."""
    from tools.convert_torch import gguf_file

    monkeypatch.setattr(gguf_file, "ROWS", 24)
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"} <= {*READ}
    rng = np.random.default_rng(6)
    state = state_of(theirs)
    down = "model.layers.0.mlp.down_proj.weight"  # [64, 256]
    writers = {}
    original = gguf.GGUFWriter.add_tensor

    def add(self, name, tensor, **how):
        if name != gguf_name(down):
            return original(self, name, tensor, **how)
        numbers, size = stored(kind)
        data = rng.integers(0, 120, (64, 256 // numbers * size)).astype(np.uint8)
        writers[kind] = data
        return original(self, name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
    for kind in READ:
        write_gguf(tmp_path / f"{kind}.gguf", state, theirs.config)
        opened = open_paths([tmp_path / f"{kind}.gguf"])
        assert opened.problems == [], kind
        tensor = opened.tensors[down]
        wanted = gguf.dequantize(writers[kind], gguf.GGMLQuantizationType[kind])
        assert tensor.shape == wanted.shape == (64, 256)
        assert tensor.dtype.itemsize == (2 if kind in ("F16", "BF16") else 4)
        np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted, kind)
        assert kind in opened.notes[0]


def test_rows_of_quantized_q_and_k_go_home(theirs, tmp_path):
    state = state_of(theirs)
    types = {"q_proj": "Q8_0", "k_proj": "Q4_0", "embed": "F16"}
    write_gguf(tmp_path / "x.gguf", state, theirs.config, types=types)
    opened = open_paths([tmp_path / "x.gguf"])
    for key, value in state.items():
        kind = next((to for part, to in types.items() if part in key), "F32")
        kind = gguf.GGMLQuantizationType[kind]
        # A row's numbers are quantized by themselves, wherever the row stands.
        wanted = value if value.ndim < 2 else gguf.dequantize(gguf.quantize(value, kind), kind)
        np.testing.assert_array_equal(opened.tensors[key].read().astype(np.float32), wanted, key)


@pytest.mark.parametrize("numbers", [(8.0, 1.0, 4.0, 8192), (32.0, 2.0, 8.0, 100), (2, 1, 3, 77)])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 500000.0), (128, 10000.0), (16, 500000.0)])
def test_llama3s_numbers_out_of_its_factors(numbers, head_dim, theta):
    from tests.helpers.language_files import llama3_factors

    factor, low, high, original = numbers
    rope = dict(zip(ROPE, ("llama3", theta, factor, low, high, original), strict=True))
    factors = llama3_factors(rope, head_dim)
    found = from_factors(factors, head_dim=head_dim, theta=theta)
    again = llama3_factors(found | {"rope_theta": theta}, head_dim)
    np.testing.assert_allclose(again, factors, rtol=1e-5)
    if numbers == (8.0, 1.0, 4.0, 8192):
        assert [found[key] for key in list(ROPE)[2:]] == list(numbers)


def test_factors_of_another_scaling_are_refused():
    for factors in (np.linspace(1, 8, 8), np.arange(8) % 2 + 1.0, np.ones(4)):
        with pytest.raises(ValueError, match="rope_freqs"):
            from_factors(factors, head_dim=16, theta=1e4)


# --- tied checkpoints ---------------------------------------------------------------------------


def test_a_tied_head_in_the_file_must_be_the_embedding(theirs, folders, tmp_path):
    (tmp_path / "config.json").write_text((folders / "hf" / "config.json").read_text())
    state = state_of(theirs)
    head = state["model.embed_tokens.weight"].copy()
    save_file(state | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    summary = convert("llama", tmp_path, tmp_path / "ours", BASE)
    assert "left out 1 tensor: tied: the same as the embedding" in summary.notes
    assert_same(tmp_path / "ours", folders / "of_hf")
    head[3, 4] += 1
    save_file(state | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight: is not the embedding, but tie_word"):
        convert("llama", tmp_path, tmp_path / "two", BASE)


def test_a_config_that_is_not_tied_is_refused(folders):
    found = imported.read_manifest(folders / "of_hf").model["llama"]
    model = sized(llama=found | {"lora": NO_LORA, "tied": False})
    with pytest.raises(UserError, match=r"made for model.llama.tied True, the config has False"):
        imported.check_base([folders / "of_hf"], model, {})


# --- refusals -----------------------------------------------------------------------------------


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        convert("llama", path, path.parent / "never", BASE)
    assert not (path.parent / "never").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2', wanted 'llama'"),
        ({"llama.block_count": None}, "its metadata lacks llama.block_count"),
        ({"llama.expert_count": 8}, "num_local_experts is 8, wanted None"),
        ({"llama.rope.scaling.type": "yarn"}, "rope_freqs.weight beside llama.rope.scaling"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "wanted head_dim 16"),
        ({"llama.vocab_size": 9}, "llama.vocab_size is 9, token_embd has 425"),
        ({"split.count": 3}, "one of 3 parts: join them with llama-gguf-split"),
        ({"tokenizer.ggml.model": "rwkv"}, "its tokenizer is of kind 'rwkv', wanted 'gpt2' or"),
        ({"tokenizer.ggml.pre": "odd"}, "tokenizer.ggml.pre is 'odd', a rule that is not known"),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id is missing: no token ends an answer"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, but there are 425 tokens"),
        ({"tokenizer.ggml.merges": ["q"]}, "merge 'q' is not of two parts"),
        ({"tokenizer.ggml.merges": ["不 是"]}, "merges do not fit its tokens"),
        ({"tokenizer.chat_template": PROGRAM["smollm"]}, "format chatml needs special tokens"),
    ],
)
def test_what_is_refused(theirs, tmp_path, fields, said):
    path = tmp_path / "x.gguf"
    write_gguf(path, state_of(theirs), theirs.config, kind="llama-bpe", fields=fields)
    assert said in refusal(path)


def test_unknown_types_are_refused(theirs, tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, state_of(theirs), theirs.config)
    whole = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    place = whole.index(name) + len(name) + 4 + 2 * 8  # its type, after two dimensions
    for number, said in ((99, "of type 99, which the package gguf"), (24, "of type I8, which")):
        changed = bytearray(whole)
        changed[place : place + 4] = number.to_bytes(4, "little")
        path.write_bytes(changed)
        assert said in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(folders, tmp_path, share):
    whole = (folders / "model.gguf").read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "not a complete GGUF file" in refusal(path)
    path.write_bytes(b"no GGUF" + whole[7:])
    assert "not a complete GGUF file" in refusal(path)


def test_a_folder_whose_tokenizer_lacks_its_tokens_is_refused(theirs, folders, tmp_path):
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "llama-bpe", eos_token="<|gone|>")
    assert r"its vocabulary lacks <|gone|>" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "tokenizer_config.json").unlink()
    summary = convert("llama", tmp_path, tmp_path / "ours", BASE)
    assert any("tokenizer.json without tokenizer_config.json" in note for note in summary.notes)
    assert not (tmp_path / "ours" / "tokenizer.json").exists()
    assert NAMED["llama-bpe"][0] == "<|begin_of_text|>"
