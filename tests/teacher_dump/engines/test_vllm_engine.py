"""The vLLM engine against plain forwards of the same tiny models.

Engines are loaded once per module, which is why it is one file; the tests that end one come last.
Shapes: n targets, V vocabulary, K slots.
"""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from decant.schemas import Layout, ScoredSequence, Truncation
from decant.schemas.distributions import in_order
from decant.storage.cache.checks import check_sequence
from decant.teacher_dump.engines import EngineError, TeacherConfig, open_engine
from decant.teacher_dump.engines.opening import open_generator
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.engines.seam import Prompt, Sampling, SequenceError
from decant.teacher_dump.engines.sparsify import uniforms_for
from decant.teacher_dump.engines.top_entries import TAIL_RESOLUTION
from decant.teacher_dump.engines.vllm.engine import VllmEngine
from decant.teacher_dump.engines.vllm.messages import Refused
from decant.teacher_dump.engines.vllm.prompt_logprobs import check, rows_from_flat
from decant.teacher_dump.engines.vllm.setup import saved_dtype
from decant.teacher_dump.inputs.records import TokenSequence

if importlib.util.find_spec("vllm") is None:  # to import it would change torch in this process
    pytest.skip("vllm is not installed", allow_module_level=True)

pytestmark = pytest.mark.vllm

ROWS, VOCAB, LENGTH, K = 512, 500, 96, 16
POISON = VOCAB - 1
"""A token whose embedding is NaN; no sequence holds it unless that is the point."""
SIZES: dict[str, Any] = {"vocab_size": ROWS, "initializer_range": 0.3, "bos_token_id": 0}
LLAMA = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}


def save(model: Any, path: Path) -> Any:
    """Save a random model whose POISON token gives NaN."""
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(path)
    return model.float().eval()


