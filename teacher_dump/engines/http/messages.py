"""What crosses the network between a teacher service and its clients.

A body is framed: 8 bytes with the length of a JSON header, the header, then raw arrays; all numbers
little-endian. Distributions travel as packed rows (`packed_rows`), never as text. Knows neither
sockets nor engines.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import TeacherInfo, to_json
from decant.schemas.strict import canonical
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.engines.remote.texts import dataclass_from, parsed, shown
from decant.teacher_dump.inputs.records import TokenSequence

PROTOCOL = 1
TEACHER_PATH = "/v1/decant/teacher"
TOKENIZER_PATH = "/v1/decant/tokenizer"
SCORE_PATH = "/v1/decant/score"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 64 << 10
"""Of a request and of a tokenizer's files; an answer's names a number per sequence."""
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPERATURES = 64
MOST = 2**31 - 1
"""Of a number of ids or tokens."""
MAX_FIRST_SEQUENCE = 2**62


class MessageError(ValueError):
    """A body is not what this protocol says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCard:
    """What a service says of its teacher."""

    protocol: int
    teacher: TeacherInfo
    """As a dump by the same engine on the same files would record it."""
    route: str
    """vLLM's route to the numbers (`vllm_setup`); "" with another engine."""
    tokenizer_fingerprint: str
    """`schemas.tokenizer_fingerprint`; "" if the service has no tokenizer."""
    max_positions: int
    """Longest sequence of the model's configuration; 0 = no stated limit."""
    max_length: int
    """Longest sequence that this service scores."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two services to stand in for each other."""
        return {
            "fingerprint": self.teacher.fingerprint,
            "dtype": self.teacher.dtype,
            "engine": self.teacher.engine.split()[0],
            "route": self.route,
            "output rows": self.teacher.vocab_size,
            "tokenizer": self.tokenizer_fingerprint,
        }

    def served_by(self, route: str, max_length: int) -> "TeacherCard":
        """The card with the engine's own facts."""
        return dataclasses.replace(self, route=route, max_length=max_length)

    def digest(self) -> str:
        """The identity in one word."""
        return hashlib.sha256(canonical(self.identity())).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(to_json(self)).encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "TeacherCard":
        """From JSON. Raises MessageError, naming `where`."""
        try:
            values = parsed(data)
            found = values.get("protocol") if isinstance(values, dict) else None
            if found != PROTOCOL:
                raise MessageError(
                    f"{where} speaks protocol {shown(found)} of the teacher service, this program "
                    f"{PROTOCOL}: run the same version on both sides"
                )
            card = dataclass_from(TeacherCard, values, where)
            card._check()
            return card
        except MessageError:
            raise
        except ValueError as error:
            problem = f"{where} does not answer like a teacher service: {shown(error)}"
            raise MessageError(problem) from error

    def _check(self) -> None:
        """Raise ValueError for what no teacher is."""
        teacher = self.teacher
        for name, value, least in (
            ("vocab_size", teacher.vocab_size, 1),
            ("max_positions", self.max_positions, 0),
            ("max_length", self.max_length, 1),
        ):
            if not least <= value <= MOST:
                raise ValueError(f"{name} is {value}, must lie in [{least}, {MOST}]")
        texts = [self.route, self.tokenizer_fingerprint, *to_json(teacher).values()]
        for text in texts:
            if isinstance(text, str) and (not text.isprintable() or len(text) > 4096):
                raise ValueError(f"{text[:200]!r} is no printable text of at most 4096 characters")
        if not teacher.engine.split():
            raise ValueError("teacher.engine is empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class _RequestHeader:
    """What stands before the arrays of a score request."""

    digest: str
    first_sequence: int
    reduction: Reduction
    sequences: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreRequest:
    """Sequences to score, laid end to end, and what is to be made of the logits."""

    digest: str
    """`TeacherCard.digest` of the teacher that is meant."""
    first_sequence: int
    """Plan index of the first sequence; random draws depend on it."""
    reduction: Reduction
    lengths: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    @staticmethod
    def of(
        digest: str, reduction: Reduction, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> "ScoreRequest":
        """Lay sequences end to end; their ids stay here."""
        return ScoreRequest(
            digest=digest,
            first_sequence=first_sequence,
            reduction=reduction,
            lengths=np.array([len(s.input_ids) for s in sequences], dtype=np.int32),
            input_ids=np.concatenate([s.input_ids for s in sequences]).astype(np.int32),
            is_target=np.concatenate([s.is_target for s in sequences]).astype(np.bool_),
        )

    def sequences(self) -> list[TokenSequence]:
        """The sequences, named by their place."""
        ends = np.cumsum(self.lengths)[:-1]
        ids, masks = np.split(self.input_ids, ends), np.split(self.is_target, ends)
        pairs = zip(ids, masks, strict=True)
        return [TokenSequence(str(place), i, mask) for place, (i, mask) in enumerate(pairs)]

    def to_bytes(self) -> bytes:
        """As a framed body."""
        header = {
            "digest": self.digest,
            "first_sequence": self.first_sequence,
            "reduction": to_json(self.reduction),
            "sequences": len(self.lengths),
            "tokens": len(self.input_ids),
        }
        return frame(
            header,
            self.lengths.astype("<i4").tobytes(),
            self.input_ids.astype("<i4").tobytes(),
            self.is_target.tobytes(),
        )

    @staticmethod
    def from_bytes(data: bytes) -> "ScoreRequest":
        """From a framed body, checked in itself. Raises MessageError."""
        header, body = unframe(data, MAX_HEADER_BYTES)
        try:
            given = dataclass_from(_RequestHeader, header, "header of a score request")
        except ValueError as error:
            raise MessageError(shown(error)) from error
        num_sequences, num_tokens, first = given.sequences, given.tokens, given.first_sequence
        expected = 4 * num_sequences + 5 * num_tokens
        if num_sequences < 1 or num_tokens < 1 or len(body) != expected or first < 0:
            raise MessageError(
                f"a score request of {shown(num_sequences)} sequences and {shown(num_tokens)} "
                f"tokens from place {shown(first)} has {len(body)} bytes of arrays, expected "
                f"{shown(expected)}"
            )
        if first > MAX_FIRST_SEQUENCE:
            raise MessageError(f"first_sequence is {shown(first)}, at most {MAX_FIRST_SEQUENCE}")
        if len(given.reduction.temperatures) > MAX_TEMPERATURES:
            raise MessageError(
                f"{len(given.reduction.temperatures)} temperatures, at most {MAX_TEMPERATURES}"
            )
        lengths = np.frombuffer(body, "<i4", num_sequences).astype(np.int32)
        ids = np.frombuffer(body, "<i4", num_tokens, 4 * num_sequences).astype(np.int32)
        mask = np.frombuffer(body, np.uint8, num_tokens, 4 * (num_sequences + num_tokens))
        if lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != num_tokens:
            raise MessageError("the lengths of a score request do not add up to its tokens")
        request = ScoreRequest(
            digest=given.digest,
            first_sequence=first,
            reduction=given.reduction,
            lengths=lengths,
            input_ids=ids,
            is_target=mask.astype(np.bool_),
        )
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        if request.is_target[starts].any():
            raise MessageError("the first token of a sequence cannot be a target")
        if not np.add.reduceat(request.is_target, starts, dtype=np.int64).all():
            raise MessageError("a sequence has no target")
        return request


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreAnswer:
    """The packed rows of a request's sequences."""

    rows: list[NDArray[np.int32]]
    """Of each sequence, in order; fewer than asked for if one cannot be scored."""
    not_finite: bool
    """Whether the teacher gives NaN or infinite logits for the sequence after the last."""

    def to_bytes(self) -> bytes:
        """As a framed body."""
        header = {
            "targets": [len(part) for part in self.rows],
            "words": self.rows[0].shape[1] if self.rows else 0,
            "not_finite": self.not_finite,
        }
        return frame(header, *(part.astype("<i4", copy=False).tobytes() for part in self.rows))

    @staticmethod
    def from_bytes(data: bytes, num_targets: Sequence[int], reduction: Reduction) -> "ScoreAnswer":
        """From a framed body, if it answers for sequences of so many targets.

        Raises MessageError.
        """
        header, body = unframe(data)
        counts, not_finite = header.get("targets"), header.get("not_finite")
        length = len(counts) if isinstance(counts, list) else -1
        is_whole = length == len(num_targets)
        words = reduction.row_words
        given = list(num_targets[: max(length, 0)])
        if counts != given or not_finite is is_whole:
            raise MessageError(
                f"targets {shown(counts)} answered, expected {shown(list(num_targets))}"
            )
        expected = 4 * words * sum(given)
        if len(body) != expected:
            raise MessageError(f"{len(body)} bytes of rows answered, expected {expected}")
        rows = np.frombuffer(body, "<i4").astype(np.int32, copy=False).reshape(-1, words)
        parts = np.split(rows, np.cumsum(given)[:-1]) if given else []
        return ScoreAnswer(rows=parts, not_finite=not is_whole)


def frame(header: dict[str, Any], *parts: bytes) -> bytes:
    """A body of a header and the bytes after it."""
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(LENGTH_BYTES, "little"), text, *parts])


