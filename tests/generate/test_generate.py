"""Decoding against the cache-less path, row by row; the stream; sampling; label scoring."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.batch import IGNORE, IMAGE_TOKEN, one_a_row
from emollama_jax.errors import UserError
from emollama_jax.generate import (
    cache,
    decode,
    flagged,
    label_scores,
    prompt,
    sampling,
)
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.llama import Llama
from emollama_jax.models.rngs import abstract

LENGTHS = (5, 9, 2)
PAD = 0
STEPS = 8
WIDTH = 24  # of the cache-less path
NEVER = -1  # a stop id that is never drawn
LABELS = [[4, 2], [5, 6, 7, 2], [8], [5, 6, 9]]
_draw = jax.jit(sampling.draw)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The part of a Batch that a text-only model reads."""

    ids: jax.Array
    length: jax.Array


jax.tree_util.register_dataclass(Prompts, data_fields=["ids", "length"], meta_fields=[])


class TextModel(nnx.Module):
    """A decoder alone as a `VisionLanguageModel`."""

    def __init__(self, cfg: config.LlamaConfig):
        self.llama = Llama(cfg, rngs=nnx.Rngs(0))

    def embeds(self, batch: Prompts) -> jax.Array:
        return self.llama.embed(batch.ids)


@pytest.fixture(scope="module")
def model() -> TextModel:
    tiny = config.load("tiny").model.llama
    model = TextModel(dataclasses.replace(tiny, vocab_size=97, width=32, mlp_width=48, layers=2))
    # Initial weights give flat logits and look at little but the last token; these look around.
    model.llama.embed_tokens[...] *= 40
    model.llama.layers.q_proj.kernel[...] *= 4
    model.llama.layers.o_proj.kernel[...] *= 12
    model.llama.lm_head.kernel[...] *= 4
    return model


def prompts(lengths=LENGTHS, width=11, seed=7) -> Prompts:
    ids = np.random.default_rng(seed).integers(3, 97, (len(lengths), width))
    ids[np.arange(width) >= np.array(lengths)[:, None]] = PAD
    return Prompts(ids=jnp.asarray(ids, jnp.int32), length=jnp.asarray(lengths, jnp.int32))


def how(temperature=0.0, top_p=1.0, seed=0) -> sampling.Sampling | None:
    wanted = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return sampling.sampling(dataclasses.replace(config.load("tiny").generate, **wanted))


def uncached_logits(model: TextModel, ids: list[int]) -> jax.Array:
    """Logits after a sequence, by one pass over the whole of it without a cache: [1, V]."""
    row = np.full((1, WIDTH), PAD, np.int32)  # one width, so that it compiles once
    row[0, : len(ids)] = ids
    return _uncached(*nnx.split(model.llama), row)[:, len(ids) - 1]


@functools.partial(jax.jit, static_argnums=0)
def _uncached(graphdef, state, ids: jax.Array) -> jax.Array:
    llama = nnx.merge(graphdef, state)
    out = llama(llama.embed(ids), positions=jnp.arange(WIDTH)[None])
    return llama.logits(out.hidden)


def uncached_answer(model, ids, *, stop, rule) -> tuple[list[int], decode.Stop]:
    """The slow, plain decode: the whole sequence again for every token."""
    answer: list[int] = []
    for step in range(STEPS):
        token = int(rule(uncached_logits(model, [*ids, *answer]), step))
        if token in stop:
            return answer, decode.Stop.TOKEN
        answer.append(token)
    return answer, decode.Stop.LENGTH


def rows_of(batch: Prompts) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(np.asarray(batch.ids), batch.length, strict=True)]


def generate(model, batch, *, stop=(NEVER, NEVER), pad=PAD, **settings) -> decode.Generated:
    settings = {"how": how(), "max_new_tokens": STEPS} | settings
    return decode.generate(model, batch, stop=stop, pad=pad, **settings)


