"""The manifest of a cache and the records beside it: what a cache is, independent of its rows.

Every class loads strictly (`schemas.strict.from_json`) and is frozen; hashes are lower-case hex.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from decant.schemas.arrow import ID_FORMS, NO_LOGPROBS, PRECISIONS, CompactCode, Layout
from decant.schemas.shards import Rejected, Segment, Totals
from decant.schemas.strict import (
    FormatError,
    canonical,
    check_counts,
    check_depth,
    check_hash,
    check_inside,
    from_json,
    to_json,
    with_later,
)
from decant.schemas.truncation import METHODS, Truncation, check_temperatures

FORMAT_VERSION = 4
"""What is written; all from 1 on are read, and completed in their own form."""
VERSION_1_CODE = CompactCode(scale=4.0, limit=32.0)
MAX_VOCAB = 2**24
"""Ids are stored in at most three bytes."""
MAX_SLOTS = 2**18
"""Entries per target; a vocabulary can be kept whole up to here."""
MAX_SHARDS = 2**20
NOT_SAID = {"sampler_logprobs": False}
"""What a manifest leaves out, so that readers which know nothing of it read all others."""
MAX_LISTED = 1000
"""Rejected sequences that the manifest lists; the commit records hold all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInfo:
    """Who scored the sequences."""

    name: str
    """Path or hub id as given, with the revision."""
    fingerprint: str
    """Hash over configuration and weight files."""
    architecture: str
    """Class name of the model."""
    engine: str
    """Engine and version, for example "transformers 5.19.0"."""
    dtype: str
    """Computation dtype of the forward."""
    vocab_size: int
    """Rows of the teacher's output layer, padding included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """The tokenizer the ids belong to; its files are kept in `tokenizer/`."""

    fingerprint: str
    """`schemas.tokenizer_fingerprint`, or "" when the source was ready ids without a tokenizer."""
    files: dict[str, str]
    """File name -> xxh3_128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a cache is.

    `totals`, `records` and `rejected` are empty until every shard is committed.
    """

    format_version: int
    cache_id: str
    """Hash of every field below but the last three: same input and config, same id."""
    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    shared_vocab_size: int
    """Ids are below this; logits beyond it (padding) were cut before any normalisation."""
    truncation: Truncation
    temperatures: tuple[float, ...]
    precision: str
    compact: CompactCode | None
    """The curve of the codes, if `precision` is compact."""
    ids: str
    """ranked | planes | lo16: how kept entries are stored."""
    messages: bool
    """Whether the conversations of the records are kept."""
    source: dict[str, Any]
    """Where the records came from, with content hashes."""
    sequences: dict[str, Any]
    """How records became sequences: settings and counts."""
    num_shards: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    """Planned ones; `totals.targets` are those stored."""
    plan: Segment
    """The shard plan: one `ShardPlan` per line."""
    totals: Totals | None
    records: Segment | None
    """All commit records in shard order, once the cache is final."""
    rejected: tuple[Rejected, ...]
    """The first MAX_LISTED rejected sequences of all shards; `totals.rejected` counts all."""
    sampler_logprobs: bool = False
    """Whether each target has its sampler's log prob; a file says it only where it is so."""

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.precision == NO_LOGPROBS:
            self._check_without_logprobs()
        elif self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {tuple(PRECISIONS)}")
        elif not self.layout.has_logprobs:
            raise ValueError(
                f"truncation.method {self.truncation.method!r} stores no log probs of kept "
                f"entries: precision must be {NO_LOGPROBS!r}, found {self.precision!r}"
            )
        if self.messages and self.format_version < 4:
            raise ValueError("messages are kept from version 4 of the format on")
        if self.sampler_logprobs and self.format_version < 4:
            raise ValueError("sampler_logprobs are kept from version 4 of the format on")
        if self.ids not in ID_FORMS:
            raise ValueError(f"ids {self.ids!r} is not one of {ID_FORMS}")
        if self.ids == "ranked" and self.format_version < 4:
            raise ValueError(f"ids 'ranked' in format version {self.format_version}: from 4 on")
        if (self.compact is not None) != (self.precision == "compact"):
            raise ValueError(f"precision {self.precision} with compact {self.compact}")
        check_temperatures(self.temperatures)
        if self.truncation.slots > self.shared_vocab_size:
            raise ValueError(
                f"truncation keeps {self.truncation.slots} entries of a vocabulary of "
                f"{self.shared_vocab_size}"
            )
        expected = self.identity_hash()
        if self.cache_id not in ("", expected):
            raise ValueError(f"cache_id is {self.cache_id}, its fields give {expected}")

    def _check_sizes(self) -> None:
        check_counts(self, "num_sequences", "num_tokens", "num_targets")
        for name, value, least, most in (
            ("shared_vocab_size", self.shared_vocab_size, 1, MAX_VOCAB),
            ("truncation: entries per target", self.truncation.slots, 0, MAX_SLOTS),
            ("num_shards", self.num_shards, 0, MAX_SHARDS),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least}, {most}], found {value}")

    def _check_without_logprobs(self) -> None:
        truncation = self.truncation
        if truncation.rule.has_logprobs or self.ids != "planes" or self.format_version < 3:
            names = [repr(name) for name, method in METHODS.items() if not method.has_logprobs]
            raise ValueError(
                f"precision {NO_LOGPROBS!r} is for truncation.method {' or '.join(names)} from "
                f"version 3 on, found {truncation.method!r} with ids {self.ids!r} in version "
                f"{self.format_version}"
            )
        truncation.check_without_logprobs(self.temperatures)

    @staticmethod
    def draft(
        *,
        teacher: TeacherInfo,
        tokenizer: TokenizerInfo,
        shared_vocab_size: int,
        truncation: Truncation,
        temperatures: tuple[float, ...],
        precision: str,
        source: dict[str, Any],
        sequences: dict[str, Any],
        messages: bool = False,
        sampler_logprobs: bool = False,
    ) -> "Manifest":
        """A manifest without plan, counts and id, which `CacheWriter.create` fills in.

        `precision` is of log probs; a method that stores none of kept entries has none.
        """
        if not truncation.rule.has_logprobs:
            precision = NO_LOGPROBS
        return Manifest(
            format_version=FORMAT_VERSION,
            cache_id="",
            teacher=teacher,
            tokenizer=tokenizer,
            shared_vocab_size=shared_vocab_size,
            truncation=truncation,
            temperatures=temperatures,
            precision=precision,
            compact=CompactCode() if precision == "compact" else None,
            ids="planes" if precision == NO_LOGPROBS else "ranked",
            messages=messages,
            source=source,
            sequences=sequences,
            num_shards=0,
            num_sequences=0,
            num_tokens=0,
            num_targets=0,
            plan=Segment(name="", entries=0, bytes=0, xxh3_128=""),
            totals=None,
            records=None,
            rejected=(),
            sampler_logprobs=sampler_logprobs,
        )

    def identity_hash(self) -> str:
        """The value `cache_id` must have."""
        fields = self.to_json()
        for name in ("cache_id", "totals", "records", "rejected"):
            fields.pop(name, None)
        return hashlib.sha256(canonical(fields)).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """The fields as this manifest's format version writes them."""
        fields = to_json(self)
        if not self.sampler_logprobs:
            del fields["sampler_logprobs"]
        if self.format_version < 4:
            del fields["messages"]
        if self.format_version < 3:
            del fields["rejected"]
            if self.totals:
                del fields["totals"]["rejected"]
        if self.format_version < 2:
            del fields["compact"], fields["ids"]
        return fields

    def upgraded(self) -> "Manifest":
        """The same cache in the present format version; its id changes with it."""
        newer = dataclasses.replace(self, format_version=FORMAT_VERSION, cache_id="")
        return dataclasses.replace(newer, cache_id=newer.identity_hash())

    def derived(self, *, source: dict[str, Any], sequences: dict[str, Any]) -> "Manifest":
        """The start of another cache of rows of this one, in the present format version.

        Its plan, counts and id are to be filled in.
        """
        return dataclasses.replace(
            self,
            format_version=FORMAT_VERSION,
            cache_id="",
            source=source,
            sequences=sequences,
            totals=None,
            records=None,
            rejected=(),
        )

    @property
    def is_final(self) -> bool:
        """Whether every shard of the plan is committed and sealed."""
        return self.records is not None

    @property
    def layout(self) -> Layout:
        """What the shards' columns follow from."""
        return Layout(
            slots=self.truncation.slots,
            vocab_size=self.shared_vocab_size,
            precision=self.precision,
            temperatures=self.temperatures,
            has_num_kept=self.truncation.rule.varies,
            fields=self.truncation.stored(with_logprobs=self.precision != NO_LOGPROBS),
            ids=self.ids,
            has_messages=self.messages,
            has_sampler=self.sampler_logprobs,
            code=self.compact or CompactCode(),
            rounded=self.format_version >= 4 and self.precision != "f32",
        )

    @staticmethod
    def parse(data: Any, where: str) -> "Manifest":
        """Strict load; an unknown format version is named before anything else is looked at."""
        version = data.get("format_version") if isinstance(data, dict) else None
        if version not in range(1, FORMAT_VERSION + 1) or type(version) is not int:
            raise FormatError(
                f"{where}: format_version {version!r:.60} cannot be read; this release reads "
                f"versions 1 to {FORMAT_VERSION}. A newer cache needs a newer release of decant."
            )
        compact = data.get("precision") == "compact"
        code = to_json(VERSION_1_CODE) if compact else None
        data = with_later(data, {"compact": code, "ids": "lo16"}, version, 2, where)
        data = with_later(data, {"rejected": []}, version, 3, where)
        data = with_later(data, {"messages": False, **NOT_SAID}, version, 4, where)
        if data.get("sampler_logprobs") is False and version >= 4:
            raise FormatError(
                f"{where}: sampler_logprobs is false, which is said by leaving it out"
            )
        data = {**NOT_SAID, **data}
        if isinstance(data.get("totals"), dict):
            totals = with_later(data["totals"], {"rejected": 0}, version, 3, f"{where}: totals")
            data = {**data, "totals": totals}
        check_depth(data, where)
        manifest = from_json(Manifest, data, where)
        manifest._check_files(where)
        return manifest

    def _check_files(self, where: str) -> None:
        """Raise FormatError unless every file that is named lies inside the cache, with a hash."""
        generated = self.source.get("generated", {})
        if not isinstance(generated, dict):
            raise FormatError(f"{where}: source.generated: expected an object of names and hashes")
        named = {
            f"tokenizer/{name}": ("tokenizer.files", of)
            for name, of in self.tokenizer.files.items()
        }
        named |= {name: ("source.generated", of) for name, of in generated.items()}
        segments = [("plan", self.plan), *([("records", self.records)] if self.records else [])]
        named |= {segment.name: (field, segment.xxh3_128) for field, segment in segments}
        for name, (field, digest) in named.items():
            check_inside(name, f"{where}: {field}")
            if not isinstance(digest, str):
                raise FormatError(f"{where}: {field}: the hash of {name!r} is no text")
            try:
                check_hash(f"the hash of {name!r}", digest)
            except ValueError as error:
                raise FormatError(f"{where}: {field}: {error}") from None