def sequences_of(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    """Random tokens, about two thirds of them targets."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        is_target = rng.random(length) < 0.67
        is_target[0], is_target[-1] = False, True
        ids = rng.integers(0, POISON, length).astype(np.int32)
        made.append(TokenSequence(f"sample-{number}", ids, is_target))
    return made


def reference_logits(model: Any, sequence: TokenSequence, vocab_size: int) -> NDArray[np.float64]:
    """[n, V] of a plain float32 forward: target t is predicted by row t - 1."""
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.input_ids).long()[None]).logits[0]
    rows = np.flatnonzero(sequence.is_target) - 1
    result: NDArray[np.float64] = logits[rows, :vocab_size].double().numpy()
    return result


def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis."""
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def layout(slots: int, temperatures: tuple[float, ...], sampled: bool, vocab_size: int) -> Layout:
    """The layout that checks an engine's answers."""
    return Layout(
        slots=slots,
        vocab_size=vocab_size,
        precision="f32",
        temperatures=temperatures,
        has_num_kept=sampled,
        fields=in_order(("logprobs", "log_tail", *["draws"] * sampled)),
    )


def assert_agrees(
    scored: ScoredSequence,
    logits: NDArray[np.float64],
    temperatures: tuple[float, ...],
    *,
    tolerance: float,
    same_ids: float = 0.99,
) -> None:
    """Top k, label, log Z and tail of a scored sequence are those of the dense logits."""
    logp = log_softmax(logits)
    targets = np.arange(len(logp))
    top = np.sort(np.argsort(-logp, axis=1)[:, :K], axis=1)
    assert np.mean(top == np.sort(scored.token_ids, axis=1)) >= same_ids
    kept = np.take_along_axis(logp, scored.token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(scored.logprobs, kept, rtol=0, atol=tolerance)
    label = logp[targets, scored.labels]
    np.testing.assert_allclose(scored.label_logprob, label, rtol=0, atol=tolerance)
    rest = logits.copy()
    np.put_along_axis(rest, scored.token_ids.astype(np.int64), -np.inf, axis=1)
    for i, temperature in enumerate(temperatures):
        log_sum = np.logaddexp.reduce(logits / temperature, axis=1)
        tail = np.logaddexp.reduce(rest / temperature, axis=1) - log_sum
        log_z = np.logaddexp.reduce(logp / temperature, axis=1)
        np.testing.assert_allclose(scored.log_tail[:, i], tail, rtol=0, atol=tolerance)
        np.testing.assert_allclose(scored.log_z[:, i], log_z, rtol=0, atol=tolerance)


# The scoring head: Llama, padded vocabulary, two temperatures.

TEMPERATURES = (1.0, 2.0)
LENGTHS = [5, LENGTH, 33, 2, 64, LENGTH, 17, 40, 3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A float32 Llama and where it is saved."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    return save(LlamaForCausalLM(LlamaConfig(**LLAMA)), path), path


@pytest.fixture(scope="module")
def head_engine(llama: tuple[Any, Path]) -> Iterator[VllmEngine]:
    """Steps of 64 tokens: the long sequences take several, a window holds a few sequences."""
    engine = open_engine(
        TeacherConfig(path=str(llama[1]), engine="vllm", max_batch_tokens=64),
        str(llama[1]),
        vocab_size=VOCAB,
        truncation=Truncation(k=K),
        temperatures=TEMPERATURES,
        max_length=LENGTH,
    )
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def head_scored(head_engine: VllmEngine) -> list[ScoredSequence]:
    """All of LENGTHS."""
    return list(head_engine.score(sequences_of(LENGTHS), 0))


def test_head_agrees_with_a_plain_forward(
    llama: tuple[Any, Path], head_engine: VllmEngine, head_scored: list[ScoredSequence]
) -> None:
    """Ragged lengths, partial masks, length == max_position_embeddings, padding rows cut."""
    assert head_engine.route == "head"
    for sequence, scored in zip(sequences_of(LENGTHS), head_scored, strict=True):
        assert scored.sample_id == sequence.sample_id
        assert np.array_equal(scored.input_ids, sequence.input_ids)
        check_sequence(scored, layout(K, TEMPERATURES, False, VOCAB))
        logits = reference_logits(llama[0], sequence, VOCAB)
        assert_agrees(scored, logits, TEMPERATURES, tolerance=2e-4)


def test_neighbouring_rows_would_not_agree(
    llama: tuple[Any, Path], head_scored: list[ScoredSequence]
) -> None:
    """The comparison above sees an off-by-one: other rows of the same forward are far away."""
    scored = head_scored[1]
    everything = np.arange(LENGTH) > 0
    whole = TokenSequence("all", scored.input_ids, everything)
    logp = log_softmax(reference_logits(llama[0], whole, VOCAB))
    for shift in (-1, 1):
        rows = (scored.positions - 1 + shift) % len(logp)
        shifted = logp[rows, scored.labels]
        assert np.median(np.abs(shifted - scored.label_logprob)) > 1.0


def test_a_run_left_unfinished_does_not_mix_with_the_next(
    head_engine: VllmEngine, head_scored: list[ScoredSequence]
) -> None:
    """Windows of an abandoned run are on their way when the next one starts."""
    next(iter(head_engine.score(sequences_of([LENGTH] * 12, seed=5), 0)))
    again = list(head_engine.score(sequences_of(LENGTHS), 0))
    for one, other in zip(head_scored, again, strict=True):
        assert one.sample_id == other.sample_id
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=1e-4)


def test_a_sequence_longer_than_the_model_is_refused_by_name(head_engine: VllmEngine) -> None:
    """The engine reads LENGTH tokens."""
    with pytest.raises(EngineError, match=f"sample-0 has {LENGTH + 1} tokens.* {LENGTH};"):
        list(head_engine.score(sequences_of([LENGTH + 1]), 0))


ROPES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "plain": (LlamaConfig, {}, f"reads at most {LENGTH} tokens .* up to {2 * LENGTH}"),
    "longrope": (
        Phi3Config,
        {
            "max_position_embeddings": 2 * LENGTH,
            "original_max_position_embeddings": LENGTH,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": LENGTH,
            },
        },
        f"reads at most {LENGTH} tokens .* up to {2 * LENGTH}",
    ),
    "dynamic": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "scales its positions by the length of each text",
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_lengths_that_vllm_does_not_read_are_refused_at_loading(name: str, tmp_path: Path) -> None:
    """Not sequence by sequence, when hours have passed; nor read by other factors."""
    kind, options, message = ROPES[name]
    AutoModelForCausalLM.from_config(kind(**LLAMA | options)).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=message):
        open_engine(
            TeacherConfig(path=str(tmp_path), engine="vllm"),
            str(tmp_path),
            vocab_size=VOCAB,
            truncation=Truncation(k=K),
            temperatures=(1.0,),
            max_length=2 * LENGTH,
        )


