"""Prompts by their ids: LLaMA-VID's template and label mask, the AGR sentence, the tokenizers.

The SentencePiece file of mistral-common has LLaMA's kind of vocabulary and stands in for it.
"""

import pathlib
import pickle
import random

import numpy as np
import pytest

from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.config import TokenizerConfig
from emollama_jax.data import prompts, tokenizers
from emollama_jax.data.chat import Chat
from emollama_jax.data.prompts import Turn, build_prompt, build_training, read_turns
from emollama_jax.data.templates import SYSTEM, TEMPLATES
from emollama_jax.data.tokenizers import SentencePieceTokenizer, load_tokenizer, train_bpe
from emollama_jax.errors import UserError

WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "the", "face", "##s", "?", "cafe"]
LEFT, RIGHT = "[", "]"


@pytest.fixture(scope="module")
def llama() -> SentencePieceTokenizer:
    mistral = pytest.importorskip(
        "mistral_common",
        reason="mistral-common, of the extra `test`, brings the SentencePiece file",
    )
    path = pathlib.Path(mistral.__file__).parent / "data" / "tokenizer.model.v1"
    return load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path)))


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(train_bpe(TEXTS, 380))
    return str(path)


TEXTS = [
    SYSTEM,
    "USER: \nWhat is the facial expression of the person? ASSISTANT: happiness",
    "The person in the image is a 20-29 year old Asian woman.",
    "The brows are raised, é.",
] * 5


@pytest.fixture
def bpe(bpe_file):
    return load_tokenizer(TokenizerConfig(kind="bpe", path=bpe_file))


@pytest.fixture
def bert_file(tmp_path) -> pathlib.Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*WORDPIECE, LEFT, RIGHT, "sep"]) + "\n")
    return path


@pytest.fixture
def bert(bert_file):
    return load_tokenizer(TokenizerConfig(kind="bert", path=str(bert_file)))


def vicuna(tokenizer) -> Chat:
    return Chat(TEMPLATES["vicuna"], tokenizer)


def pieces(tokenizer: SentencePieceTokenizer, ids) -> list:
    return [i if i < 0 else tokenizer._processor.id_to_piece(int(i)) for i in ids]


def llava_reference(tokenizer, text: str, n_visual: int) -> tuple[list[int], list[int]]:
    """Ids and labels as LLaVA's scripts make them: from the rendered text, by tokenising it again.

    The slow legacy tokenizer cuts the text at </s> and encodes what is between by itself.
    """
    encode = tokenizer._processor.encode

    def tokens(part: str) -> list[int]:
        ids = [1]
        for number, between in enumerate(part.split("</s>")):
            ids += ([2] if number else []) + (encode(between) if between else [])
        return ids

    def image_tokens(part: str) -> list[int]:
        chunks = [tokens(chunk) for chunk in part.split("<image>")]
        ids = list(chunks[0])
        for chunk in chunks[1:]:
            ids += [IMAGE_TOKEN, *chunk[1:]]
        return ids

    ids = image_tokens(text)
    labels = list(ids)
    labels[0] = IGNORE
    place = 1
    for turn in text.split("</s>"):
        if not turn:
            break
        instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        hidden = len(image_tokens(instruction)) - 2
        labels[place : place + hidden] = [IGNORE] * hidden
        place += len(image_tokens(turn))
    assert place == len(ids)
    expanded_ids, expanded_labels = [], []
    for i, label in zip(ids, labels, strict=True):
        times = n_visual if i == IMAGE_TOKEN else 1
        expanded_ids += [i] * times
        expanded_labels += [label] * times
    return expanded_ids, expanded_labels


def test_exact_ids_of_one_turn(llama):
    prompt = build_training(
        [Turn("What is it?", "joy")], n_visual=2, agr="", chat=vicuna(llama), text_length=60
    )
    ids = prompt.ids[: prompt.length].tolist()
    system = [1, 330, 10706, 1444, 264, 13903, 2188, 304, 396, 18278, 10895, 13892, 28723, 415]
    system += [13892, 5212, 10865, 28725, 10537, 28725, 304, 27057, 11194, 298, 272, 2188, 28742]
    system += [28713, 4224, 28723]
    assert ids[:30] == system
    human = ["▁US", "ER", ":", "▁", -200, -200, "▁", "<0x0A>", "What", "▁is", "▁it", "?"]
    assert pieces(llama, ids[30:]) == [*human, "▁ASS", "IST", "ANT", ":", "▁joy", "</s>"]
    assert ids[30:42] == [2223, 725, 28747, 28705, -200, -200, 28705, 13, 3195, 349, 378, 28804]
    assert ids[42:] == [8602, 8048, 12738, 28747, 10186, 2]
    assert (prompt.labels[: prompt.length - 2] == IGNORE).all()
    assert prompt.labels[prompt.length - 2 : prompt.length].tolist() == [10186, 2]
    assert (prompt.ids[prompt.length :] == 0).all()  # padding is <unk>
    assert (prompt.labels[prompt.length :] == IGNORE).all()
    assert prompt.ids.dtype == prompt.labels.dtype == np.int32 and prompt.lost == 0


