"""What servers and trainers save becomes truthful caches: JSON lines, tars, binary files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from decant.schemas import ScoredSequence, Truncation
from decant.storage import CacheReader, verify
from decant.storage.exchange.distillkit_codec import Codec, LegacyCodec, read_codec
from decant.storage.exchange.foreign import ForeignError
from decant.storage.exchange.importing import import_cache
from tests.support import FIXTURES, caches
from tests.support import foreign_files as files
from tests.support.foreign import K, Known, V, assert_is_known, config, known_records, write

LINES: dict[str, tuple[str, Callable[[list[Known]], Any]]] = {
    "vllm engine": ("vllm", files.vllm_outputs),
    "vllm flat": ("vllm", files.vllm_flat),
    "vllm batch": ("vllm", files.vllm_chosen),
    "trl lists": ("trl", lambda records: [files.trl_sequences(records)]),
    "trl binary": ("trl", lambda records: [files.trl_binary(records)]),
    "trl generated": ("trl", lambda records: [files.trl_generated(records)]),
    "tinker prompts": ("tinker", files.tinker_prompts),
    "tinker sampled": ("tinker", files.tinker_sampled),
}


def sequences(source: Path, cache: Path, file_format: str, **options: Any) -> list[ScoredSequence]:
    """What an import gives, after `verify`."""
    import_cache(config(source, file_format, **options), cache)
    report = verify(cache)
    assert report.ok, report.problems
    return list(CacheReader(cache))


@pytest.mark.parametrize("kind", list(LINES))
def test_answers_become_a_cache(kind: str, tmp_path: Path) -> None:
    """Every target with its top K, its tail, and its actual token's log prob, kept or not."""
    file_format, make = LINES[kind]
    records = known_records(labels_kept=False)
    source = files.json_lines(tmp_path / "answers.jsonl", make(records))
    found = sequences(source, tmp_path / "cache", file_format)
    assert len(found) == len(records)
    for sequence, record in zip(found, records, strict=True):
        assert_is_known(sequence, record)


@pytest.mark.parametrize("prompt", [1, 4])
def test_completions_alone_are_targets(prompt: int, tmp_path: Path) -> None:
    """Lists of TRL's server begin with the first token of the completion."""
    records = known_records(labels_kept=False)
    for form in (files.trl_sequences, files.trl_binary):
        source = files.json_lines(tmp_path / "answers.jsonl", [form(records, prompt)])
        cache = tmp_path / form.__name__
        for sequence, record in zip(sequences(source, cache, "trl"), records, strict=True):
            np.testing.assert_array_equal(sequence.positions, range(prompt, len(record.input_ids)))
            np.testing.assert_array_equal(sequence.token_ids, record.top()[0][prompt - 1 :])