def check_poison(engine: VllmEngine, model: Any, vocab_size: int) -> None:
    """A poisoned sequence among many is named by its index; all others are scored as ever."""
    sequences = sequences_of([40, 8, LENGTH, 70, 8, 33], seed=8)
    sequences[3].input_ids[5] = POISON
    sequences[3].is_target[:] = np.arange(70) > 0
    scored = []
    with pytest.raises(
        SequenceError, match="NaN or infinite logits for sample sample-3;"
    ) as caught:
        for one in engine.score(sequences, 0):
            scored.append(one)
    assert caught.value.index == len(scored) == 3
    scored += engine.score(sequences[4:], 4)
    healthy = sequences[:3] + sequences[4:]
    for sequence, one in zip(healthy, scored, strict=True):
        logits = reference_logits(model, sequence, vocab_size)
        assert_agrees(one, logits, TEMPERATURES[: one.log_z.shape[1]], tolerance=2e-4)


def test_nan_logits_name_the_sequence(llama: tuple[Any, Path], head_engine: VllmEngine) -> None:
    """The worker lives on, and what the poison left in its memory touches no other sequence."""
    process = head_engine._worker.process
    check_poison(head_engine, llama[0], VOCAB)
    check_poison(head_engine, llama[0], VOCAB)
    assert process.poll() is None


# Several processes of vLLM's: two ranks that share every layer.


def test_tensor_parallel_ranks_agree_with_a_plain_forward(
    llama: tuple[Any, Path], head_scored: list[ScoredSequence]
) -> None:
    """The head reaches vLLM's own processes; one of them killed is an error, not a wait."""
    engine = VllmEngine(
        TeacherConfig(path=str(llama[1]), engine="vllm", max_batch_tokens=64, tensor_parallel=2),
        str(llama[1]),
        vocab_size=VOCAB,
        truncation=Truncation(k=K),
        temperatures=TEMPERATURES,
        max_length=LENGTH,
    )
    try:
        sequences = sequences_of(LENGTHS)
        found = list(engine.score(sequences, 0))
        for sequence, one, other in zip(sequences, found, head_scored, strict=True):
            logits = reference_logits(llama[0], sequence, VOCAB)
            assert_agrees(one, logits, TEMPERATURES, tolerance=2e-4)
            np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=1e-4)
        check_poison(engine, llama[0], VOCAB)
        ranks = psutil.Process(engine._worker.process.pid).children(recursive=True)
        ranks = [rank for rank in ranks if "Worker" in " ".join(rank.cmdline())]
        assert len(ranks) == 2
        ranks[1].kill()
        with pytest.raises(EngineError, match="Its last lines:"):
            list(engine.score(sequences_of([LENGTH] * 40), 0))
    finally:
        engine.close()
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)


# Capped logits: Gemma 2.


def test_capped_logits_agree_with_a_plain_forward(tmp_path: Path) -> None:
    """The model's own last step applies the cap; attention is capped too, and partly windowed."""
    torch.manual_seed(4)
    settings = Gemma2Config(
        **LLAMA | {"tie_word_embeddings": True},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        final_logit_softcapping=6.0,
    )
    model = Gemma2ForCausalLM._from_config(settings, attn_implementation="eager")
    model.eval().save_pretrained(tmp_path)  # with tied embeddings POISON would be in all logits
    engine = open_engine(
        TeacherConfig(path=str(tmp_path), engine="vllm", max_batch_tokens=64),
        str(tmp_path),
        vocab_size=VOCAB,
        truncation=Truncation(k=K),
        temperatures=(1.0, 0.5),
        max_length=LENGTH,
    )
    try:
        sequences = sequences_of(LENGTHS)
        results = list(engine.score(sequences, 0))
    finally:
        engine.close()
    steepest = 0.0
    for sequence, scored in zip(sequences, results, strict=True):
        check_sequence(scored, layout(K, (1.0, 0.5), False, VOCAB))
        logits = reference_logits(model, sequence, VOCAB)
        assert np.abs(logits).max() < 6
        steepest = max(steepest, np.abs(np.arctanh(logits / 6) * 6 - logits).max())
        assert_agrees(scored, logits, (1.0, 0.5), tolerance=2e-4)
    assert steepest > 1, "the cap changes these logits"