def test_greedy_equals_the_cacheless_path_for_rows_of_different_lengths(model):
    batch = prompts()
    free = generate(model, batch).ids
    # The second row's third token as stop: that row ends early, others go on.
    stop = [NEVER, int(free[1, 2])]
    out = generate(model, batch, stop=stop)
    for row, ids in enumerate(rows_of(batch)):
        want, reason = uncached_answer(model, ids, stop=stop, rule=lambda x, _: x[0].argmax())
        n = int(out.length[row])
        assert out.ids[row, :n].tolist() == want
        assert (out.ids[row, n:] == PAD).all()
        assert out.stopped[row] == reason
    assert set(out.stopped.tolist()) == {decode.Stop.TOKEN, decode.Stop.LENGTH}
    assert len({tuple(row) for row in free.tolist()}) == len(LENGTHS)  # the answers do differ


def test_sampled_tokens_equal_the_cacheless_path(model):
    batch, warm = prompts(), how(temperature=1.5, top_p=0.9)
    # Row 0 is what a batch of one draws too.
    want, _ = uncached_answer(
        model, rows_of(batch)[0], stop=(), rule=lambda x, step: _draw(x, warm, step=step)[0]
    )
    assert generate(model, batch, how=warm).ids[0].tolist() == want
    assert generate(model, batch).ids[0].tolist() != want


def test_cached_logits_equal_uncached_at_every_step(model):
    batch = prompts()
    graphdef, state = nnx.split(model)

    @jax.jit
    def start(state, batch):
        model = nnx.merge(graphdef, state)
        ready = prompt.Prompt(embeds=model.embeds(batch), length=batch.length)
        kv, hidden = cache.prefill(model.llama, ready, extra=STEPS)
        return kv, model.llama.logits(hidden)

    @jax.jit
    def advance(state, token, position, kv):
        llama = nnx.merge(graphdef, state).llama
        out = llama(llama.embed(token[:, None]), positions=position[:, None], cache=kv)
        return out.cache, llama.logits(out.hidden[:, 0])

    kv, logits = start(state, batch)
    new = np.random.default_rng(3).integers(3, 97, (len(LENGTHS), STEPS), np.int32)
    for step in range(STEPS):
        for row, ids in enumerate(rows_of(batch)):
            want = uncached_logits(model, [*ids, *new[row, :step].tolist()])[0]
            np.testing.assert_allclose(logits[row], want, rtol=0, atol=1e-5 * abs(want).max())
        kv, logits = advance(state, new[:, step], np.asarray(batch.length) + step, kv)


def test_an_answer_depends_neither_on_padding_nor_on_its_neighbours(model):
    warm, batch = how(temperature=1.0), prompts()
    want = generate(model, batch, how=warm).ids[0].tolist()
    alone = Prompts(ids=batch.ids[:1, :5], length=batch.length[:1])
    assert generate(model, alone, how=warm).ids[0].tolist() == want


def test_stop_token_drawn_first_gives_an_empty_answer(model):
    batch = prompts()
    stop = sorted(set(generate(model, batch).ids[:2, 0].tolist()))
    assert len(stop) == 2
    out = generate(model, batch, stop=stop, pad=7)
    assert out.length[:2].tolist() == [0, 0]
    assert (out.ids[:2] == 7).all()
    assert (out.stopped[:2] == decode.Stop.TOKEN).all()


def test_second_call_compiles_nothing(model, monkeypatch):
    traces = []
    logits = Llama.logits
    monkeypatch.setattr(Llama, "logits", lambda *a: (traces.append(1), logits(*a))[1])

    def run(seed, temperature):
        batch = prompts(lengths=(3, 4, 2), seed=seed)
        warm = how(temperature=temperature, seed=seed)
        generate(model, batch, how=warm, stop=[1, seed])
        label_scores.score_labels(model, batch, label_scores.pad_labels(LABELS))
        list(stream(model, batch_row(batch), how=warm))

    run(1, 0.0)
    run(1, 0.5)  # drawing is another program than greedy decoding
    traces.clear()
    run(2, 0.0)
    run(3, 0.7)
    assert not traces
    generate(model, prompts(), max_new_tokens=2)
    assert traces  # the count does see a trace