@pytest.mark.parametrize("n_visual", [1, 4])
@pytest.mark.parametrize(
    "turns",
    [
        [("What is it?", "joy")],
        [("What is it?", "5 of them."), ("Why?", "(The lips) smile."), ("A. x\nB. y", "B")],
        [("Choose: {anger, fear}.", "anger"), ("É 你好 😀?", "«ok»\nyes")],
    ],
)
def test_ids_and_labels_equal_llavas(llama, turns, n_visual):
    text = SYSTEM
    for number, (question, answer) in enumerate(turns):
        text += f"{'' if number else ' '}USER: <image>\n{question} ASSISTANT: {answer}</s>"
    ids, labels = llava_reference(llama, text, n_visual)
    prompt = build_training(
        [Turn(*turn) for turn in turns],
        n_visual=n_visual,
        agr="",
        chat=vicuna(llama),
        text_length=300,
    )
    assert prompt.ids[: prompt.length].tolist() == ids
    assert prompt.labels[: prompt.length].tolist() == labels


def test_visual_tokens_before_or_after_later_questions(llama):
    """LLaMA-VID throws a coin for every turn but the first."""
    turns = [Turn("What?", "joy"), Turn("Why?", "So.")]
    before = (
        f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: joy</s>USER: <image>\nWhy? ASSISTANT: So.</s>"
    )
    after = (
        f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: joy</s>USER: Why?\n<image> ASSISTANT: So.</s>"
    )
    wanted = {tuple(llava_reference(llama, text, 1)[0]) for text in (before, after)}
    found = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        prompt = build_training(
            turns, n_visual=1, agr="", chat=vicuna(llama), text_length=90, rng=rng
        )
        ids = prompt.ids[: prompt.length].tolist()
        assert prompt.labels[: prompt.length].tolist() in (
            llava_reference(llama, before, 1)[1],
            llava_reference(llama, after, 1)[1],
        )
        found.add(tuple(ids))
    assert found == wanted
    place = llava_reference(llama, after, 1)[0]
    last = len(place) - 1 - place[::-1].index(IMAGE_TOKEN)
    assert pieces(llama, place[last : last + 6]) == [-200, "▁", "▁ASS", "IST", "ANT", ":"]


def test_a_prompt_is_the_beginning_of_its_training(llama):
    agr = "The person in the image is a man."
    prompt = build_prompt("What is it?", n_visual=3, agr=agr, chat=vicuna(llama), text_length=80)
    training = build_training(
        [Turn("What is it?", "joy")], n_visual=3, agr=agr, chat=vicuna(llama), text_length=80
    )
    assert prompt.ids[: prompt.length].tolist() == training.ids[: prompt.length].tolist()
    assert training.length == prompt.length + 2
    assert pieces(llama, prompt.ids[prompt.length - 4 : prompt.length]) == [
        "▁ASS", "IST", "ANT", ":"
    ]  # fmt: skip
    assert (prompt.labels == IGNORE).all()
    assert prompts.answer_ids("joy", chat=vicuna(llama)) == [10186, 2]
    short = prompt.length - 1
    message = rf"the prompt has {prompt.length} tokens, 3 of .* length is {short}: ask a shorter"
    with pytest.raises(UserError, match=message):
        build_prompt("What is it?", n_visual=3, agr=agr, chat=vicuna(llama), text_length=short)


def test_where_the_agr_sentence_stands(bpe):
    turns = [Turn("Who?", "joy"), Turn("Why?", "So.")]
    prompt = build_training(
        turns,
        n_visual=2,
        agr="The person in the image is a man.",
        chat=vicuna(bpe),
        text_length=200,
    )
    ids = prompt.ids[: prompt.length].tolist()
    first = ids.index(IMAGE_TOKEN)
    second = first + 2 + ids[first + 2 :].index(IMAGE_TOKEN)
    assert bpe.decode(ids[:first]) == f"{SYSTEM} USER: "
    assert bpe.decode(ids[first + 2 : second]) == (
        "\nThe person in the image is a man.\nWho? ASSISTANT: joyUSER: "
    )
    assert bpe.decode(ids[second + 2 :]) == "\nWhy? ASSISTANT: So."
    labels = [i for i in prompt.labels if i != IGNORE]
    assert labels == [*bpe.encode(" joy"), 2, *bpe.encode(" So."), 2]
    assert prompts.render(
        turns, agr="The person in the image is a man.", template=TEMPLATES["vicuna"]
    ) == [
        f"{SYSTEM} USER: ",
        "\nThe person in the image is a man.\nWho? ASSISTANT: joy",
        "USER: ",
        "\nWhy? ASSISTANT: So.",
    ]


