"""DistillKit's compressed rows: its settings, and numpy decoders of its two codecs.

The codec of today keeps the first `exact_k` log probs as they are, fits the rest by a sum of terms
c_i f_i(t) over the rank t, and may add residuals in a few bits each; with `delta_encoding` all of
this is of differences between neighbours. Ids are packed into the bits that the vocabulary needs.
The older one stores logits or log probs: exact ones, then powers of the rank.

Every step is done in the dtype in which DistillKit does it, so that values agree with its own
decoder's to the last bits. Shapes: n targets, k entries.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from decant.schemas.manifest import MAX_SLOTS, MAX_VOCAB
from decant.storage.exchange.bounds import read_whole
from decant.storage.exchange.foreign import ForeignError

WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0, "float64": 0.0}
"""Relative errors; that of bfloat16 twice its own: a value is rounded when stored and when read."""
SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}
MAX_TERMS = 64
"""Of a polynomial."""
MAX_CODEC = 1 << 20
"""Bytes of a file of settings."""
FOUND_AS = "compression_config.yaml"
"""DistillKit's sampler writes its settings under this name beside the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Residuals of a run of entries."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """Settings of today's codec, under DistillKit's own names."""

    d: int
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...]
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def value_bytes(self) -> int:
        """Of one target's values."""
        size = self.exact_k * WIDTHS[self.exact_dtype]
        size += len(self.polynomial_terms) * WIDTHS[self.term_dtype]
        for b in self.residual_bins:
            size += WIDTHS[b.scale_dtype] + _bytes(b.num_elements * b.element_bits)
        return size

    @property
    def id_bits(self) -> int:
        """Of one id."""
        return id_bits(self.d)

    @property
    def id_bytes(self) -> int:
        """Of one target's ids."""
        return _bytes(self.k * self.id_bits)

    def values(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """[n, k] log probs from bytes [n, value_bytes]."""
        n, at = len(packed), 0
        exact, at = _take(packed, at, self.exact_k, self.exact_dtype)
        coefficients, at = _take(packed, at, len(self.polynomial_terms), self.term_dtype)
        residual = np.zeros((n, self.k - self.exact_k), np.float32)
        start = 0
        for b in self.residual_bins:
            scale, at = _take(packed, at, 1, b.scale_dtype)
            size = _bytes(b.num_elements * b.element_bits)
            elements = unpack_bits(packed[:, at : at + size], b.element_bits, b.num_elements)
            at += size
            stop = start + b.num_elements
            residual[:, start:stop] = _dequantised(elements, scale, b.element_bits)
            start = stop
        rest = _rounded(residual, self.exact_dtype)
        dtype = self.exact_dtype
        if self.polynomial_terms:
            fit = _fit(self._terms(), coefficients, self.term_dtype)
            rest = _rounded(fit + rest, dtype := _wider(self.term_dtype, self.exact_dtype))
        values: NDArray = np.concatenate([exact, rest], axis=1, dtype=_computed(dtype))
        if self.delta_encoding:
            values = np.cumsum(values.astype(np.float32), axis=1, dtype=np.float64)
            values = _rounded(values.astype(np.float32), self.exact_dtype)
        return values.astype(np.float64)

    def _terms(self) -> NDArray:
        """[k - exact_k, terms] what the coefficients are of."""
        count, dtype = self.k - self.exact_k, _computed(self.term_dtype)
        t = np.linspace(0, 1, count) if self.normalize_t else np.arange(count)
        t = _rounded(t.astype(dtype), self.term_dtype)
        with np.errstate(all="ignore"):  # exp of a rank overflows, as it does there
            columns = [
                SPECIAL[term](t) if isinstance(term, str) else np.power(t, term)
                for term in self.polynomial_terms
            ]
        return _rounded(np.stack(columns, axis=1).astype(dtype), self.term_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class LegacyCodec:
    """Settings of the older codec, under DistillKit's own names."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    @property
    def id_bits(self) -> int:
        """Of one id."""
        return id_bits(self.vocab_size)

    @property
    def id_words(self) -> int:
        """64-bit words of one target's ids."""
        return -(-self.k // (64 // self.id_bits))

    @property
    def num_terms(self) -> int:
        """Coefficients of one target; none where every value is exact."""
        rest = self.polynomial_degree + 1 + self.with_sqrt_term
        return rest if self.exact_k < self.k else 0

    def ids(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """[n, k] from words [n, id_words]: each holds whole ids, the first in its low bits."""
        each = 64 // self.id_bits
        shifts = np.arange(each, dtype=np.uint64) * np.uint64(self.id_bits)
        ids = (words[:, :, None] >> shifts) & np.uint64(2**self.id_bits - 1)
        return ids.reshape(len(words), -1)[:, : self.k].astype(np.int64)

    def values(
        self, exact: NDArray[np.float32], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """[n, k] values from exact ones [n, exact_k] and coefficients [n, num_terms]."""
        t = np.arange(1, self.k - self.exact_k + 1, dtype=np.float32)
        sign = -1 if self.invert_polynomial else 1
        columns = [np.power(t, np.float32(sign * i)) for i in range(self.polynomial_degree + 1)]
        columns += [np.sqrt(t)] if self.with_sqrt_term else []
        fit = _fit(np.stack(columns, axis=1), coefficients, "float32")
        return np.concatenate([exact, fit[:, : self.k - self.exact_k]], axis=1, dtype=np.float64)


def id_bits(vocab_size: int) -> int:
    """Bits of an id, by the float32 logarithm that DistillKit takes."""
    return int(np.ceil(np.log2(np.float32(vocab_size))))


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """[n, count] integers of so many bits, the most significant first, from bytes [n, ...]."""
    whole = np.zeros((len(packed), count, 64), np.uint8)
    flat = np.unpackbits(np.ascontiguousarray(packed), axis=1)[:, : count * bits]
    whole[:, :, 64 - bits :] = flat.reshape(len(packed), count, bits)
    return np.packbits(whole, axis=2).view(">u8")[..., 0].astype(np.int64)


def read_codec(path: str, source: str) -> Codec | LegacyCodec | None:
    """The settings in a YAML or JSON file, or in the one that DistillKit leaves beside its rows.

    The file holds the settings alone, or a configuration of a training run with them. None if no
    file is named and none is found. Raises ForeignError for a file of anything else.
    """
    file = Path(os.path.expanduser(path)) if path else _beside(source)
    if file is None:
        return None
    try:
        text = read_whole(file, MAX_CODEC).decode()
        value = yaml.safe_load(text)  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ForeignError(f"codec {file} cannot be read: {error}") from error
    found = value
    for name in ("teacher", "logprob_compressor"):
        found = found.get(name, found) if isinstance(found, dict) else found
    if isinstance(found, dict) and "legacy_logit_compression" in found:
        found = found["legacy_logit_compression"]
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ForeignError(f"codec {file}: expected keys with values, found one {kind}")
    codec = LegacyCodec if "polynomial_degree" in found else Codec
    try:
        return _checked(_filled(codec, found), file)
    except (TypeError, KeyError) as error:
        names = ", ".join(f.name for f in dataclasses.fields(codec))
        raise ForeignError(
            f"codec {file}: {error}; expected DistillKit's settings of a codec: {names}"
        ) from error


def _beside(source: str) -> Path | None:
    place = Path(os.path.expanduser(source))
    folder = place if place.is_dir() else place.parent
    return folder / FOUND_AS if (folder / FOUND_AS).exists() else None


def _filled(kind: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    values = {name: value for name, value in values.items() if name in known and value is not None}
    if "residual_bins" in values:
        values["residual_bins"] = tuple(Bin(**entry) for entry in values["residual_bins"])
    if "polynomial_terms" in values:
        values["polynomial_terms"] = tuple(values["polynomial_terms"])
    return kind(**values)


def _checked(codec: Codec | LegacyCodec, file: Path) -> Codec | LegacyCodec:
    problems = _numbers_out_of_bounds(codec)
    if problems:
        raise ForeignError(f"codec {file}: {'; '.join(problems)}")
    for name in ("exact_dtype", "term_dtype"):
        dtype = getattr(codec, name, "float32")
        if not isinstance(dtype, str) or dtype not in WIDTHS:
            problems.append(f"{name} is {dtype!r}: expected one of {', '.join(WIDTHS)}")
    if not 0 <= codec.exact_k <= codec.k or codec.k < 1:
        problems.append(
            f"exact_k {codec.exact_k} of k {codec.k}: expected 0 to k, and k at least 1"
        )
    if isinstance(codec, Codec):
        problems += [
            f"polynomial_terms has {term!r}: expected a whole number, sqrt or exp"
            for term in codec.polynomial_terms
            if not (term in SPECIAL if isinstance(term, str) else type(term) is int)
        ]
        for b in codec.residual_bins:
            if b.scale_dtype not in WIDTHS or not 1 <= b.element_bits <= 64 or b.num_elements < 1:
                problems.append(f"residual_bins has {b}")
        if sum(b.num_elements for b in codec.residual_bins) > codec.k - codec.exact_k:
            problems.append("residual_bins hold more than k - exact_k elements")
    if problems:
        raise ForeignError(f"codec {file}: {'; '.join(problems)}")
    return codec


def _numbers_out_of_bounds(codec: Codec | LegacyCodec) -> list[str]:
    """What is said of numbers that are none, or that no file of rows could have."""
    bounds = {"d": (2, MAX_VOCAB), "vocab_size": (2, MAX_VOCAB), "k": (1, MAX_SLOTS)}
    bounds |= {"exact_k": (0, MAX_SLOTS), "polynomial_degree": (0, MAX_TERMS)}
    bounds |= {"element_bits": (1, 64), "num_elements": (1, MAX_SLOTS)}
    bins = codec.residual_bins if isinstance(codec, Codec) else ()
    problems = []
    for part in (codec, *bins):
        for name, (least, most) in bounds.items():
            value = getattr(part, name, least)
            if type(value) is not int or not least <= value <= most:
                said = "a whole number" if type(value) is not int else f"{least} to {most}"
                problems.append(f"{name} is {value!r:.40}: expected {said}")
    if isinstance(codec, Codec):
        terms = codec.polynomial_terms
        if len(terms) > MAX_TERMS or any(type(t) is int and abs(t) > MAX_TERMS for t in terms):
            problems.append(f"polynomial_terms has more than {MAX_TERMS} terms, or powers above it")
        problems += [f"residual_bins has {b}" for b in bins if not isinstance(b.scale_dtype, str)]
    return problems


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _take(packed: NDArray[np.uint8], at: int, count: int, dtype: str) -> tuple[NDArray, int]:
    """Numbers [n, count] out of bytes, and where the next ones begin."""
    end = at + count * WIDTHS[dtype]
    part = np.ascontiguousarray(packed[:, at:end])
    if dtype == "bfloat16":
        return (part.view("<u2").astype(np.uint32) << 16).view(np.float32), end
    return part.view(np.dtype(dtype).newbyteorder("<")).astype(_computed(dtype)), end


def _computed(dtype: str) -> type:
    """What numpy holds values of a dtype in."""
    return np.float64 if dtype == "float64" else np.float32


def _wider(a: str, b: str) -> str:
    """What torch computes in, given two dtypes."""
    if a == b:
        return a
    return "float64" if "float64" in (a, b) else "float32"


def _rounded(values: NDArray, dtype: str) -> NDArray:
    """Values as a dtype holds them."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        even = (bits >> 16) & 1
        kept = ((bits + 0x7FFF + even) >> 16 << 16).astype(np.uint32).view(np.float32)
        return np.where(np.isfinite(values), kept, values).astype(np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values.astype(_computed(dtype))


def _fit(terms: NDArray, coefficients: NDArray, dtype: str) -> NDArray:
    """[n, t] sums over the terms, products and sum rounded to the dtype."""
    with np.errstate(all="ignore"):
        products = _rounded(terms[None] * coefficients[:, None], dtype)
        return _rounded(products.sum(axis=2, dtype=products.dtype), dtype)


def _dequantised(elements: NDArray[np.int64], scale: NDArray, bits: int) -> NDArray[np.float32]:
    if bits == 1:
        return (elements.astype(np.float32) * 2 - 1) * scale
    return (elements - 2 ** (bits - 1)).astype(np.float32) * scale