@pytest.mark.parametrize("step", ["token", "scores"])
def test_the_cache_is_neither_copied_nor_tiled(model, step):
    """By the compiler's count: beside a large cache, a token's step needs little memory, and so do
    the scores of many labels."""
    rows, slots, labels = 2, 4000, 8
    cfg = dataclasses.replace(model.llama.cfg, max_positions=slots, layers=8)
    large = nnx.eval_shape(lambda: TextModel(cfg))
    llama, fixed = nnx.split(large.llama), (how(), decode.make_ending([1], PAD))
    embeds = jax.ShapeDtypeStruct((rows, slots - 8, cfg.width), cfg.dtype)
    prompt_ = prompt.Prompt(embeds=embeds, length=jax.ShapeDtypeStruct((rows,), jnp.int32))
    run = functools.partial(decode.first_token.under({}), llama[0], max_new_tokens=8)
    loop = jax.eval_shape(run, llama[1], prompt_, *fixed)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(loop.cache))
    if step == "token":
        used = decode.next_token.under({}).lower(*llama, loop, *fixed).compile().memory_analysis()
        assert used.alias_size_in_bytes >= kept  # written in its place
        assert used.temp_size_in_bytes < kept / 4
    else:
        few, many = (
            label_scores.score.under({})
            .lower(*llama, prompt_, label_scores.pad_labels([[3, 4, 5]] * n))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for n in (1, labels)
        )
        assert many - few < kept / 4


def test_flags_reach_the_compiler():
    double = flagged.Flagged(lambda x: 2 * x)
    assert double(3) == 6
    assert double.under({}) is double.under({})
    assert double.under({"xla_backend_optimization_level": "0"})(3) == 6
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_flag"):
        double.under({"no_such_flag": "1"})(3)


def test_bad_limits_are_user_errors(model):
    with pytest.raises(UserError, match="max_new_tokens: found 0"):
        generate(model, prompts(), max_new_tokens=0)
    with pytest.raises(UserError, match="positions reach 512"):
        generate(model, prompts(), max_new_tokens=600)


# ---- the stream


def as_words(ids) -> str:
    return " ".join(map(str, ids))


def batch_row(batch: Prompts, row: int = 0) -> Prompts:
    return Prompts(ids=batch.ids[row : row + 1], length=batch.length[row : row + 1])


def as_bytes(ids) -> str:
    """A byte-level tokenizer at its hardest: every id is one byte of UTF-8."""
    table = "déjà vu 😀 好ü ".encode()
    return bytes(table[i % len(table)] for i in ids).decode(errors="replace")


def stream(model, batch, *, to_text=as_bytes, **settings):
    settings = {"how": how(), "max_new_tokens": STEPS, "stop": (NEVER, NEVER)} | settings
    llama, read = nnx.split(model.llama), prompt.read(model, batch)
    return decode.stream(llama, read, to_text, pad=PAD, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_stream_joined_is_the_batched_answer(model, temperature):
    batch, reasons = prompts(), []

    def drain(**settings):
        reasons.append((yield from stream(model, batch_row(batch), **settings)))

    for to_text in (as_words, as_bytes):
        out = generate(model, batch, how=how(temperature))
        pieces = list(drain(to_text=to_text, how=how(temperature)))
        assert "".join(pieces) == decode.texts(out, to_text)[0]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece[-1:] for piece in pieces)
        assert reasons[-1] is decode.Stop.LENGTH
        assert to_text is as_bytes or len(pieces) == STEPS
    stop = [NEVER, int(out.ids[0, 3])]
    pieces = list(drain(to_text=as_words, how=how(temperature), stop=stop))
    assert reasons[-1] is decode.Stop.TOKEN
    assert len(pieces) == out.ids[0].tolist().index(stop[1])


