"""Caches made of others: the rows are those of the others, bit for bit, whatever was stored."""

import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.schemas import NO_LOGPROBS, Truncation, shard_schema
from decant.storage import CacheReader, Store, verify
from decant.storage.cache import paths
from decant.storage.cache.rows import encode
from decant.storage.cache.writer import write_cache
from decant.storage.edit.derived import make, staging_of
from decant.storage.edit.merge import Unlike, merge
from decant.storage.edit.subset import Choice, dedupe, subset
from decant.storage.exchange.export import export
from tests.support import caches
from tests.support.caches import fixture
from tests.support.commands import Command, command, end_before

FORMS = {
    f"{method.method}-{precision}": caches.Settings(truncation=method, precision=precision)
    for method, precision in itertools.product(
        (
            Truncation(k=8),
            Truncation(method="topp", k=8, p=0.8, min_k=2),
            Truncation(method="topk+sample", k=4, draws=6),
        ),
        ("f32", "f16", "compact"),
    )
}
FORMS |= {
    "sample": caches.Settings(truncation=Truncation(method="sample", draws=9)),
    "label": caches.Settings(truncation=Truncation(method="label")),
    "wide": caches.Settings(vocab_size=70_000, precision="compact"),
    "k=V": caches.Settings(truncation=Truncation(k=50), precision="compact"),
}
OLDER = [(1, "compact"), (1, "sampled"), (1, "half"), (2, "compact"), (2, "drawn"), (3, "topp")]


def write(path: Path, settings: caches.Settings, seed: int = 0, *, reject: int = -1) -> Path:
    """Three shards of four sequences; that of index `reject` could not be scored."""
    spread = 1.0 if seed % 2 else 4.0  # a flat teacher leaves more than half to the tail
    generator = np.random.default_rng(seed)
    shards = [
        [
            caches.random_sequence(
                generator,
                settings,
                length=(12 if settings.vocab_size < 1000 else 3) + 3 * i,
                prompt=1 + 2 * (i % 2),
                spread=spread,
                sample_id=f"{seed}-{shard}-{i}",
            )[0]
            for i in range(4)
        ]
        for shard in range(3)
    ]
    writer = caches.start_cache(path, settings, shards)
    for number, sequences in enumerate(shards):
        with writer.shard(number, row_group_rows=40) as shard:
            for sequence in sequences:
                if 4 * number + int(sequence.sample_id[-1]) == reject:
                    tokens = sequence.input_ids, sequence.is_target
                    shard.reject(sequence.sample_id, *tokens, "out of memory")
                else:
                    shard.write(sequence)
    writer.finalize()
    return path


IDS = ("topk_lo", "topk_mid", "topk_hi")
"""Columns of ids, which a shard may number in its own way."""


def stored(url: Path) -> list[dict[str, Any]]:
    """Of each sequence the stored values of all columns but the ids', and all decoded ones."""
    reader = CacheReader(url)
    found: dict[int, dict[str, Any]] = {}
    for group in reader.row_groups():
        table = reader.read_table(group)
        columns = table.drop_columns([name for name in IDS if name in table.column_names])
        values = columns.to_pydict()
        for row, index in enumerate(values.pop("sequence")):
            its = found.setdefault(index, {name: [] for name in values})
            for name, column in values.items():
                its[name].append(column[row])
    assert sorted(found) == list(range(len(reader)))
    for index, sequence in enumerate(reader):
        found[index]["decoded"] = {n: v.tobytes() for n, v in sequence.known().items()}
    return [found[i] for i in range(len(reader))]