# The scoring head with sampling: GPT-2, learned positions.


def test_sampling_head_draws_from_the_teacher(tmp_path: Path) -> None:
    """An exact head, then draws by inversion with the numbers of the sequence's plan index."""
    torch.manual_seed(2)
    settings = GPT2Config(**SIZES, n_embd=64, n_layer=2, n_head=2, n_positions=LENGTH)
    model = GPT2LMHeadModel(settings)
    model.save_pretrained(tmp_path)
    model.eval()
    truncation = Truncation(method="topk+sample", k=4, draws=12, seed=9)
    engine = open_engine(
        TeacherConfig(path=str(tmp_path), engine="vllm", max_batch_tokens=128),
        str(tmp_path),
        vocab_size=ROWS,
        truncation=truncation,
        temperatures=(1.0, 0.5),
        max_length=LENGTH,
    )
    sequences, first = sequences_of([LENGTH, 7, 50]), 21
    assert isinstance(engine, VllmEngine)
    process = engine._worker.process
    try:
        results = list(engine.score(sequences, first))
    finally:
        engine.close()
    assert process.returncode == 0, "the worker ends by itself when its pipe closes"
    drawn, expected = [], []
    for index, (sequence, scored) in enumerate(zip(sequences, results, strict=True)):
        check_sequence(scored, layout(truncation.slots, (1.0, 0.5), True, ROWS))
        assert scored.draws is not None
        logp = log_softmax(reference_logits(model, sequence, ROWS))
        np.testing.assert_allclose(
            scored.logprobs[:, :4], -np.sort(-logp, axis=1)[:, :4], atol=2e-4
        )
        uniforms = uniforms_for(truncation, first + index, len(logp))
        for target, row in enumerate(np.exp(logp)):
            row[scored.token_ids[target, :4]] = 0
            cumulative = np.cumsum(row)
            ids = np.searchsorted(cumulative, uniforms[target] * cumulative[-1], side="right")
            expected.append(np.sort(ids))
            tail = slice(4, None)
            used = scored.token_ids[target, tail] >= 0
            counts = scored.draws[target, tail][used]
            drawn.append(np.sort(np.repeat(scored.token_ids[target, tail][used], counts)))
    assert np.mean(np.stack(drawn) == np.stack(expected)) > 0.99


# A half precision model as saved: Qwen2.


def test_auto_dtype_is_the_saved_one(tmp_path: Path) -> None:
    """A bfloat16 model is scored in bfloat16: near the float32 forward, but not that near."""
    torch.manual_seed(3)
    reference = save(Qwen2ForCausalLM(Qwen2Config(**LLAMA)).to(torch.bfloat16), tmp_path)
    silent = SimpleNamespace(dtype=None, get_text_config=lambda: SimpleNamespace(dtype=None))
    assert saved_dtype(silent, str(tmp_path)) == "bfloat16"
    engine = open_engine(
        TeacherConfig(path=str(tmp_path), engine="vllm"),
        str(tmp_path),
        vocab_size=VOCAB,
        truncation=Truncation(method="topp", k=K, p=0.9, min_k=2),
        temperatures=(1.0,),
        max_length=LENGTH,
    )
    try:
        results = list(engine.score(sequences_of([40, 9]), 0))
    finally:
        engine.close()
    errors = []
    for sequence, scored in zip(sequences_of([40, 9]), results, strict=True):
        check_sequence(scored, layout(K, (1.0,), False, VOCAB))
        mass = np.exp(scored.logprobs).sum(axis=1)
        full = (scored.token_ids >= 0).all(axis=1)
        assert np.all((mass >= 0.9) | full)
        logp = log_softmax(reference_logits(reference, sequence, VOCAB))
        errors.append(scored.label_logprob - logp[np.arange(len(logp)), scored.labels])
    error = np.abs(np.concatenate(errors))
    assert 1e-3 < np.max(error) < 1.0