def test_stream_takes_one_prompt(model):
    with pytest.raises(ValueError, match="3 prompts"):
        next(stream(model, prompts()))


def test_detokenizer_gives_whole_characters_only():
    text = " smile 😀, déjà vu, 好 "
    encoded = text.encode()
    pieces = decode.Detokenizer(lambda ids: bytes(ids).decode(errors="replace"))
    given = [pieces.add(byte) for byte in encoded]
    assert "".join(given) == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)
    assert given[len(b" smile ") :][:4] == ["", "", "", " 😀"]


def test_detokenizer_drops_a_character_cut_off_by_the_end_but_keeps_broken_ones_inside():
    pieces = decode.Detokenizer(lambda ids: bytes(ids).decode(errors="replace"))
    given = [pieces.add(byte) for byte in b"ok\xf0\x9f!" + "é".encode()[:1]]
    assert "".join(given) == "ok\N{REPLACEMENT CHARACTER}!"


# ---- sampling


def test_temperature_zero_is_greedy_and_ties_go_to_the_lowest_id():
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert _draw(logits, how(), step=0).tolist() == [1, 0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    probability = jnp.array([0.1, 0.4, 0.2, 0.3])
    logits = jnp.tile(jnp.log(probability), (4000, 1))

    def drawn(top_p):
        return set(_draw(logits, how(1.0, top_p), step=0).tolist())

    assert drawn(0.05) == {1}
    assert drawn(0.39) == {1}
    assert drawn(0.45) == {1, 3}
    assert drawn(0.75) == {1, 3, 2}
    assert drawn(1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    logits = jnp.array([0.3, -1.0, 1.2, 0.0])
    rows = 20_000
    tokens = _draw(jnp.tile(logits, (rows, 1)), how(temperature), step=0)
    share = np.bincount(tokens, minlength=4) / rows
    want = jax.nn.softmax(logits / temperature)
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / rows))


def test_every_step_and_row_draws_anew():
    logits = jnp.zeros((8, 1000))
    first, second = (_draw(logits, how(1.0), step=step) for step in (0, 1))
    assert len(set(first.tolist())) > 4
    assert (first != second).sum() > 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": -0.1}, "generate.temperature: found -0.1"), ({"top_p": 0.0}, "top_p")],
)
def test_bad_sampling_settings_are_user_errors(change, message):
    good = config.load("tiny").generate
    assert sampling.sampling(good) is None  # greedy
    assert sampling.sampling(dataclasses.replace(good, temperature=0.5)).temperature == 0.5
    with pytest.raises(UserError, match=message):
        sampling.sampling(dataclasses.replace(good, **change))


# ---- label scoring


def test_scores_equal_full_recomputation(model):
    batch = prompts()
    scores = label_scores.score_labels(model, batch, label_scores.pad_labels(LABELS))
    assert scores.shape == (len(LENGTHS), len(LABELS))
    assert scores.dtype == jnp.float32
    for row, ids in enumerate(rows_of(batch)):
        for column, label in enumerate(LABELS):
            want = sum(
                jax.nn.log_softmax(uncached_logits(model, [*ids, *label[:n]]))[0, label[n]]
                for n in range(len(label))
            )
            assert abs(scores[row, column] - want) <= 1e-5 * max(1, abs(want))


def test_scores_of_all_single_tokens_are_a_distribution(model):
    scores = label_scores.score_labels(
        model, prompts(), label_scores.pad_labels([[n] for n in range(97)])
    )
    np.testing.assert_allclose(jnp.exp(scores).sum(-1), 1, rtol=1e-5)


def test_labels_without_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        label_scores.pad_labels([[1], []])


# ---- the assembled model