def assert_rows(new: Path, old: list[dict[str, Any]]) -> None:
    """The cache is whole, and its stored rows are these."""
    report = verify(new)
    assert report.ok, report.problems
    found = stored(new)
    assert len(found) == len(old)
    for ours, theirs in zip(found, old, strict=True):
        assert ours == theirs


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_copied_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Every method and precision: subset, merge and dedupe store what was stored."""
    a = write(tmp_path / "a", FORMS[name], 0, reject=5)
    b = write(tmp_path / "b", FORMS[name], 1)
    rows_a, rows_b = stored(a), stored(b)
    ids = ("0-0-1", "0-1-0", "0-1-1", "0-2-3")
    make(tmp_path / "part", subset(CacheReader(a), Choice(ids=ids))[0])
    assert_rows(tmp_path / "part", [rows_a[i] for i in (1, 4, 5, 11)])
    (lost,) = CacheReader(tmp_path / "part").rejected
    assert (lost.sequence, lost.sample_id, lost.reason) == (2, "0-1-1", "out of memory")
    make(tmp_path / "both", merge([CacheReader(a), CacheReader(b)])[0])
    assert_rows(tmp_path / "both", rows_a + rows_b)
    twice = [CacheReader(tmp_path / "both"), CacheReader(tmp_path / "part")]
    make(tmp_path / "twice", merge(twice, "keep-all")[0])
    blueprint, stands = dedupe(CacheReader(tmp_path / "twice"))
    make(tmp_path / "once", blueprint)
    assert_rows(tmp_path / "once", rows_a + rows_b)
    assert stands[24:].tolist() == [1, 4, 5, 11]


@pytest.mark.parametrize(("version", "name"), OLDER)
def test_older_caches_are_made_into_ones_of_the_present_version(
    version: int, name: str, tmp_path: Path
) -> None:
    """Their code, ids and columns stay; every decoded value is what the older cache gives."""
    old = CacheReader(fixture(version, name))
    make(tmp_path / "new", subset(old, Choice(where="sequence != 0"))[0])
    assert verify(tmp_path / "new").ok
    new = CacheReader(tmp_path / "new")
    ours, theirs = new.manifest.layout, old.manifest.layout
    assert shard_schema(ours) == shard_schema(theirs) and ours.code == theirs.code
    for found, expected in zip(new, list(old)[1:], strict=True):
        caches.assert_equal(found, expected)


@pytest.mark.parametrize("code", [None, (4.0, 32.0)])
def test_decoding_and_encoding_again_changes_no_byte(code: tuple[float, float] | None) -> None:
    """Compact codes of every value, with tails of all sizes, come back as they were."""
    from decant.schemas.arrow import CompactCode
    from decant.storage.cache import rows as rows_codec

    settings = caches.Settings(precision="compact", truncation=Truncation(k=50), vocab_size=300)
    layout = settings.draft().layout
    if code:
        layout = dataclasses.replace(layout, code=CompactCode(scale=code[0], limit=code[1]))
    generator = np.random.default_rng(0)
    sequences = [
        caches.random_sequence(generator, settings, length=60, spread=spread)[0]
        for spread in (0.01, 0.3, 1, 2, 4, 8, 16, 40, 200)
    ]
    table = encode(sequences, 0, layout)
    again = encode(list(rows_codec.decode(table, layout)), 0, layout, decoded=True)
    assert again.equals(table)


def test_shards_that_stay_are_links(tmp_path: Path) -> None:
    """Those of a merge's first cache, and those before the first sequence that is left out."""
    a, b = write(tmp_path / "a", FORMS["topk-f32"], 0), write(tmp_path / "b", FORMS["topk-f32"], 1)

    def inode(url: Path, shard: int) -> int:
        return os.stat(url / paths.shard(shard)).st_ino

    make(tmp_path / "both", merge([CacheReader(a), CacheReader(b)])[0])
    assert [inode(tmp_path / "both", i) for i in range(3)] == [inode(a, i) for i in range(3)]
    make(tmp_path / "part", subset(CacheReader(a), Choice(ids=("0-1-3",), invert=True))[0])
    same = [inode(tmp_path / "part", i) == inode(a, i) for i in range(2)]
    assert same == [True, False]