def most_answered(num_targets: Sequence[int], reduction: Reduction) -> int:
    """Bytes of the longest body that answers for sequences of so many targets."""
    return MAX_HEADER_BYTES + 16 * len(num_targets) + 4 * reduction.row_words * sum(num_targets)


def unframe(data: bytes, most: int = MOST) -> tuple[dict[str, Any], memoryview]:
    """The header of a body, of `most` bytes, and the bytes after it. Raises MessageError."""
    size = int.from_bytes(data[:LENGTH_BYTES], "little")
    end = LENGTH_BYTES + size
    if len(data) < end or size == 0:
        raise MessageError(f"a body of {len(data)} bytes is cut short")
    if size > most:
        raise MessageError(f"the header of a body has {size} bytes, at most {most}")
    try:
        header = parsed(data[LENGTH_BYTES:end])
    except ValueError as error:
        raise MessageError(f"the header of a body is no JSON: {shown(error)}") from error
    if not isinstance(header, dict):
        raise MessageError("the header of a body is not an object")
    return header, memoryview(data)[end:]


def frame_files(files: dict[str, bytes]) -> bytes:
    """A body of files by name."""
    return frame({"files": {name: len(data) for name, data in files.items()}}, *files.values())


def unframe_files(data: bytes) -> dict[str, bytes]:
    """The files of a body by plain name. Raises MessageError."""
    header, body = unframe(data, MAX_HEADER_BYTES)
    sizes = header.get("files")
    if not isinstance(sizes, dict) or not all(type(s) is int and s >= 0 for s in sizes.values()):
        raise MessageError("a body of files does not list them")
    if (total := sum(sizes.values())) != len(body):
        raise MessageError(f"a body of files has {len(body)} bytes, expected {shown(total)}")
    files, start = {}, 0
    for name, size in sizes.items():
        if name != name.replace("\\", "/").split("/")[-1] or name in ("", ".", ".."):
            raise MessageError(
                f"a body of files holds {shown(repr(name))}, which is not a plain file name"
            )
        files[name] = bytes(body[start : start + size])
        start += size
    return files


def differing(ours: TeacherCard, theirs: TeacherCard) -> list[str]:
    """Names and both values of what differs in the identities."""
    pairs = zip(ours.identity().items(), theirs.identity().items(), strict=True)
    return [f"{name} {one!r} and {other!r}" for (name, one), (_, other) in pairs if one != other]