def small_emollama() -> EmoLlama:
    """A small EMO-LLaMA with normal weights (built abstractly: initialisers compile slowly)."""
    overrides = [
        *("llama.layers=1", "llama.vocab_size=64", "vision.depth=1", "vision.image_size=32"),
        *("qformer.vocab_size=64", "face.swin.image_size=32", "face.swin.depths=[2, 2]"),
        *("face.swin.heads=[1, 2]", "face.decoder_depth=1"),
    ]
    cfg = config.load("tiny", [f"model.{override}" for override in overrides]).model
    model = abstract(lambda rngs: EmoLlama(cfg, rngs=rngs))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(1)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), state)
    )


def test_emollama_answers_from_what_it_sees():
    seeing = small_emollama()
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (2, 14), np.int32)
    visual = slice(2, 2 + seeing.cfg.tokens_per_frame)
    ids[:, visual] = IMAGE_TOKEN
    batch = one_a_row(
        frames=rng.integers(0, 256, (2, 1, 32, 32, 3), np.uint8),
        faces=rng.integers(0, 256, (2, 1, 32, 32, 3), np.uint8),
        face_found=np.ones((2, 1), bool),
        landmarks=rng.uniform(-0.5, 0.5, (2, 1, 68, 2)).astype(np.float32),
        ids=ids,
        labels=np.full_like(ids, IGNORE),
        length=np.array([9, 14], np.int32),
        questions=rng.integers(3, 64, (2, 1, 6), np.int32),
        question_mask=np.ones((2, 1, 6), bool),
        weight=np.ones(2, np.float32),
        index=np.arange(2, dtype=np.int32),
    )
    out = generate(seeing, batch)
    scores = label_scores.score_labels(seeing, batch, label_scores.pad_labels(LABELS))
    embeds = np.asarray(prompt.read(seeing, batch).embeds)
    graphdef, state = nnx.split(seeing.llama)

    @jax.jit
    def uncached(state, embeds):
        llama = nnx.merge(graphdef, state)
        positions = jnp.broadcast_to(jnp.arange(WIDTH), (2, WIDTH))
        return llama.logits(llama(embeds, positions=positions).hidden)

    sequence = np.zeros((2, WIDTH, embeds.shape[-1]), np.float32)
    sequence[:, : embeds.shape[1]] = embeds
    rows = np.arange(2)
    for step in range(STEPS):
        logits = uncached(state, sequence)[rows, batch.length + step - 1]
        assert out.ids[:, step].tolist() == logits.argmax(-1).tolist()
        if step == 0:
            want = jax.nn.log_softmax(logits)[:, LABELS[2][0]]
            np.testing.assert_allclose(scores[:, 2], want, rtol=1e-5)
        sequence[rows, batch.length + step] = seeing.llama.embed_tokens[out.ids[:, step]]
    blind = prompt.read(seeing, batch.replace(frames=np.zeros_like(batch.frames))).embeds
    assert (abs(embeds - blind)[:, visual].max(-1) > 1e-3).any()
    np.testing.assert_array_equal(embeds[:, :2], blind[:, :2])


def test_each_row_draws_as_it_does_alone():
    """Greedy rows and sampled ones in one program, each at its own step."""
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((4, 50)) * 3, jnp.float32)
    hows = [how(1.5, 0.9, 4), how(), how(0.7, 1.0, 5), how(2.0, 0.5, 6)]
    steps = np.array([0, 3, 2, 7], np.int32)
    alone = [int(_draw(logits[i : i + 1], each, step=steps[i])[0]) for i, each in enumerate(hows)]
    still = sampling.Sampling(np.float32(0), np.float32(1), np.int32(0))
    together = jax.tree.map(lambda *xs: np.stack(xs), *(each or still for each in hows))
    assert jax.jit(sampling.draw_each)(logits, together, steps=steps).tolist() == alone
    cold = jax.tree.map(lambda x: np.stack([x] * 4), still)
    greedy = jax.jit(sampling.draw_each)(logits, cold, steps=steps)
    assert greedy.tolist() == sampling.greedy(logits).tolist()