# The public route.


@pytest.fixture(scope="module")
def helium(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A float32 model that vLLM runs through its transformers backend, and where it is saved."""
    path = tmp_path_factory.mktemp("helium")
    torch.manual_seed(5)
    return save(HeliumForCausalLM(HeliumConfig(**LLAMA, head_dim=32, pad_token_id=0)), path), path


@pytest.fixture(scope="module")
def flat_engine(helium: tuple[Any, Path]) -> Iterator[VllmEngine]:
    """The route that the check at start leaves for it."""
    engine = open_engine(
        TeacherConfig(path=str(helium[1]), engine="vllm", max_batch_tokens=64),
        str(helium[1]),
        vocab_size=ROWS,
        truncation=Truncation(k=K),
        temperatures=(1.0,),
        max_length=LENGTH,
    )
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


def test_prompt_logprobs_agree_with_a_plain_forward(
    helium: tuple[Any, Path], flat_engine: VllmEngine
) -> None:
    """Also for a sequence that fills the model: the token vLLM must generate costs no position."""
    assert flat_engine.route == "prompt_logprobs"
    sequences = sequences_of(LENGTHS)
    for sequence, scored in zip(sequences, flat_engine.score(sequences, 0), strict=True):
        check_sequence(scored, layout(K, (1.0,), False, ROWS))
        logits = reference_logits(helium[0], sequence, ROWS)
        assert_agrees(scored, logits, (1.0,), tolerance=2e-4)


def test_nan_from_prompt_logprobs_names_the_sequence(
    helium: tuple[Any, Path], flat_engine: VllmEngine
) -> None:
    """The other route keeps the same promise."""
    check_poison(flat_engine, helium[0], ROWS)


def test_a_killed_worker_is_replaced(helium: tuple[Any, Path], flat_engine: VllmEngine) -> None:
    """The error says how it ended; the next call loads the teacher again."""
    scores = flat_engine.score(sequences_of([LENGTH] * 40), 0)
    next(scores)
    os.kill(flat_engine._worker.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"ended by SIGKILL; the memory may be too small"):
        list(scores)
    (sequence,) = sequences_of([33], seed=4)
    (scored,) = flat_engine.score([sequence], 0)
    assert_agrees(scored, reference_logits(helium[0], sequence, ROWS), (1.0,), tolerance=2e-4)
    flat_engine.close()
    flat_engine.close()


def reduction(**changes: Any) -> Reduction:
    """What prompt_logprobs can give, with changes."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "truncation": Truncation(k=K),
        "temperatures": (1.0,),
    }
    return Reduction(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": (1.0, 2.0)}, r"temperatures \[1.0, 2.0\]"),
        ({"truncation": Truncation(method="sample", draws=8)}, "truncation.method sample"),
        ({"vocab_size": VOCAB - 1}, "500 output rows for a vocabulary of 499"),
    ],
)
def test_prompt_logprobs_refuse_what_they_cannot_give(
    changes: dict[str, Any], message: str
) -> None:
    """The message names the obstacle and the way out."""
    check(reduction(), VOCAB, "no head")
    with pytest.raises(Refused, match=message + ".*no head.*teacher.engine: transformers"):
        check(reduction(**changes), VOCAB, "no head")


def flat_answer(logp: list[float], label: int) -> Any:
    """What vLLM says of a second token `label` whose top 2 of 4 are ids 3 and 1."""
    kept = [3, 1]
    return SimpleNamespace(
        token_ids=[label, *kept], logprobs=[logp[label], *(logp[i] for i in kept)]
    )


def tail_of(logp: list[float], label: int) -> float:
    """The packed log tail, second from the end."""
    ids = np.array([0, label], dtype=np.int32)
    two_of_four = reduction(vocab_size=4, truncation=Truncation(k=2))
    rows = rows_from_flat(flat_answer(logp, label), two_of_four, ids, np.array([1]))
    assert rows is not None
    return float(rows.view(np.float32)[0, -2])