def test_long_text_is_cut_at_the_right_and_says_so(llama):
    turns = [Turn("What is it?", "joy and more joy")]
    whole = build_training(turns, n_visual=1, agr="", chat=vicuna(llama), text_length=100)
    cut = build_training(
        turns, n_visual=1, agr="", chat=vicuna(llama), text_length=whole.length - 2
    )
    assert cut.lost == 2 and cut.length == whole.length - 2 == len(cut.ids)
    assert cut.ids.tolist() == whole.ids[: cut.length].tolist()
    assert (cut.labels != IGNORE).sum() == 3
    gone = build_training(
        turns, n_visual=1, agr="", chat=vicuna(llama), text_length=whole.length - 5
    )
    assert (gone.labels == IGNORE).all()


def test_text_alone_has_no_visual_place(llama):
    prompt = build_training(
        [Turn("What?", "joy")], n_visual=0, agr="", chat=vicuna(llama), text_length=80
    )
    text = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: joy</s>"
    assert prompt.ids[: prompt.length].tolist() == llava_reference(llama, text, 0)[0]


def test_special_tokens_in_a_question_are_text(llama, bpe):
    for tokenizer in (llama, bpe):
        prompt = build_prompt(
            "</s>USER: <s> <unk>", n_visual=1, agr="", chat=vicuna(tokenizer), text_length=120
        )
        ids = prompt.ids[: prompt.length].tolist()
        assert ids.count(1) == 1 and 2 not in ids and 0 not in ids
        assert "</s>USER: <s> <unk>" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("value", "question"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("Look <image> here", "Look here"),
        ("  What is it?\n", "What is it?"),
        ("A. x\nB. y", "A. x\nB. y"),
    ],
)
def test_questions_lose_their_place_holder(value, question):
    assert prompts.question_text(value) == question
    assert read_turns([{"from": "human", "value": value}, {"from": "gpt", "value": "a"}]) == (
        Turn(question, "a"),
    )


def test_broken_conversations_are_refused():
    human, gpt = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
    for conversation, message in (
        ([gpt, human], r"sentence 1 .* from 'gpt', wanted 'human'"),
        ([human, gpt, gpt], r"sentence 3 .* from 'gpt', wanted 'human'"),
        ([human, {"from": "gpt", "value": " "}], r"sentence 2 .* empty answer"),
        ([human, gpt, human], r"ends with an answer, found 3"),
        ([], r"found 0 sentences"),
    ):
        with pytest.raises(UserError, match=message):
            read_turns(conversation)


def test_split_rounds():
    turns = [Turn(str(i), "a") for i in range(5)]
    assert prompts.split_rounds(turns, 2) == [turns[:2], turns[2:4], turns[4:]]
    assert prompts.split_rounds(turns, 8) == [turns]


AGR = {
    "kind": "image",
    "age": 2,
    "gender": 1,
    "race": 2,
    "probability": (0.9, 0.9, 0.9),
    "threshold": 0.5,
    "race_labels": "measured",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "image is a 20-29 year old Asian woman"),
        ({"kind": "clip"}, "video is a 20-29 year old Asian woman"),
        ({"race_labels": "as_published"}, "image is a 20-29 year old Indian woman"),
        ({"race_labels": "untaught"}, "image is a 20-29 year old woman"),
        ({"age": 0, "gender": 0, "race": 0}, "image is a 0-9 year old White man"),
        ({"age": 7, "race": 1}, "image is a 70+ year old Black woman"),
        ({"age": 6, "race": 4}, "image is a 60-69 year old woman"),  # "Others" says nothing
        ({"probability": (0.4, 0.9, 0.9)}, "image is an Asian woman"),
        ({"probability": (0.4, 0.9, 0.9), "race": 3}, "image is an Indian woman"),
        ({"probability": (0.4, 0.9, 0.9), "race": 0}, "image is a White woman"),
        ({"probability": (0.4, 0.9, 0.4)}, "image is a woman"),
        ({"probability": (0.5, 0.4, 0.9)}, "image is a 20-29 year old Asian person"),
        ({"probability": (0.4, 0.4, 0.9)}, "image is an Asian person"),
    ],
)
def test_agr_sentence(changes, words):
    assert prompts.agr_sentence(**AGR | changes) == f"The person in the {words}."


@pytest.mark.parametrize(
    "changes", [{"threshold": 0.95}, {"probability": (0.1, 0.1, 0.9), "race": 4}]
)
def test_nothing_sure_is_no_sentence(changes):
    assert prompts.agr_sentence(**AGR | changes) == ""


