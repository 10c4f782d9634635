"""The manifest and its records load strictly; the Arrow schema follows from the layout."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from decant.schemas import (
    ByteRange,
    CommitRecord,
    Distributions,
    FormatError,
    Layout,
    Manifest,
    Rejected,
    RowGroup,
    ScoredSequence,
    ShardPlan,
    Truncation,
    check_same_tokenizer,
    from_json,
    shard_schema,
    to_json,
    tokenizer_fingerprint,
)
from decant.schemas.distributions import ALWAYS, FIELDS
from decant.schemas.strict import canonical
from decant.schemas.truncation import METHODS
from decant.storage import CacheReader, Rows
from tests.support import ROOT, caches

RECORD = CommitRecord(
    shard=3,
    cache_id="ab",
    first_sequence=1,
    num_sequences=2,
    rows=30,
    targets=28,
    rejected=(Rejected(sequence=2, sample_id="b", targets=9, reason="it is too long"),),
    bytes=1000,
    xxh3_128="cd" * 16,
    row_groups=(
        RowGroup(
            rows=30, sequences=2, targets=28, data=ByteRange(offset=4, length=9, xxh3_128="e" * 32)
        ),
    ),
    footer=ByteRange(offset=13, length=987, xxh3_128="f" * 32),
    kl_error_mean=0.0,
    kl_error_max=0.5,
    logprob_error_mean=0.1,
    logprob_error_max=0.2,
    seconds=1.5,
    worker="host:1",
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of a whole cache."""
    path = tmp_path_factory.mktemp("cache")
    settings = caches.Settings()
    return caches.write_cache(path, settings, caches.random_shards(settings, sequences=1))


def names_of(cls: type) -> list[str]:
    """Those that every file has."""
    return [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]


def load(cls: type, data: Any) -> Any:
    if cls is Manifest:
        return Manifest.parse(data, "place/of/file.json")
    return from_json(cls, data, "place/of/file.json")


def stored(cls: type, manifest: Manifest) -> dict[str, Any]:
    return copy.deepcopy(manifest.to_json() if cls is Manifest else to_json(RECORD))


PARSED = [(cls, name) for cls in (Manifest, CommitRecord) for name in names_of(cls)]


def test_what_is_stored_loads_as_it_was(manifest: Manifest) -> None:
    """to_json and back is the identity."""
    assert load(Manifest, manifest.to_json()) == manifest
    assert load(CommitRecord, to_json(RECORD)) == RECORD


@pytest.mark.parametrize(("cls", "name"), PARSED)
def test_a_missing_field_is_refused(cls: type, name: str, manifest: Manifest) -> None:
    """Every field is required; the message names it and the file."""
    data = stored(cls, manifest)
    del data[name]
    with pytest.raises(FormatError, match=rf"place/of/file\.json.*{name}"):
        load(cls, data)


@pytest.mark.parametrize(("cls", "name"), PARSED)
def test_a_field_of_another_type_is_refused(cls: type, name: str, manifest: Manifest) -> None:
    """A string for a number, a number for anything else: the message names field and file."""
    data = stored(cls, manifest)
    data[name] = "text" if isinstance(data[name], int | float) else 7
    with pytest.raises(FormatError, match=rf"place/of/file\.json.*{name}"):
        load(cls, data)


@pytest.mark.parametrize("cls", [Manifest, CommitRecord])
def test_an_unknown_field_is_refused(cls: type, manifest: Manifest) -> None:
    """A reader never guesses what a field it does not know means."""
    with pytest.raises(FormatError, match=r"place/of/file\.json.*unknown colour"):
        load(cls, {**stored(cls, manifest), "colour": "red"})