def test_lineage_says_what_a_cache_was_made_of(tmp_path: Path) -> None:
    """Operation, options and the ids of the caches, through several operations."""
    a, b = write(tmp_path / "a", FORMS["topk-f32"], 0), write(tmp_path / "b", FORMS["topk-f32"], 1)
    make(tmp_path / "part", subset(CacheReader(a), Choice(share=0.5, seed=3))[0])
    make(tmp_path / "both", merge([CacheReader(tmp_path / "part"), CacheReader(b)])[0])
    last = CacheReader(tmp_path / "both").manifest.source["lineage"]
    assert last["operation"] == "merge" and last["options"] == {"on_duplicate": "refuse"}
    part, other = last["from"]
    assert other["cache_id"] == CacheReader(b).manifest.cache_id
    before = part["source"]["lineage"]
    assert before["operation"] == "subset" and before["from"][0]["source"]["path"] == "nowhere"
    assert (before["options"]["share"], before["options"]["seed"]) == (0.5, 3)
    text = command("decant", "inspect", str(tmp_path / "both")).stdout
    assert "merge of" in text


def test_a_merge_of_unlike_caches_names_what_differs(tmp_path: Path) -> None:
    """Teacher, tokenizer, k, temperatures, precision: each by its name, with both values."""
    a = write(tmp_path / "a", FORMS["topk-f32"])
    other = caches.Settings(truncation=Truncation(k=7), temperatures=(1.0, 3.0), precision="f16")
    b = write(tmp_path / "b", other, 1)
    with pytest.raises(Unlike, match=r"truncation\.k is 8 and 7; temperatures is .*; precision is"):
        merge([CacheReader(a), CacheReader(b)])
    done = command("decant", "merge", str(a), str(b), str(tmp_path / "new"))
    assert done.code == 2 and "precision is 'f32' and 'f16'" in done.stderr
    assert not (tmp_path / "new").exists()


def test_duplicates_of_a_merge(tmp_path: Path) -> None:
    """Are refused by default, with how many have other tokens; the first, or all, are kept."""
    a = write(tmp_path / "a", FORMS["topk-f32"], 0)
    b = tmp_path / "b"
    generator = np.random.default_rng(5)
    ours = list(CacheReader(a))[:2]
    fresh = [
        caches.random_sequence(generator, FORMS["topk-f32"], sample_id=name)[0]
        for name in ("0-0-2", "new", "new")
    ]
    caches.write_cache(b, FORMS["topk-f32"], [[*ours, *fresh]])
    both = [CacheReader(a), CacheReader(b)]
    with pytest.raises(ValueError, match=r"3 sequences .* \(1 of them with other tokens\)"):
        merge(both)
    make(tmp_path / "first", merge(both, "keep-first")[0])
    assert_rows(tmp_path / "first", stored(a) + stored(b)[3:])
    make(tmp_path / "all", merge(both, "keep-all")[0])
    assert_rows(tmp_path / "all", stored(a) + stored(b))


def test_conversations_go_where_their_sequences_go(tmp_path: Path) -> None:
    """Also into one cache with sequences of a cache that keeps none."""
    a = write(tmp_path / "a", FORMS["topk-compact"], 0)
    said = '{"messages":[{"role":"user","content":"hello"}]}'
    talks = [
        dataclasses.replace(s, sample_id=f"talk {s.sample_id}", messages=said)
        for shard in caches.random_shards(FORMS["topk-compact"], num_shards=1)
        for s in shard
    ]
    draft = dataclasses.replace(FORMS["topk-compact"].draft(), messages=True)
    write_cache(tmp_path / "talks", draft, talks)
    both = [CacheReader(a), CacheReader(tmp_path / "talks")]
    make(tmp_path / "both", merge(both)[0])
    assert verify(tmp_path / "both").ok
    make(
        tmp_path / "part", subset(CacheReader(tmp_path / "both"), Choice(where="sequence > 10"))[0]
    )
    assert [s.messages for s in CacheReader(tmp_path / "part")] == [None, said, said, said, said]


