"""The sampler's log prob of each target: a column of its own, in caches that say so."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from decant.schemas import FormatError, Manifest, ScoredSequence, Truncation
from decant.storage import CacheReader, verify
from decant.storage.cache import rows as rows_codec
from decant.storage.cache import writer
from decant.storage.cache.lineage import sampler_text, source_of
from decant.storage.cache.plan import plan_of
from decant.storage.edit.derived import make
from decant.storage.edit.merge import Unlike, merge
from decant.storage.edit.subset import Choice, dedupe, subset
from decant.storage.exchange.export import export
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.text import report_text
from tests.support import caches

SETTINGS = {
    "topk": caches.Settings(precision="compact"),
    "label": caches.Settings(truncation=Truncation(method="label")),
    "f32": caches.Settings(),
}
SAMPLER = {"path": "runs/a/student", "fingerprint": "sha256:1", "temperature": 0.7, "top_p": 0.9}
TOLERANCE = {"topk": 1e-3, "label": 1e-3, "f32": 0.0}
"""What the rounding of numbers per target may move."""


def draft_of(settings: caches.Settings, sampler: dict[str, Any] = SAMPLER) -> Manifest:
    """The start of a cache with the column."""
    draft = settings.draft()
    source = {**draft.source, "sampler": sampler}
    return dataclasses.replace(draft, sampler_logprobs=True, source=source)


def sampled(settings: caches.Settings) -> list[list[ScoredSequence]]:
    """Two shards whose targets have a sampler's log prob, another than the teacher's."""
    rng = np.random.default_rng(5)

    def one(s: ScoredSequence) -> ScoredSequence:
        given = -rng.exponential(2, s.num_targets).astype(np.float32)
        return dataclasses.replace(s, sampler_logprobs=given)

    return [[one(s) for s in shard] for shard in caches.random_shards(settings)]


def write(path: Path, settings: caches.Settings, sampler: dict[str, Any] = SAMPLER) -> Path:
    """A cache of these."""
    shards = sampled(settings)
    flat = [s for shard in shards for s in shard]
    writer.write_cache(path, draft_of(settings, sampler), flat, plan_of(shards))
    return path


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request: pytest.FixtureRequest) -> str:
    """How the cache stores its distributions."""
    return str(request.param)


@pytest.fixture(scope="module")
def cache(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never write to it."""
    return write(tmp_path_factory.mktemp(kind) / "cache", SETTINGS[kind])


def test_what_is_written_is_read(cache: Path, kind: str) -> None:
    """To the rounding of other numbers per target, by sequence and by row group."""
    given = [s for shard in sampled(SETTINGS[kind]) for s in shard]
    reader = CacheReader(cache)
    for ours, theirs in zip(given, reader, strict=True):
        assert theirs.sampler_logprobs.dtype == np.float32
        np.testing.assert_allclose(
            theirs.sampler_logprobs, ours.sampler_logprobs, rtol=0, atol=TOLERANCE[kind]
        )
        assert not np.array_equal(theirs.sampler_logprobs, theirs.label_logprob)
    stored = reader.read_stored(reader.row_groups()[0])
    assert len(stored.sampler_logprobs) == len(stored.is_target)
    assert not stored.sampler_logprobs[~stored.is_target].any()
    assert verify(cache).problems == () and inspect(cache).column_bytes["sampler_logprob"] > 0
    assert "runs/a/student, T=0.7, top-p 0.9" in report_text(inspect(cache))


def test_the_column_is_the_last_and_changes_no_other(cache: Path, kind: str) -> None:
    """A shard without it is the same shard but for this column."""
    reader = CacheReader(cache)
    table = reader.read_table(reader.row_groups()[0])
    assert table.schema.names[-1] == "sampler_logprob"
    without = rows_codec.encode(
        [dataclasses.replace(s, sampler_logprobs=None) for s in sampled(SETTINGS[kind])[0]],
        0,
        dataclasses.replace(reader.manifest.layout, has_sampler=False),
    )
    assert table.drop_columns("sampler_logprob").equals(without)


def test_other_caches_say_nothing_of_it(tmp_path: Path) -> None:
    """Their manifests are those of releases that do not know the column, which refuse one with it.

    What a manifest leaves out is not to be said in another way.
    """
    manifest = SETTINGS["topk"].draft()
    assert "sampler_logprobs" not in manifest.to_json()
    said = draft_of(SETTINGS["topk"]).to_json()
    assert said["sampler_logprobs"] is True and said["format_version"] == 4
    assert said.keys() - manifest.to_json().keys() == {"sampler_logprobs"}
    with pytest.raises(FormatError, match="m: sampler_logprobs is false, which is said by leaving"):
        Manifest.parse({**manifest.to_json(), "sampler_logprobs": False}, "m")
    older = dataclasses.replace(manifest, format_version=3, ids="planes").to_json()
    with pytest.raises(FormatError, match="unknown in version 3: sampler_logprobs"):
        Manifest.parse({**older, "sampler_logprobs": True}, "m")


def test_bad_values_are_refused(tmp_path: Path) -> None:
    """Where they are written: absent ones, too many, none asked for, not finite, above 0."""
    ((sequence, *_), _) = sampled(SETTINGS["topk"])
    given = sequence.sampler_logprobs
    draft = draft_of(SETTINGS["topk"])
    plain = SETTINGS["topk"].draft()
    cases = (
        (draft, None, r"sampler_logprobs must be float32 \(11,\), found None"),
        (draft, given[1:], r"must be float32 \(11,\), found float32 \(10,\)"),
        (draft, given.astype(np.float64), "found float64"),
        (draft, given + np.float32(99), "sampler_logprobs above 0"),
        (draft, given * np.float32(np.nan), "sampler_logprobs is not finite"),
        (plain, given, "this cache keeps none"),
    )
    for number, (manifest, values, match) in enumerate(cases):
        bad = dataclasses.replace(sequence, sampler_logprobs=values)
        with pytest.raises(FormatError, match=f"sample sample-0-0: .*{match}"):
            writer.write_cache(tmp_path / str(number), manifest, [bad])