def test_nested_fields_are_as_strict(manifest: Manifest) -> None:
    """The message gives the whole path to the field."""
    data = stored(Manifest, manifest)
    data["tokenizer"]["files"] = {"vocab.json": 3}
    with pytest.raises(FormatError, match=r"tokenizer: files\.vocab\.json: expected str, found"):
        load(Manifest, data)
    data = stored(CommitRecord, manifest)
    data["row_groups"][0]["data"]["offset"] = True
    with pytest.raises(FormatError, match=r"row_groups\[0\]: data: offset: expected int"):
        load(CommitRecord, data)
    data = stored(Manifest, manifest)
    data["truncation"]["method"] = "best"
    with pytest.raises(FormatError, match=r"place/of/file\.json: truncation: .*'best'"):
        load(Manifest, data)


@pytest.mark.parametrize("version", [0, 5, "1", None, 1.5, True])
def test_an_unknown_version_is_named_before_anything_else(version: Any) -> None:
    """Whatever else a newer manifest holds, the message is about its version."""
    with pytest.raises(
        FormatError, match=r"place/of/file\.json: format_version .*reads versions 1 to 4"
    ):
        load(Manifest, {"format_version": version, "colour": "red"})


def test_the_cache_id_is_the_hash_of_what_the_cache_is(manifest: Manifest) -> None:
    """Any other field changes it, totals and records do not, and a wrong one is refused."""
    bare = dataclasses.replace(manifest, totals=None, records=None)
    assert bare.identity_hash() == manifest.cache_id
    for changes in (
        {"precision": "f16"},
        {"temperatures": (1.0, 3.0)},
        {"truncation": Truncation(k=7)},
        {"source": {"path": "elsewhere"}},
    ):
        other = dataclasses.replace(manifest, cache_id="", **changes)
        assert other.identity_hash() != manifest.cache_id
        with pytest.raises(FormatError, match=r"place/of/file\.json: cache_id"):
            load(Manifest, {**manifest.to_json(), **to_json(changes)})