def changed(line: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {k: v for k, v in (line | fields).items() if v is not None}


BAD: dict[str, tuple[str, Callable[[list[Known]], dict[str, Any]], str]] = {
    "vllm without": (
        "vllm",
        lambda r: {"prompt_token_ids": [1, 2], "text": "x"},
        "line 2: no prompt_logprobs, found prompt_token_ids, text: ask vLLM",
    ),
    "vllm tokens": (
        "vllm",
        lambda r: changed(files.vllm_outputs(r)[0], prompt_token_ids=None),
        "line 2: no prompt_token_ids: ask the server",
    ),
    "vllm short": (
        "vllm",
        lambda r: changed(files.vllm_outputs(r)[0], prompt_token_ids=[1, 2, 3]),
        "line 2: prompt_logprobs has 10 lists for 3 tokens",
    ),
    "vllm status": (
        "vllm",
        lambda r: {"custom_id": "1", "response": {"status_code": 500, "body": None}},
        "line 2: status 500, no answer",
    ),
    "vllm shape": (
        "vllm",
        lambda r: changed(files.vllm_outputs(r)[0], prompt_logprobs=[None, *[[1, 2]] * 9]),
        r"line 2, list 1: expected \{\"ID\"",
    ),
    "trl temperature": (
        "trl",
        lambda r: changed(files.trl_sequences(r), temperature=0.7),
        r"line 2: temperature is 0\.7: the server tells log probs after it",
    ),
    "trl tokens": (
        "trl",
        lambda r: changed(files.trl_sequences(r), sequences=None),
        "line 2: no tokens, found .*: add the request's sequences and prompt_lengths",
    ),
    "trl null": (
        "trl",
        lambda r: changed(files.trl_sequences(r[:1]), logprobs=[[[None] * K] * 9]),
        "line 2: logprobs and logprob_token_ids differ in shape|line 2, list 0: None is not a num",
    ),
    "trl lists": (
        "trl",
        lambda r: changed(files.trl_sequences(r), prompt_lengths=[2] * 5),
        "line 2 sequence 0: 9 lists for 8 tokens of the completion",
    ),
    "trl array": (
        "trl",
        lambda r: changed(files.trl_binary(r), shape=[5, 5, 5]),
        "line 2: its arrays cannot be read",
    ),
    "tinker tokens": (
        "tinker",
        lambda r: changed(files.tinker_prompts(r)[0], prompt=None),
        "line 2: no tokens, found .*save the request's prompt",
    ),
    "tinker without": (
        "tinker",
        lambda r: changed(files.tinker_prompts(r)[0], topk_prompt_logprobs=None),
        "line 2: neither topk_prompt_logprobs nor topk_logprobs",
    ),
    "tinker length": (
        "tinker",
        lambda r: changed(files.tinker_prompts(r)[0], topk_prompt_logprobs=[[[1, -0.5]]]),
        "line 2: topk_prompt_logprobs has 1 entries for 10 tokens",
    ),
    "tinker tempered": (
        "tinker",
        lambda r: changed(files.tinker_sampled(r)[0], sampling_params={"temperature": 0.5}),
        r"line 2: sampled at temperature 0\.5",
    ),
    "id": (
        "vllm",
        lambda r: changed(
            files.vllm_outputs(r)[0], prompt_logprobs=[None, *[{"x": {"logprob": -1.0}}] * 9]
        ),
        "line 2, list 1: invalid literal",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_answers_are_named(name: str, tmp_path: Path) -> None:
    """File and line, what was found, and a way out; nothing is left."""
    file_format, make, message = BAD[name]
    records = known_records()
    good = next(m for f, m in LINES.values() if f == file_format)(records)[:1]
    source = files.json_lines(tmp_path / "answers.jsonl", [*good, make(records)])
    with pytest.raises(ForeignError, match=message) as caught:
        import_cache(config(source, file_format), tmp_path / "cache")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("name", ["plain-polynomial", "deltas", "residuals", "legacy"])
def test_distillkits_codecs_are_decoded_as_it_decodes_them(name: str, tmp_path: Path) -> None:
    """Ids are equal; values to the last bits of the dtype that its decoder computes in."""
    source = FIXTURES / "distillkit" / name
    found = sequences(source, tmp_path / "cache", "distillkit")
    decoded = pq.read_table(FIXTURES / "distillkit" / "decoded" / f"{name}.parquet").to_pylist()
    codec = read_codec("", str(source))
    told = CacheReader(tmp_path / "cache").manifest.source["codec"]
    assert told["k"] == K and told["exact_k"] == codec.exact_k
    assert isinstance(codec, LegacyCodec if name == "legacy" else Codec)
    steps = {"residuals": 2.0**-10}  # of float16; the others compute in float32
    for sequence, row in zip(found, decoded, strict=True):
        ids, values = np.array(row["token_ids"]), np.array(row["top_values"])
        order = np.argsort(-values, axis=1, kind="stable")
        values = np.take_along_axis(values, order, 1)
        over = np.maximum(np.log(np.exp(values).sum(axis=1)), 0)
        values -= np.where(over > 5e-5, over, 0)[:, None]
        np.testing.assert_array_equal(sequence.token_ids, np.take_along_axis(ids, order, 1))
        np.testing.assert_allclose(sequence.logprobs, values, rtol=steps.get(name, 1e-6), atol=1e-6)


def test_packed_documents_are_taken_apart(tmp_path: Path) -> None:
    """Rows of DistillKit's packer: a sequence per document, without the list behind its end."""
    found = sequences(FIXTURES / "distillkit/packed", tmp_path / "packed", "distillkit")
    alone = sequences(FIXTURES / "distillkit/deltas", tmp_path / "alone", "distillkit")
    assert [s.sample_id for s in found] == ["0.0", "0.1", "1.0", "1.1", "2"]
    for sequence in found:
        length = len(sequence.input_ids)
        (whole,) = [s for s in alone if np.array_equal(s.input_ids[:length], sequence.input_ids)]
        np.testing.assert_array_equal(sequence.positions, range(1, length))
        np.testing.assert_array_equal(sequence.token_ids, whole.token_ids[: length - 1])
        np.testing.assert_array_equal(sequence.logprobs, whole.logprobs[: length - 1])


def test_a_codec_must_be_known_and_fit(tmp_path: Path) -> None:
    """Without settings, with those of other rows, or with those that give no distributions."""
    rows = pq.read_table(FIXTURES / "distillkit/plain-polynomial/data_0.parquet").to_pylist()
    source = write(tmp_path / "data_0.parquet", rows)
    settings = FIXTURES / "distillkit/plain-polynomial/compression_config.yaml"

    def refuse(message: str, text: str = "") -> None:
        codec = tmp_path / "codec.yaml"
        codec.write_text(text)
        with pytest.raises(ForeignError, match=message):
            import_cache(config(source, codec=str(codec) if text else ""), tmp_path / "cache")

    refuse("row 0: these rows are compressed, and nothing in them says how: give --codec")
    good = settings.read_text()
    refuse(
        r"20 bytes of values and 6 of ids per token, but .* 22 and 6",
        good.replace("_k: 4", "_k: 5"),
    )
    refuse(
        r"of the mass is neither|add up to",
        good.replace("delta_encoding: false", "delta_encoding: true"),
    )
    refuse("exact_dtype is 'int8'", good.replace("exact_dtype: bfloat16", "exact_dtype: int8"))
    refuse("expected keys with values", "- 1\n")
    refuse("expected DistillKit's settings of a codec: d, k", "k: 8\n")
    legacy = (FIXTURES / "distillkit/legacy/compression_config.yaml").read_text()
    refuse("those given are of its other codec", legacy)


def test_sums_beyond_rounding_are_refused_or_scaled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fit that gives more than 1 in all is named with the option that scales it down to 1."""
    rows = [
        {
            "input_ids": r.input_ids,
            "token_ids": r.top()[0],
            "top_values": [[v + 0.3 for v in values] for values in r.top()[1]],
        }
        for r in known_records(spread=4.0)
    ]
    source = write(tmp_path / "dump.parquet", rows)
    with pytest.raises(
        ForeignError, match=r"fitted, --max-excess 0\.3\d? to scale such lists to 1 \(\d+ of 75"
    ):
        import_cache(config(source), tmp_path / "cache")
    found = sequences(source, tmp_path / "cache", "distillkit", max_excess=0.4)
    source_fields = CacheReader(tmp_path / "cache").manifest.source
    assert source_fields["scaled_targets"] > 0 and "scaled to 1" in caplog.text
    mass = np.concatenate([np.exp(s.logprobs).sum(axis=1) for s in found])
    assert (mass <= 1 + 1e-6).all()


@pytest.mark.parametrize(("cp", "dp", "batch"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_megatrons_tars_are_read_in_the_order_of_training(
    cp: int, dp: int, batch: int, tmp_path: Path
) -> None:
    """Ranks of context and data are put together, and matched with the samples' tokens."""
    records = files.same_length(known_records(8))
    folder = files.megatron_tars(
        tmp_path / "tars", records, cp=cp, dp=dp, batch=batch, dtype=torch.float32, per_tar=2
    )
    np.save(tmp_path / "tokens.npy", np.array([r.input_ids for r in records], np.int32))
    options = {"tokens": str(tmp_path / "tokens.npy")}
    found = sequences(folder, tmp_path / "cache", "megatron", **options)
    assert len(found) == len(records)
    for sequence, record in zip(found, records, strict=True):
        assert_is_known(sequence, record)


def test_megatrons_float16_and_nuclei(tmp_path: Path) -> None:
    """Values to float16's step; lists of varying length stay so, or are cut to the shortest."""
    records = files.same_length(known_records(4))
    tokens = write(tmp_path / "t.jsonl", [{"input_ids": r.input_ids} for r in records])
    half = files.megatron_tars(tmp_path / "half", records)
    found = sequences(half, tmp_path / "cache", "megatron", tokens=str(tokens))
    for sequence, record in zip(found, records, strict=True):
        np.testing.assert_array_equal(sequence.token_ids, record.top()[0])
        np.testing.assert_allclose(sequence.logprobs, record.top()[1], rtol=2.0**-11)
    nuclei = files.megatron_tars(tmp_path / "nuclei", records, nucleus=0.6)
    options = {"tokens": str(tokens), "unknown_label": "bound"}
    with pytest.raises(ForeignError, match="--varying to keep each list as it is"):
        import_cache(config(nuclei, "megatron", **options), tmp_path / "out")
    found = sequences(nuclei, tmp_path / "varying", "megatron", varying=True, **options)
    truncation = CacheReader(tmp_path / "varying").manifest.truncation
    counts = np.concatenate([(s.token_ids >= 0).sum(axis=1) for s in found])
    assert len(set(counts)) > 1
    assert truncation == Truncation(method="topp", k=counts.max(), p=0.6, min_k=counts.min())


def test_what_megatron_left_incomplete_is_refused(tmp_path: Path) -> None:
    """Missing ranks or iterations, too few tokens, another kind of file; the tokens are needed."""
    records = files.same_length(known_records(4))
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.array([r.input_ids for r in records], np.int32))

    def refuse(folder: Path, message: str, **options: Any) -> None:
        options = {"tokens": str(tokens)} | options
        with pytest.raises(ForeignError, match=message):
            import_cache(config(folder, "megatron", **options), tmp_path / "cache")

    with pytest.raises(ValueError, match="--format megatron needs --tokens"):
        config(tmp_path, "megatron")
    ranks = files.megatron_tars(tmp_path / "ranks", records, dp=2)
    (ranks / "cp0_dp0__1.tar").rename(tmp_path / "aside.tar")
    refuse(ranks, "ranks are at different iterations")
    (ranks / "cp0_dp0__2.tar").unlink()
    refuse(ranks, r"no cp0_dp0__\*\.tar, but tars of higher ranks")
    gap = files.megatron_tars(tmp_path / "gap", records)
    (gap / "cp0_dp0__2.tar").unlink()
    refuse(gap, r"cp0_dp0__3\.tar member 3\.pt\.zst: iteration 3 follows 1: expected 2")
    few = tmp_path / "few.npy"
    np.save(few, np.array([records[0].input_ids], np.int32))
    whole = files.megatron_tars(tmp_path / "whole", records)
    refuse(whole, r"few\.npy has 1 samples and no more", tokens=str(few))
    np.save(few, np.array([r.input_ids[:-2] for r in records], np.int32))
    refuse(
        whole,
        r"8 lists, but sample 0 of .* has 7 tokens: expected as many, or one more",
        tokens=str(few),
    )
    (whole / "cp0_dp0__2.tar").write_bytes(b"no tar")
    refuse(whole, r"cp0_dp0__2\.tar cannot be read as a tar")
    refuse(tmp_path / "tokens.npy", "expected the directory of tars")


@pytest.mark.parametrize("k", [0, 8])
def test_llamacpps_whole_distributions_are_cut(k: int, tmp_path: Path) -> None:
    """The K most probable ids of the second half of each chunk, with an exact tail and label."""
    records = files.same_length(known_records(3, labels_kept=False))
    source = files.kld_base(tmp_path / "base.kld", records)
    cache = tmp_path / "cache"
    found = sequences(source, cache, "llamacpp", k=k, vocab_size=0)
    manifest = CacheReader(cache).manifest
    assert manifest.shared_vocab_size == V and manifest.truncation.k == (k or V)
    n_ctx = len(records[0].input_ids)
    first = n_ctx // 2
    for sequence, record in zip(found, records, strict=True):
        np.testing.assert_array_equal(sequence.input_ids, record.input_ids)
        np.testing.assert_array_equal(sequence.positions, range(first + 1, n_ctx))
        dense = record.dense[first:]
        kept = np.take_along_axis(dense, sequence.token_ids, 1)
        step = 16 / 65_535
        np.testing.assert_allclose(sequence.logprobs, kept, atol=step)
        if k:
            np.testing.assert_array_equal(sequence.token_ids, np.argsort(-dense, axis=1)[:, :k])
            tail = 1 - np.exp(kept).sum(axis=1)
            np.testing.assert_allclose(np.exp(sequence.log_tail[:, 0]), tail, atol=step)
        own = dense[np.arange(len(dense)), record.input_ids[first + 1 :]]
        np.testing.assert_allclose(sequence.label_logprob, own, atol=step)


def test_what_lies_at_llamacpps_floor_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """16 nats below the most probable id: an upper bound of the label, and no mass invented."""
    records = files.same_length(known_records(3, labels_kept=False))
    sharp = []
    for record in records:
        dense = 12 * record.dense
        dense -= np.logaddexp.reduce(dense, axis=1)[:, None]
        sharp.append(Known(record.input_ids, dense))
    source = files.kld_base(tmp_path / "base.kld", sharp)
    found = sequences(source, tmp_path / "cache", "llamacpp", k=4, vocab_size=0)
    own = np.concatenate([r.dense[i - 1, r.input_ids[i]][None] for r in sharp for i in range(5, 9)])
    labels = np.concatenate([s.label_logprob for s in found])
    assert (labels >= own - 1e-3).all() and (labels <= 0).all()
    floored = CacheReader(tmp_path / "cache").manifest.source["floored_labels"]
    assert floored == (own < -16).sum() > 0
    assert f"{floored} of 12 targets' actual tokens are at the floor" in caplog.text


def test_other_files_than_llamacpps_are_refused(tmp_path: Path) -> None:
    """No such file, another beginning, one that was not finished, another vocabulary."""
    records = files.same_length(known_records(3))
    source = files.kld_base(tmp_path / "base.kld", records)

    def refuse(name: str, message: str, **options: Any) -> None:
        options = {"vocab_size": 0} | options
        with pytest.raises(ValueError, match=message):
            import_cache(config(tmp_path / name, "llamacpp", **options), tmp_path / "cache")

    refuse("nothing", "expected the file of llama-perplexity")
    (tmp_path / "other").write_bytes(b"x" * 100)
    refuse("other", r"begins with b'xxxxxxxx': expected b'_logits_'")
    (tmp_path / "cut").write_bytes(source.read_bytes()[:-300])
    refuse("cut", r"2 chunks are whole: write it again")
    refuse("base.kld", "--vocab-size 61, but .* is of 60 ids", vocab_size=61)
    with pytest.raises(ValueError, match="--codec has no effect with --format llamacpp"):
        config(source, "llamacpp", codec="x")


@pytest.mark.parametrize("file_format", ["llamacpp", "vllm", "tinker"])
def test_shifted_rows_are_recognised_by_the_actual_tokens(file_format: str, tmp_path: Path) -> None:
    """Where every list holds nearly every id, their log probs tell."""
    generator = np.random.default_rng(5)
    records = []
    for _ in range(6):
        dense = caches.random_logprobs(generator, 12, V, 4.0)
        tokens = (dense + generator.gumbel(size=dense.shape)).argmax(axis=1)
        records.append(Known([0, *tokens.tolist()], dense))
    shifted = [Known(r.input_ids, np.roll(r.dense, 1, axis=0)) for r in records]
    if file_format == "llamacpp":
        source = files.kld_base(tmp_path / "base.kld", shifted)
    elif file_format == "vllm":
        source = files.json_lines(tmp_path / "answers.jsonl", files.vllm_outputs(shifted))
    else:  # the actual tokens' own log probs are right, the lists are not
        lines = files.tinker_prompts(shifted)
        for line, right in zip(lines, files.tinker_prompts(records), strict=True):
            line["prompt_logprobs"] = right["prompt_logprobs"]
        source = files.json_lines(tmp_path / "answers.jsonl", lines)
    options = {"k": V} if file_format == "llamacpp" else {}
    with pytest.raises(ForeignError, match="the rows are shifted; give --shift -1") as caught:
        import_cache(config(source, file_format, **options), tmp_path / "cache")
    assert "one token earlier" in str(caught.value)


def test_a_dump_without_shape_is_no_file_of_torch(tmp_path: Path) -> None:
    """A pickle that would run code is refused by name, and runs nothing."""
    import io
    import tarfile
    import zipfile

    import zstandard

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"cposix\nsystem\n(S'touch x'\ntR.")
    folder = tmp_path / "tars"
    folder.mkdir()
    data = zstandard.ZstdCompressor().compress(buffer.getvalue())
    with tarfile.open(folder / "cp0_dp0__1.tar", "w") as tar:
        info = tarfile.TarInfo("1.pt.zst")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    tokens = tmp_path / "t.jsonl"
    tokens.write_text(json.dumps({"input_ids": [1, 2]}))
    with pytest.raises(ForeignError, match=r"1\.pt\.zst holds no log probs .*posix\.system"):
        import_cache(config(folder, "megatron", tokens=str(tokens)), tmp_path / "cache")
