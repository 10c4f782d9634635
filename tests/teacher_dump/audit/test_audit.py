"""Claims about the audit: what was dumped agrees with its teacher, and every fault has a name."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decant.schemas import Manifest, ScoredSequence, Truncation
from decant.storage import CacheReader, CacheWriter
from decant.storage.cache.writer import write_cache
from decant.teacher_dump import DumpConfig, EngineError, TeacherConfig, dump
from decant.teacher_dump.audit.report import AuditReport, report_text
from decant.teacher_dump.audit.run import audit
from tests.support import models
from tests.support.commands import command

SAMPLE = 24
TRUNCATIONS = {
    "topk": Truncation(k=16),
    "topp": Truncation(method="topp", k=24, p=0.8, min_k=2),
    "sample": Truncation(method="sample", draws=20),
    "topk+sample": Truncation(method="topk+sample", k=4, draws=12),
    "label": Truncation(method="label"),
}


def audited(url: Path, teacher: Path, **options: Any) -> AuditReport:
    """An audit on the CPU with small batches."""
    config = TeacherConfig(path=str(teacher), max_batch_tokens=256, **options)
    return audit(str(url), config, sample=SAMPLE)


def kinds(report: AuditReport) -> list[str]:
    """What was found."""
    return [finding.kind for finding in report.findings]


def texts(report: AuditReport) -> str:
    """The findings' lines."""
    return "\n".join(finding.text for finding in report.findings)


@pytest.fixture
def dumped(dump_config: DumpConfig, tmp_path: Path) -> Callable[..., Path]:
    """Dump with a changed config."""

    def run(name: str = "cache", **changes: Any) -> Path:
        path = tmp_path / name
        if not changes.get("truncation", TRUNCATIONS["topk"]).rule.has_logprobs:
            changes |= {"temperatures": [1.0], "precision": "compact"}
        dump(dataclasses.replace(dump_config, output=str(path), **changes))
        return path

    return run


def rewritten(
    source: Path,
    out: Path,
    change: Callable[[ScoredSequence], ScoredSequence],
    manifest: Callable[[Manifest], Manifest] = lambda draft: draft,
) -> Path:
    """A whole cache of the changed sequences of another, under its (changed) manifest."""
    reader = CacheReader(source)
    draft = manifest(draft_of(reader.manifest))
    write_cache(out, draft, map(change, reader), reader.plan)
    return out


def draft_of(held: Manifest) -> Manifest:
    """The start of a cache like another."""
    return Manifest.draft(
        teacher=held.teacher,
        tokenizer=held.tokenizer,
        shared_vocab_size=held.shared_vocab_size,
        truncation=held.truncation,
        temperatures=held.temperatures,
        precision=held.precision,
        source=held.source,
        sequences=held.sequences,
    )


def moved(sequence: ScoredSequence, by: int) -> ScoredSequence:
    """Distributions of the tokens `by` later, which are not those of their rows."""
    order = (np.arange(sequence.num_targets) + by) % sequence.num_targets
    names = ("token_ids", "logprobs", "log_z", "log_tail")
    return labelled(
        dataclasses.replace(sequence, **{n: getattr(sequence, n)[order] for n in names})
    )


def labelled(sequence: ScoredSequence) -> ScoredSequence:
    """The same with the log probs of labels that are kept taken from there, as a writer demands."""
    is_label = sequence.token_ids == sequence.labels[:, None]
    kept = np.where(is_label, sequence.logprobs, -np.inf).max(axis=1)
    label = np.where(is_label.any(axis=1), kept, sequence.label_logprob)
    return dataclasses.replace(sequence, label_logprob=label)