def test_nothing_that_is_not_a_number_is_stored() -> None:
    """NaN and infinity are refused before they reach a file."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            canonical({"kl_error_max": value})


@pytest.mark.parametrize(
    "options",
    [
        {"method": "best"},
        {"k": 0},
        {"p": 0.9},
        {"draws": 3},
        {"seed": 3},
        {"method": "topp", "p": 0.0},
        {"method": "topp", "p": 1.5},
        {"method": "topp", "p": 0.9, "k": 4, "min_k": 5},
        {"method": "sample"},
        {"method": "sample", "draws": 65_536},
        {"method": "topk+sample", "draws": 0},
    ],
)
def test_a_truncation_without_meaning_is_refused(options: dict[str, Any]) -> None:
    """Values out of range, and options without effect on the method."""
    with pytest.raises(ValueError, match="truncation"):
        Truncation(**options)


@pytest.mark.parametrize(
    "temperatures",
    [(), (2.0,), (1.0, 1.0), (1.0, -1.0), (1.0, float("inf")), (1.0, 2.0, 2.0000001)],
)
def test_temperatures_must_name_different_columns(temperatures: tuple[float, ...]) -> None:
    """1 comes first; the others are positive, finite and differ in six digits."""
    with pytest.raises(ValueError, match="temperatures"):
        dataclasses.replace(caches.Settings().draft(), temperatures=temperatures)


def test_the_columns_follow_from_the_layout() -> None:
    """Ids beyond 65,536 add a column; so do a varying K, draws and each temperature."""
    small = Layout(
        slots=4,
        vocab_size=65_536,
        precision="compact",
        temperatures=(1.0,),
        has_num_kept=False,
        fields=Truncation(k=4).stored(with_logprobs=True),
    )
    schema = shard_schema(small)
    assert "topk_hi" not in schema.names and schema.field("topk_logprob").type.byte_width == 4
    assert not any(field.nullable for field in schema)
    large = dataclasses.replace(
        small,
        vocab_size=65_537,
        precision="f32",
        temperatures=(1.0, 0.5),
        has_num_kept=True,
        fields=Truncation(method="topk+sample", k=2, draws=2).stored(with_logprobs=True),
    )
    added = set(shard_schema(large).names) - set(schema.names)
    assert added == {"topk_hi", "num_kept", "draws", "log_z_t0.5", "log_tail_t0.5"}
    assert shard_schema(large).field("topk_logprob").type.byte_width == 16


def test_a_plan_line_names_its_file(manifest: Manifest, tmp_path: Path) -> None:
    """Lines of a segment are as strict as the manifest."""
    line = to_json(caches.plan_of([[]])[0])
    assert from_json(ShardPlan, line, "plan") == caches.plan_of([[]])[0]
    with pytest.raises(FormatError, match="plan: fields of ShardPlan: missing num_tokens"):
        del line["num_tokens"]
        from_json(ShardPlan, line, "plan")
    with pytest.raises(FormatError, match=str(tmp_path)):
        CacheReader(tmp_path)


class FakeTokenizer:
    """What a fingerprint is taken of."""

    def __init__(self, vocab: list[str], merges: list[str], bos: str = "<s>") -> None:
        """Remember them."""
        self._vocab, self._merges = vocab, merges
        self.special_tokens_map = {"bos_token": bos, "pad_token": "any"}
        self.backend_tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self._vocab)}

    def to_str(self) -> str:
        return canonical({"model": {"merges": self._merges}}).decode()


def test_tokenizers_are_equal_when_ids_mean_the_same() -> None:
    """Vocabulary and merges count; the first differing ids are in the message."""
    base = FakeTokenizer(["<s>", "a", "b"], ["a b"])
    check_same_tokenizer(base, FakeTokenizer(["<s>", "a", "b"], ["a b"]), "CACHE")
    for other, message in (
        (FakeTokenizer(["<s>", "b", "a"], ["a b"]), r"2 ids differ.*1: 'a' vs 'b'"),
        (FakeTokenizer(["<s>", "a", "b"], ["b a"]), "merges differ: number 0 is 'a b' vs 'b a'"),
    ):
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(base)
        with pytest.raises(FormatError, match=f"CACHE .*{message}"):
            check_same_tokenizer(base, other, "CACHE")
    other = FakeTokenizer(["<s>", "a", "b"], ["a b"], bos="a")
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(base)
    same = check_same_tokenizer(base, other, "CACHE")
    assert same.text() == "bos_token 'a' where the cache has '<s>'"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_named_in_the_table_alone(method: str) -> None:
    """What it keeps can be said of any; options without an effect are refused; the rest follows."""
    rule = METHODS[method]
    truncation = Truncation(method=method, draws=3 if rule.has_draws else 0)
    assert "{" not in truncation.text() and truncation.rule is rule
    assert truncation.slots == 64 * rule.has_head + 3 * rule.has_draws
    assert set(truncation.stored(with_logprobs=False)) <= set(truncation.given)
    for name, value in {"k": 5, "p": 0.5, "min_k": 2, "draws": 4, "seed": 1}.items():
        if name not in (*rule.options, *rule.tolerated):
            refused = f"{name}.* no effect with method '{re.escape(method)}'"
            with pytest.raises(ValueError, match=refused):
                dataclasses.replace(truncation, **{name: value})


def test_no_other_file_names_a_method() -> None:
    """A method that is added to the table is known everywhere: nothing else asks for names."""
    named = re.compile(r"""\btruncation\.method\s*[!=]=|["'](?:topk\+sample|topp)["']""")
    for package in ("schemas", "storage", "teacher_dump", "student_train"):
        for file in (ROOT / package).rglob("*.py"):
            if file != ROOT / "schemas/truncation.py":
                assert not named.search(file.read_text()), file


def test_the_fields_of_a_distribution_are_listed_once() -> None:
    """Scored sequences, decoded rows and what an engine gives have the fields of the list."""
    names = [field.name for field in dataclasses.fields(Distributions)]
    assert list(FIELDS) == names and set(ALWAYS) <= set(names)
    for cls in (ScoredSequence, Rows):
        assert [field.name for field in dataclasses.fields(cls)][: len(names)] == names