def test_a_reader_refuses_bad_values(tmp_path: Path) -> None:
    """Of a shard that says NaN of a target, before anything is trained on it."""
    ((sequence, *_), _) = sampled(SETTINGS["label"])
    layout = draft_of(SETTINGS["label"]).layout
    table = rows_codec.encode([sequence], 0, layout)
    place = table.schema.get_field_index("sampler_logprob")
    values = np.full(len(table), np.nan, np.float32)
    changed = table.set_column(place, table.schema.field(place), pa.array(values))
    write(tmp_path / "cache", SETTINGS["label"])
    reader = CacheReader(tmp_path / "cache")
    group = reader.row_groups()[0]
    entry = reader.read_table(group)
    whole = pa.concat_tables([changed, entry.slice(len(changed))])
    with pytest.raises(FormatError, match="sampler_logprob of a target is nan"):
        reader.decode(group, whole)


def test_a_rejected_sequence_has_none(tmp_path: Path) -> None:
    """Its targets are lost."""
    (sequences, _) = sampled(SETTINGS["label"])
    started = writer.CacheWriter.create(tmp_path, draft_of(SETTINGS["label"]), plan_of([sequences]))
    with started.shard(0) as shard:
        first, *rest = sequences
        shard.reject(first.sample_id, first.input_ids, first.is_target, "no")
        for s in rest:
            shard.write(s)
    started.finalize()
    assert verify(tmp_path).ok and CacheReader(tmp_path)[0].sampler_logprobs.shape == (0,)


def test_edited_caches_keep_it(cache: Path, kind: str, tmp_path: Path) -> None:
    """Of a part, and of each sequence once: bit for bit, with who sampled it."""
    reader = CacheReader(cache)
    known = {s.sample_id: s.sampler_logprobs for s in reader}
    some = Choice(ids=("sample-0-1", "sample-1-0"))
    for name, blueprint in (("part", subset(reader, some)[0]), ("once", dedupe(reader)[0])):
        made = make(tmp_path / name, blueprint)
        assert made.sampler_logprobs and made.source["sampler"] == SAMPLER
        for s in CacheReader(tmp_path / name):
            np.testing.assert_array_equal(s.sampler_logprobs, known[s.sample_id])


def test_caches_of_two_samplers_become_one(tmp_path: Path) -> None:
    """The lineage says who they are; none of them stands for all."""
    other = {**SAMPLER, "path": "runs/b/student", "fingerprint": "sha256:2", "step": 40}
    one = CacheReader(write(tmp_path / "one", SETTINGS["label"]))
    two = CacheReader(write(tmp_path / "two", SETTINGS["label"], other))
    made = make(tmp_path / "both", merge([one, two], "keep-all")[0])
    assert made.sampler_logprobs and "sampler" not in made.source
    assert sampler_text(made.source) == (
        "runs/a/student, T=0.7, top-p 0.9; runs/b/student, step 40, T=0.7, top-p 0.9"
    )
    again = source_of("merge", {}, [("x", one.manifest), ("y", one.manifest)])
    assert again["sampler"] == SAMPLER


def test_a_merge_with_a_cache_without_it_is_refused(tmp_path: Path) -> None:
    """Nothing stands for what was not kept; a training takes both."""
    one = CacheReader(write(tmp_path / "one", SETTINGS["label"]))
    caches.write_cache(tmp_path / "two", SETTINGS["label"], caches.random_shards(SETTINGS["label"]))
    with pytest.raises(Unlike, match="sampler_logprobs is True and False; `mixture` of a training"):
        merge([one, CacheReader(tmp_path / "two")], "keep-all")


@pytest.mark.parametrize("rows", ["sequences", "targets"])
def test_an_export_has_it(rows: str, cache: Path, tmp_path: Path) -> None:
    """As a list per sequence, or a number per target."""
    export(cache, tmp_path / "out", rows=rows)
    values = pa.parquet.read_table(tmp_path / "out").column("sampler_logprob").to_pylist()
    flat = [v for row in values for v in row] if rows == "sequences" else values
    expected = np.concatenate([s.sampler_logprobs for s in CacheReader(cache)])
    np.testing.assert_array_equal(np.array(flat, np.float32), expected)


def test_a_damaged_sampler_in_a_manifest_is_named(tmp_path: Path) -> None:
    """With its field, whatever stands there; a lineage's own is shown as it is."""
    for changes, match in (
        ({"path": 3}, "source.sampler.path: expected str"),
        ({"temperature": "hot"}, "source.sampler.temperature: expected float"),
        ({"step": "x"}, "source.sampler.step: expected int"),
    ):
        where = tmp_path / match[15:19]
        with pytest.raises(FormatError, match=match):
            write(where, SETTINGS["label"], {**SAMPLER, **changes})
    odd = {"lineage": {"from": [{"source": {"sampler": {"temperature": [1]}}}, 7]}}
    assert sampler_text(json.loads(json.dumps(odd))) == "None, T=[1], top-p None"
    assert sampler_text({"lineage": {"from": 3}}) == ""