def test_commands_say_what_they_would_do_and_do_it(tmp_path: Path) -> None:
    """A dry run writes nothing and predicts the counts; what exists is never overwritten."""
    a, new = write(tmp_path / "a", FORMS["topk-compact"]), tmp_path / "new"
    ids = tmp_path / "ids.txt"
    ids.write_text("0-0-0\n0-2-1\n")
    words = ("subset", str(a), str(new), "--ids", str(ids), "--id", "0-1-1", "--json")
    planned = json.loads(command("decant", *words, "--dry-run").stdout)
    assert not new.exists() and not staging_of(new).exists()
    done = json.loads(command("decant", *words).stdout)
    same = ("sequences", "targets", "shards", "linked_shards", "of_sequences")
    assert {n: planned[n] for n in same} == {n: done[n] for n in same}
    assert done["sequences"] == 3 and done["of_sequences"] == 12
    assert [s.sample_id for s in CacheReader(new)] == ["0-0-0", "0-1-1", "0-2-1"]
    again = command("decant", *words)
    assert again.code == 2 and "exists already" in again.stderr
    text = command("decant", "dedupe", str(a), str(tmp_path / "once")).stdout
    assert "12 of 12 sequences" in text and "3 shards" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--id", "none"], "has no sequence of 1 of 1 sample ids, first 'none'"),
        (["--where", "length > 1e9"], "none of 12 sequences is left"),
        (["--where", "lenght > 3"], "did you mean"),
        (["--where", "length"], "is a number"),
        (["--where", "__import__('os').system('x')"], "is not understood"),
        (["--where", "length >"], "is not a condition"),
        (["--share", "0"], "must lie in (0, 1]"),
        (["--seed", "3", "--where", "length > 3"], "no effect without --share"),
        ([], "nothing is chosen"),
    ],
)
def test_what_chooses_nothing_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    """Exit code 2 with the reason; nothing is left behind."""
    a = write(tmp_path / "a", FORMS["topk-f32"])
    done = command("decant", "subset", str(a), str(tmp_path / "new"), *words)
    assert done.code == 2 and said in done.stderr.splitlines()[0], done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_new_cache_has_a_place_of_its_own(tmp_path: Path) -> None:
    """Not inside the cache that is read, which would hold what belongs to nothing."""
    a = write(tmp_path / "a", FORMS["topk-f32"])
    blueprint, _ = subset(CacheReader(a), Choice(share=0.5))
    with pytest.raises(ValueError, match="lies inside the cache"):
        make(a / "part", blueprint)
    assert verify(a).ok


@pytest.mark.parametrize("step", [2, 62, 82, 90])
def test_killed_at_any_step_it_is_absent_and_then_complete(step: int, tmp_path: Path) -> None:
    """Whatever step SIGKILL comes before: nothing of the name is there, the same command ends."""
    a, b = write(tmp_path / "a", FORMS["topk-f32"], 0), write(tmp_path / "b", FORMS["topk-f32"], 1)
    new = tmp_path / "new"
    words = ("merge", str(a), str(b), str(new))
    killed = functools.partial(end_before, step, str(tmp_path))
    before = Command("decant", *words, first=killed).result()
    assert before.code == -9, before.stderr  # else fewer steps are taken than this
    assert not new.exists() or verify(new).ok
    again = command("decant", *words)
    assert again.code == 0 or new.exists(), again.stderr
    assert_rows(new, stored(a) + stored(b))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "new"]


def test_what_another_command_left_is_cleared(tmp_path: Path) -> None:
    """The start of another cache for the same place does not get into this one."""
    a = write(tmp_path / "a", FORMS["topk-f32"], 0)
    new = tmp_path / "new"
    killed = functools.partial(end_before, 25, str(tmp_path))
    words = ("subset", str(a), str(new))
    assert Command("decant", *words, "--share", "0.9", first=killed).result().code == -9
    assert staging_of(new).exists()
    make(new, subset(CacheReader(a), Choice(where="length > 12"))[0])
    assert_rows(new, [row for row in stored(a) if len(row["position"]) > 12])
    assert not staging_of(new).exists()


def test_a_damaged_origin_makes_no_cache(tmp_path: Path) -> None:
    """A shard that would be linked is hashed like one that is copied."""
    a, b = write(tmp_path / "a", FORMS["topk-f32"], 0), write(tmp_path / "b", FORMS["topk-f32"], 1)
    blueprint, _ = merge([CacheReader(a), CacheReader(b)])
    shard = a / paths.shard(0)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        make(tmp_path / "new", blueprint)
    assert not (tmp_path / "new").exists()