def test_the_tail_of_prompt_logprobs_is_bounded_by_what_is_known() -> None:
    """1 - sum p, but not below the mass of a label outside the top k, nor above (V - k) p_k."""
    assert tail_of(np.log([0.05, 0.2, 0.05, 0.7]).tolist(), 3) == pytest.approx(np.log(0.1))
    tiny = 1e-9
    rounded = [np.log(tiny), np.log(1e-3), np.log(tiny), float(np.log1p(-1e-3))]
    assert tail_of(rounded, 3) == pytest.approx(np.log(TAIL_RESOLUTION))
    certain = [np.log(1e-5), np.log(2e-5), -100.0, 0.0]
    assert tail_of(certain, 0) == pytest.approx(np.log(1e-5), abs=1e-5)
    assert tail_of([-90.0, -80.0, -95.0, 0.0], 3) == pytest.approx(-80 + np.log(2))


def test_prompt_logprobs_give_the_label_alone() -> None:
    """What vLLM says of the token itself, when it is asked for no others."""
    alone = reduction(vocab_size=4, truncation=Truncation(method="label"))
    check(alone, 4, "no head")
    flat = SimpleNamespace(token_ids=[2, 3], logprobs=[-0.5, -0.25])
    rows = rows_from_flat(flat, alone, np.array([0, 2, 3], dtype=np.int32), np.array([1, 2]))
    assert rows is not None and rows.shape == (2, alone.row_words)
    np.testing.assert_array_equal(rows.view(np.float32), [[0, -0.5], [0, -0.25]])


# Sampling responses.


def test_responses_follow_their_seeds(llama: tuple[Any, Path]) -> None:
    """Equal calls give equal responses, stop ids end them, and padding is never drawn.

    Log probs are those of a plain forward: over the vocabulary without the padding, at T=1.
    """
    sampling = Sampling(
        temperature=1.5, top_p=0.95, stop_ids=(7,), vocab_size=VOCAB - 1, with_logprobs=True
    )
    config = TeacherConfig(path=str(llama[1]), engine="vllm", max_batch_tokens=64)
    rng = np.random.default_rng(6)
    prompts = [
        Prompt(
            token_ids=rng.integers(8, POISON, 4 + i).astype(np.int32),
            max_new_tokens=20,
            seed=2**62 + i,
        )
        for i in range(12)
    ]
    generator = open_generator(config, str(llama[1]), sampling=sampling, max_length=LENGTH)
    try:
        once, again = generator.generate(prompts), generator.generate(prompts)
        alone = [generator.generate([prompt])[0] for prompt in prompts[:3]]
        with pytest.raises(EngineError, match="NaN logits while it samples"):
            poisoned = np.array([3, POISON, 4], dtype=np.int32)
            generator.generate([Prompt(token_ids=poisoned, max_new_tokens=4, seed=0)])
    finally:
        generator.close()
    for one, other in [*zip(once, again, strict=True), *zip(once, alone, strict=False)]:
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        assert one.finish_reason == other.finish_reason
    for prompt, one in zip(prompts, once, strict=True):
        ids = np.concatenate([prompt.token_ids, one.token_ids])
        with torch.no_grad():
            logits = llama[0](torch.tensor(ids[None].astype(np.int64))).logits[0].double()
        start = len(prompt.token_ids) - 1
        logq = logits[start:-1, : VOCAB - 1].log_softmax(-1).numpy()
        expected = logq[np.arange(len(one.token_ids)), one.token_ids]
        np.testing.assert_allclose(one.logprobs, expected, rtol=0, atol=1e-4)
    for one in once:
        assert one.token_ids.max() < VOCAB - 1 and 1 <= len(one.token_ids) <= 20
        ends = one.token_ids[-1] == 7
        assert one.finish_reason == ("stop" if ends else "length")
        assert ends or len(one.token_ids) == 20
        assert not (one.token_ids[:-1] == 7).any()
    drawn = np.concatenate([one.token_ids for one in once])
    assert len(np.unique(drawn)) > 50, "a wide teacher at a high temperature says many things"