def test_bert_questions(bert):
    """As `BertTokenizer(…, truncation_side="left", padding="max_length")` makes them."""
    ids, mask = prompts.encode_question("What IS the\nfaces? Café", tokenizer=bert, length=12)
    assert ids.tolist() == [2, 4, 5, 6, 7, 8, 9, 10, 3, 0, 0, 0]
    assert mask.tolist() == [True] * 9 + [False] * 3
    ids, mask = prompts.encode_question("What is the faces? Café", tokenizer=bert, length=6)
    assert ids.tolist() == [2, 7, 8, 9, 10, 3]  # the end is kept
    assert mask.all()
    ids, _ = prompts.encode_question("[SEP] zebra", tokenizer=bert, length=8)
    assert ids.tolist() == [2, 11, 13, 12, 1, 3, 0, 0]
    ids, mask = prompts.encode_question("", tokenizer=bert, length=4)
    assert ids.tolist() == [2, 3, 0, 0] and mask.tolist() == [True, True, False, False]
    assert bert.decode([2, 4, 5, 6, 7, 8, 3, 0]) == "what is the faces"


def test_bert_equals_transformers(bert, bert_file):
    """The reference class, on the same vocabulary."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    reference = transformers.BertTokenizer(str(bert_file))
    for text in ("What IS the faces?", "Café\tthe [face]!  what", "你 what?is"):
        assert bert.encode(text) == reference.encode(text, add_special_tokens=False), text


def test_the_small_bpe(bpe, bpe_file):
    assert (bpe.pad, bpe.bos, bpe.eos) == (0, 1, 2)
    assert 259 < bpe.size <= 380
    for text in (*TEXTS, "never seen: 你好 😀\t\r\n  x", ""):
        assert bpe.decode(bpe.encode(text)) == text
        assert all(2 < i < bpe.size for i in bpe.encode(text))
    assert len(bpe.encode(SYSTEM)) < len(SYSTEM) / 2
    assert bpe.decode([1, *bpe.encode("joy"), -200, 2, 0]) == "joy"
    shuffled = list(TEXTS)
    random.Random(0).shuffle(shuffled)
    assert train_bpe(shuffled, 380) == pathlib.Path(bpe_file).read_text()
    assert train_bpe(TEXTS, 300) != train_bpe(TEXTS, 301)
    with pytest.raises(UserError, match="at least 259 entries, found 258"):
        train_bpe(TEXTS, 258)


def test_tokenizers_pickle(llama, bpe, bert):
    for tokenizer in (llama, bpe, bert):
        copy = pickle.loads(pickle.dumps(tokenizer))
        text = "What is the </s> [SEP] face?"
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.decode(copy.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        for name in ("size", "bos", "eos", "pad"):
            assert getattr(copy, name) == getattr(tokenizer, name)


def test_llamas_tokens_decode(llama):
    assert llama.size == 32000
    ids = llama.encode("The brows are raised, 你好\nand 😀.")
    assert llama.decode([1, *ids, 2, 0, IMAGE_TOKEN]) == "The brows are raised, 你好\nand 😀."


def test_the_packages_tokenizer():
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path="tiny"))
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert len(tokenizer.encode(SYSTEM)) < 40  # the words of every prompt are merged


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "bert"])
def test_unreadable_tokenizers_are_refused(kind, tmp_path):
    missing = tmp_path / "none.model"
    with pytest.raises(UserError, match=rf"none\.model: cannot read the {kind} tokenizer: No such"):
        load_tokenizer(TokenizerConfig(kind=kind, path=str(missing)))
    other = tmp_path / "other.model"
    other.write_text("# a text\n")
    with pytest.raises(UserError, match=rf"other\.model: not a {kind} tokenizer: .*; check data"):
        load_tokenizer(TokenizerConfig(kind=kind, path=str(other)))


def test_vocabularies_without_their_special_tokens_are_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[UNK]\nthe\n[CLS]\n")
    config = TokenizerConfig(kind="bert", path=str(path))
    with pytest.raises(UserError, match=r"its vocabulary lacks \[SEP\], \[PAD\]"):
        load_tokenizer(config)
    path.write_text("[UNK]\nthe\nthe\n")
    with pytest.raises(UserError, match=r"1 of its 3 lines are repeated"):
        load_tokenizer(config)


def test_a_tokenizer_that_joins_question_and_answer_is_refused():
    class Joining:
        bos, eos, pad, size = 1, 2, 0, 9

        def encode(self, text):
            return [3 + len(text) % 5] if text else []

    with pytest.raises(UserError, match="joins 'ASSISTANT:' with the answer 'joy'"):
        build_training(
            [Turn("What?", "joy")], n_visual=1, agr="", chat=vicuna(Joining()), text_length=9
        )


def test_the_tiny_file_is_package_data():
    assert tokenizers.TINY.is_file() and "emollama_jax" in tokenizers.TINY.parts