def test_on_an_object_store_the_manifest_comes_last(tmp_path: Path) -> None:
    """From and to fsspec URLs; what lies there is not touched."""
    a = write(tmp_path / "a", FORMS["topk-compact"])
    url = "memory://edited/new"
    make(url, subset(CacheReader(a), Choice(where="length > 12"))[0])
    assert verify(url).ok
    with pytest.raises(FileExistsError, match="already holds a cache"):
        make(url, subset(CacheReader(a), Choice(share=0.5))[0])
    make(tmp_path / "back", subset(CacheReader(url), Choice(where="length < 20"))[0])
    kept = [row for row in stored(a) if 12 < len(row["position"]) < 20]
    assert_rows(tmp_path / "back", kept)
    Store("memory://edited/other").publish("notes.txt", b"mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        make("memory://edited/other", subset(CacheReader(a), Choice(share=0.5))[0])


def test_figures_are_those_of_the_sequences(tmp_path: Path) -> None:
    """Each figure against plain numpy over the sequence that it is of."""
    from decant.storage.edit.figures import figures_of, known_figures

    for name in ("topk-f16", "topp-f32", "topk+sample-compact", "sample", "label"):
        settings = FORMS[name]
        reader = CacheReader(write(tmp_path / name, settings, reject=2))
        layout = reader.manifest.layout
        group = reader.row_groups()[0]
        rows = reader.read(group)
        found = figures_of(rows, layout)
        assert tuple(found) == known_figures(layout)
        for i, sequence in enumerate(rows):
            expected = {"length": len(sequence.input_ids), "targets": sequence.num_targets}
            if sequence.num_targets:
                label = sequence.label_logprob.astype(float)
                expected |= {"perplexity": np.exp(-label.mean()), "min_logprob": label.min()}
            if sequence.num_targets and sequence.logprobs is not None:
                assert sequence.log_tail is not None
                p = np.exp(
                    np.column_stack([sequence.logprobs, sequence.log_tail[:, 0]]), dtype=float
                )
                entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
                kept = p[:, :-1].sum(1)
                expected |= {"mean_entropy": entropy.mean(), "max_entropy": entropy.max()}
                expected |= {"retained_mass": kept.mean(), "min_retained_mass": kept.min()}
            for key, value in expected.items():
                assert found[key][i] == pytest.approx(value, rel=1e-3), (name, key)
            if not sequence.num_targets:
                assert np.isnan(found["perplexity"][i])
        if reader.manifest.precision == NO_LOGPROBS:
            with pytest.raises(ValueError, match="cannot give retained_mass"):
                subset(reader, Choice(where="retained_mass > 0.5"))


def test_conditions_mean_what_python_means() -> None:
    """Chains, and, or, not, arithmetic; a sequence without a figure is left out."""
    from decant.storage.edit.predicate import Predicate

    figures = {
        "length": np.array([3.0, 10.0, 20.0, 7.0]),
        "perplexity": np.array([2.0, 5.0, np.nan, 8.0]),
    }
    for text in (
        "3 < length <= 10",
        "length > 5 and not perplexity < 4 or length == 3",
        "-length + 2 * perplexity >= (1 - 3) / 2",
        "not (length != 7)",
        "1 < 2",
    ):
        expected = []
        for length, perplexity in zip(*figures.values(), strict=True):
            known = not (np.isnan(perplexity) and "perplexity" in text)
            expected.append(known and eval(text, {"length": length, "perplexity": perplexity}))
        assert Predicate(text, figures).holds(figures).tolist() == expected, text


def test_exports_of_a_derived_cache_work(tmp_path: Path) -> None:
    """What is made of others is a cache like any other."""
    a = write(tmp_path / "a", FORMS["topk-f32"])
    make(tmp_path / "part", subset(CacheReader(a), Choice(share=0.5))[0])
    report = export(tmp_path / "part", tmp_path / "lists", file_format="parquet", rows="targets")
    assert report.sequences == 6
