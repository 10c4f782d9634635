"""Claims about the dump job: what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.teacher_dump import (
    ConfigChanged,
    DumpConfig,
    TeacherConfig,
    dump,
)
from decant.teacher_dump.audit.run import audit
from tests.support import models
from tests.support.dumps import (
    HALF,
    assert_whole,
    change,
    failing_after,
    files,
    rows,
    save_records,
)


def test_a_dump_is_a_whole_cache(cache: Path, config: DumpConfig):
    """Verified, final, without inputs or temporaries, and its ids are the tokenizer's."""
    assert_whole(cache, cache)
    manifest = CacheReader(cache).manifest
    assert manifest.is_final and manifest.num_shards > 2
    assert manifest.shared_vocab_size == models.VOCAB_SIZE
    assert manifest.teacher.vocab_size == models.PADDED_VOCAB_SIZE
    texts = [json.loads(line) for line in Path(config.source.path).read_text().splitlines()]
    tokenizer = models.build_tokenizer()
    for record, sequence in zip(texts, CacheReader(cache), strict=True):
        assert sequence.sample_id == record["id"]
        ids = [*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id][:64]
        assert sequence.input_ids.tolist() == ids
        assert sequence.is_target.tolist() == [False] + [True] * (len(ids) - 1)


def test_row_t_is_the_prediction_of_token_t(cache: Path, teacher_path: Path):
    """From text file to shard: a stored distribution is row t - 1 of a plain forward."""
    model = models.build_model()
    for index in (0, 17, 89):
        sequence = CacheReader(cache)[index]
        with torch.inference_mode():
            logits = model(torch.tensor(sequence.input_ids).long()[None]).logits[0]
        logp = logits[:-1, : models.VOCAB_SIZE].log_softmax(dim=1)
        labels = torch.tensor(sequence.labels).long()
        expected = logp.gather(1, labels[:, None])[:, 0]
        np.testing.assert_allclose(sequence.label_logprob, expected, atol=2e-4)
        np.testing.assert_allclose(sequence.logprobs, logp.topk(16).values, atol=2e-4)


def test_the_same_input_and_config_give_the_same_cache(cache: Path, config: DumpConfig):
    """Same id, same shard plan to the byte, equal rows."""
    manifest = dump(config)
    assert manifest.cache_id == CacheReader(cache).manifest.cache_id
    assert_whole(config.output, cache)
    plans = [files(Path(folder) / "plan") for folder in (config.output, cache)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("truncation", "precision"),
    [
        (Truncation(k=1), "compact"),
        (Truncation(k=models.VOCAB_SIZE), "compact"),
        (Truncation(k=models.VOCAB_SIZE), "f16"),
        (Truncation(method="topp", k=24, p=0.5), "compact"),
        (Truncation(method="topp", k=24, p=0.5), "f16"),
        (Truncation(method="sample", draws=12, seed=1), "compact"),
        (Truncation(method="topk+sample", k=4, draws=6), "f32"),
        (Truncation(method="label"), "compact"),
    ],
    ids=lambda t: t if isinstance(t, str) else f"{t.method}-{t.slots}",
)
def test_every_truncation_and_precision_verifies(config: DumpConfig, truncation, precision):
    """What a dump writes passes the checks of `verify`, at all temperatures that it may have."""
    temperatures = [1.0, 0.5, 4.0] if truncation.rule.has_logprobs else [1.0]
    config = change(change(config, "source.limit", 8), "temperatures", temperatures)
    dump(dataclasses.replace(config, truncation=truncation, precision=precision))
    report = verify(config.output)
    assert report.problems == () and report.sequences == 8


def test_a_complete_cache_is_left_alone(config: DumpConfig):
    """A rerun gives the same manifest and touches no file."""
    first = dump(change(config, "source.limit", 10))

    def state() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in Path(config.output).rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = state()
    assert dump(change(config, "source.limit", 10)) == first
    assert state() == before


def test_ready_ids_need_no_tokenizer(config: DumpConfig, tmp_path: Path):
    """teacher.tokenizer: none scores input_ids over all output rows; loss_mask picks targets."""
    last = models.PADDED_VOCAB_SIZE - 1
    source = save_records(
        tmp_path / "ids.jsonl",
        {"id": 7, "input_ids": [5, 6, last, 8]},
        {"input_ids": [5, 6, 7], "loss_mask": [1, 0, 1]},
    )
    config = change(change(config, "source.path", str(source)), "teacher.tokenizer", "none")
    manifest = dump(config)
    assert manifest.shared_vocab_size == models.PADDED_VOCAB_SIZE
    assert manifest.tokenizer.fingerprint == "" and manifest.tokenizer.files == {}
    first, second = CacheReader(config.output)
    assert (first.sample_id, second.sample_id) == ("7", "ids.jsonl:1")
    assert first.labels.tolist() == [6, last, 8]
    assert second.positions.tolist() == [2]


def test_of_prompt_and_response_only_the_response_is_scored(config: DumpConfig, tmp_path: Path):
    """Its tokens and the eos have distributions; the prompt's rows are there, without one."""
    source = save_records(tmp_path / "sft.jsonl", {"prompt": "the fox", "response": " runs away"})
    dump(change(config, "source.path", str(source)))
    (sequence,) = CacheReader(config.output)
    tokenizer = models.build_tokenizer()
    prompt = len(tokenizer("the fox")["input_ids"])
    assert sequence.is_target.tolist() == [False] * prompt + [True] * sequence.num_targets
    assert tokenizer.decode(sequence.labels) == " runs away</s>"


def test_the_order_in_which_files_are_found_does_not_matter(config: DumpConfig, tmp_path: Path):
    """The same files made in another order, elsewhere, are the same source: a resume works."""
    records = {name: {"text": f"the {name} runs"} for name in ("a.jsonl", "b.jsonl", "x/c.jsonl")}
    for folder, names in (("one", list(records)), ("two", list(reversed(records)))):
        for name in names:
            save_records(tmp_path / folder / name, records[name])
    with failing_after(1), pytest.raises(RuntimeError):
        dump(change(config, "source.path", str(tmp_path / "one")))
    dump(change(config, "source.path", str(tmp_path / "two")))
    ids = [sequence.sample_id for sequence in CacheReader(config.output)]
    assert ids == ["a.jsonl:0", "b.jsonl:0", "x/c.jsonl:0"]


def test_an_object_store_works_as_a_directory_does(config: DumpConfig, cache: Path):
    """Through fsspec: start, break, resume, read."""
    config = change(config, "output", "memory://bucket/cache")
    with failing_after(HALF), pytest.raises(RuntimeError):
        dump(config)
    assert 0 < len(CacheReader(config.output, allow_incomplete=True)) < 90
    dump(config)
    assert rows(config.output) == rows(cache)


def test_a_quantised_teacher_is_named_in_the_manifest(config: DumpConfig, tmp_path: Path):
    """Which an audit runs again, and without which a rerun is refused."""
    pytest.importorskip("bitsandbytes")
    models.save_teacher(tmp_path / "teacher", hidden_size=64, intermediate_size=128)
    config = change(change(config, "teacher.path", str(tmp_path / "teacher")), "source.limit", 6)
    quantised = change(config, "teacher.quantization", "bnb-4bit")
    assert dump(quantised).teacher.dtype == "float32+bnb-4bit"
    with pytest.raises(ConfigChanged, match=r"has 'float32\+bnb-4bit', this run gives 'float32'"):
        dump(config)
    report = audit(config.output, TeacherConfig(path=config.teacher.path, device="cpu"), sample=6)
    assert report.ok, report