@pytest.mark.parametrize("precision", ["compact", "f16", "f32"])
@pytest.mark.parametrize("method", TRUNCATIONS)
def test_what_was_dumped_agrees(
    dumped: Callable[..., Path], teacher_path: Path, method: str, precision: str
) -> None:
    """Every truncation and precision, at two temperatures, without a remark."""
    url = dumped(truncation=TRUNCATIONS[method], precision=precision)
    report = audited(url, teacher_path)
    assert report.ok and not report.notes, report_text(report)
    names = {q.name for q in report.quantities}
    expected = {
        "sample": {"entropy", "label_logprob"},
        "label": {"label_logprob"},
    }.get(method, {"logprob", "log_z_t2", "log_tail_t1", "log_tail_t2", "label_logprob"})
    assert names >= expected
    assert ("ids" in names) == (method not in ("sample", "label"))
    assert ("cut" in names) == (method == "topp")
    assert ("draws" in names) == ("sample" in method)
    assert report.sequences == SAMPLE
    assert all(q.compared >= 0.9 * report.targets for q in report.quantities if q.unit != "sd")


@pytest.mark.parametrize("precision", ["compact", "f32"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_shift_by_one(
    dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path, by: int, precision: str
) -> None:
    """Either direction is named, and nothing else is."""
    source = dumped(precision=precision)
    url = rewritten(source, tmp_path / "moved", lambda sequence: moved(sequence, by))
    report = audited(url, teacher_path)
    assert kinds(report) == ["shift"]
    assert f"shifted by one token: row t holds the distribution of token t{by:+d}" in texts(report)


def test_a_shift_of_some_sequences(cache: Path, teacher_path: Path, tmp_path: Path) -> None:
    """A third of the sequences, as from one bad worker, is enough."""
    url = rewritten(
        cache,
        tmp_path / "moved",
        lambda s: moved(s, 1) if int(s.sample_id.split("-")[1]) % 3 == 0 else s,
    )
    report = audited(url, teacher_path)
    assert kinds(report) == ["shift"]
    assert f"of {SAMPLE} sequences" in texts(report)


@pytest.mark.parametrize("method", TRUNCATIONS)
def test_another_revision_of_the_teacher(
    dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path, method: str
) -> None:
    """Weights that moved by 1 % are another teacher, and both fingerprints are shown."""
    url = dumped(truncation=TRUNCATIONS[method])
    model = models.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "revision")
    models.build_tokenizer().save_pretrained(tmp_path / "revision")
    report = audited(url, tmp_path / "revision")
    assert kinds(report) == ["teacher"], report_text(report)
    manifest = CacheReader(url).manifest
    assert manifest.teacher.fingerprint in texts(report)
    assert texts(report).count("sha256:") == 2


def test_the_same_teacher_in_other_files(cache: Path, teacher_path: Path, tmp_path: Path) -> None:
    """Another fingerprint of the same distributions is a remark."""
    models.build_model().save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    models.build_tokenizer().save_pretrained(tmp_path / "copy")
    report = audited(cache, tmp_path / "copy")
    assert report.ok
    assert [note.kind for note in report.notes] == ["files"]


def test_a_cache_that_is_not_complete(cache: Path, teacher_path: Path, tmp_path: Path) -> None:
    """The shards committed so far are audited, with a remark."""
    reader = CacheReader(cache)
    writer = CacheWriter.create(str(tmp_path / "part"), draft_of(reader.manifest), reader.plan)
    with writer.shard(1) as shard:
        first = reader.plan[1].first_sequence
        for index in range(first, first + reader.plan[1].num_sequences):
            shard.write(reader[index])
    report = audited(tmp_path / "part", teacher_path)
    assert report.ok and report.sequences == min(SAMPLE, reader.plan[1].num_sequences)
    assert [note.kind for note in report.notes] == ["incomplete"]


def test_an_imported_cache(cache: Path, teacher_path: Path, tmp_path: Path) -> None:
    """Whose teacher was only named is judged by its numbers."""
    url = rewritten(
        cache,
        tmp_path / "url",
        lambda s: s,
        lambda d: dataclasses.replace(
            d, teacher=dataclasses.replace(d.teacher, fingerprint="unknown", dtype="unknown")
        ),
    )
    report = audited(url, teacher_path)
    assert report.ok
    assert [note.kind for note in report.notes] == ["files"]


def test_another_tokenizer(cache: Path, other_teacher_path: Path) -> None:
    """The same weights with another tokenizer are found by its first differing token."""
    report = audited(cache, other_teacher_path)
    assert kinds(report) == ["tokenizer"]
    assert "another tokenizer" in texts(report)


def test_other_special_tokens(cache: Path, tmp_path: Path) -> None:
    """A tokenizer that means the same by every id is a remark, which says what differs."""
    models.save_teacher(tmp_path / "chat")
    tokenizer = models.build_tokenizer()
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(tmp_path / "chat")
    report = audited(cache, tmp_path / "chat")
    assert report.ok
    (note,) = [note for note in report.notes if note.kind == "tokenizer"]
    assert note.text.endswith("by every id: eos_token '<|end|>' where the cache has '</s>'")


def test_a_smaller_vocabulary(cache: Path, tmp_path: Path) -> None:
    """A teacher with fewer output rows than the cache has ids is refused before it is run."""
    model = models.build_model(vocab_size=280)
    model.save_pretrained(tmp_path / "small")
    models.build_tokenizer(280).save_pretrained(tmp_path / "small")
    report = audited(cache, tmp_path / "small")
    assert kinds(report) == ["vocabulary", "tokenizer"]
    assert not report.quantities


@pytest.mark.parametrize("precision", ["compact", "f32"])
def test_a_wrong_temperature(
    dumped: Callable[..., Path],
    teacher_path: Path,
    dump_config: DumpConfig,
    tmp_path: Path,
    precision: str,
) -> None:
    """Logits that were divided by 1.5 before the softmax are named, with the temperature."""
    model = models.build_model()
    with torch.no_grad():
        model.lm_head.weight /= 1.5
    model.save_pretrained(tmp_path / "warm")
    models.build_tokenizer().save_pretrained(tmp_path / "warm")
    teacher = dataclasses.replace(dump_config.teacher, path=str(tmp_path / "warm"))
    source = dumped(teacher=teacher, precision=precision)
    true = CacheReader(dumped("true")).manifest.teacher
    url = rewritten(
        source, tmp_path / "url", labelled, lambda d: dataclasses.replace(d, teacher=true)
    )
    report = audited(url, teacher_path)
    assert kinds(report) == ["temperature"]
    assert "teacher's at T=1.5, not at T=1" in texts(report)


def test_a_mislabelled_temperature(
    dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path
) -> None:
    """The log Z and tail of T=2.1 under the name of T=2 are named, with the temperature."""
    source = dumped(temperatures=[1.0, 2.1])
    url = rewritten(
        source,
        tmp_path / "url",
        lambda s: dataclasses.replace(s, log_tail=_tail_of(s, 2.0)),
        lambda draft: dataclasses.replace(draft, temperatures=(1.0, 2.0)),
    )
    report = audited(url, teacher_path)
    assert kinds(report) == ["temperature"]
    assert "log_z_t2 and the tail beside it are of T=2.1" in texts(report)


def _tail_of(sequence: ScoredSequence, temperature: float) -> np.ndarray:
    """Tails that add up to 1 with the entries under the wrong log Z, as the writer demands."""
    p = np.exp(sequence.logprobs / temperature - sequence.log_z[:, 1:], dtype=np.float64)
    tail = np.log((1 - p.sum(axis=1)).clip(min=1e-30))
    return np.stack([sequence.log_tail[:, 0], tail], axis=1).astype(np.float32)


def test_renormalised_log_probs(dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path):
    """A softmax over the kept ids alone is another normalisation."""

    def renormalised(s: ScoredSequence) -> ScoredSequence:
        mass = np.log(np.exp(s.logprobs, dtype=np.float64).sum(axis=1, keepdims=True))
        logprobs = (s.logprobs - mass).astype(np.float32)
        log_tail = np.full_like(s.log_tail, -np.inf)
        return labelled(dataclasses.replace(s, logprobs=logprobs, log_tail=log_tail))

    source = dumped(temperatures=[1.0], precision="f16")
    report = audited(rewritten(source, tmp_path / "url", renormalised), teacher_path)
    assert kinds(report) == ["normalisation"]


@pytest.mark.parametrize("ran", ["bfloat16", "float32"])
def test_another_precision_is_a_note(
    dumped: Callable[..., Path], dump_config: DumpConfig, teacher_path: Path, ran: str
) -> None:
    """A bfloat16 cache against float32, or the reverse: reported with its size, not failed."""
    other = {"bfloat16": "float32", "float32": "bfloat16"}[ran]
    url = dumped(teacher=dataclasses.replace(dump_config.teacher, dtype=ran))
    assert not audited(url, teacher_path).notes
    report = audited(url, teacher_path, dtype=other)
    assert report.ok, report_text(report)
    (note,) = report.notes
    assert note.kind == "precision"
    assert f"nearest to the teacher in {ran}, which ran in {other}" in note.text


def test_draws_of_another_distribution(
    dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path
) -> None:
    """Right log probs with counts drawn uniformly are found by the counts."""

    def uniform(s: ScoredSequence) -> ScoredSequence:
        assert s.draws is not None
        used = s.token_ids >= 0
        draws = used.astype(np.int32)
        draws[np.arange(len(draws)), used.sum(axis=1) - 1] += 20 - used.sum(axis=1)
        return dataclasses.replace(s, draws=draws.astype(np.int32))

    source = dumped(truncation=TRUNCATIONS["sample"])
    report = audited(rewritten(source, tmp_path / "url", uniform), teacher_path)
    assert kinds(report) == ["draws"]


def test_ids_that_are_not_the_most_probable(
    dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path
) -> None:
    """Right log probs of the wrong ids: the head left out."""
    source = dumped(truncation=Truncation(k=40), temperatures=[1.0])

    def headless(s: ScoredSequence) -> ScoredSequence:
        first = np.exp(s.logprobs[:, 0], dtype=np.float64)
        tail = np.log(np.exp(s.log_tail[:, 0]) + first)[:, None].astype(np.float32)
        return dataclasses.replace(
            s, token_ids=s.token_ids[:, 1:], logprobs=s.logprobs[:, 1:], log_tail=tail
        )

    url = rewritten(
        source,
        tmp_path / "url",
        headless,
        lambda draft: dataclasses.replace(draft, truncation=Truncation(k=39)),
    )
    report = audited(url, teacher_path)
    assert kinds(report) == ["ids"]


def test_what_the_teacher_cannot_score_is_a_finding(
    dumped: Callable[..., Path], teacher_path: Path, tmp_path: Path
) -> None:
    """The others are compared all the same; with none left nothing is."""
    url = dumped()
    ids = [set(sequence.input_ids.tolist()) for sequence in CacheReader(url)]
    rare = min(range(models.VOCAB_SIZE), key=lambda t: abs(sum(t in s for s in ids) - 1))
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_path, teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.embed_tokens.weight"][rare] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    config = TeacherConfig(path=str(teacher), max_batch_tokens=256)
    report = audit(str(url), config, sample=len(ids))
    bad = sum(rare in s for s in ids)
    assert kinds(report) == ["unscored"] * bad and "NaN or infinite logits" in texts(report)
    assert report.sequences == len(ids) - bad > 0
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match="NaN or infinite"):
        audit(str(url), config, sample=3)
    with pytest.raises(ValueError, match="seed must be at least 0, found -1"):
        audit(str(url), config, seed=-1)


def test_the_command(cache: Path, teacher_path: Path, tmp_path: Path) -> None:
    """Exit codes 0, 1 with a line per finding, 2; --json has the whole report."""
    options = ("--teacher", str(teacher_path), "--sample", "8")
    done = command("teacher_dump", "audit", str(cache), *options)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the cache agrees with the teacher"
    url = rewritten(cache, tmp_path / "moved", lambda sequence: moved(sequence, 1))
    done = command("teacher_dump", "audit", str(url), *options, "--json")
    assert done.code == 1
    report = json.loads(done.stdout)
    assert not report["ok"] and report["sequences"] == 8
    assert [finding["kind"] for finding in report["findings"]] == ["shift"]
    for wrong in (
        (str(tmp_path / "absent"), *options),
        (str(cache), "--sample", "3"),
        (str(cache), *options[:2], "--sample", "0"),
        (str(cache), "--teacher", str(tmp_path / "absent")),
    ):
        done = command("teacher_dump", "audit", *wrong)
        assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("\n") == 2  # the line, and the hint at --debug
