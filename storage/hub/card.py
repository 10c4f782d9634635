"""The dataset card of a pushed cache: what it holds, its figures, how to read it.

Text that comes from a cache is data: it is escaped wherever it stands, so that it can neither
change the card's structure nor link anywhere.
"""

import re
from typing import Any

import yaml

from decant.schemas import Manifest
from decant.storage.cache.lineage import sampler_text
from decant.storage.inspect.report import Report, Spread

CARD = "README.md"
CACHE_ID = "decant_cache_id"
"""Key of the card's metadata: whose files the repository holds, or is about to."""
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
MARKUP = re.compile(
    r"[^0-9A-Za-z ,;/=%+.\u00a0-\U0010ffff-]|(?i:\bwww\.)|(?<![0-9A-Za-z])-|-(?![0-9A-Za-z])"
)
"""Characters that Markdown or HTML could read as something else than themselves."""
LONGEST = 200
"""Characters of one text from a cache."""


def dataset_card(manifest: Manifest, report: Report, repo: str, license_id: str) -> str:
    """The text of README.md, beginning with the metadata that the hub reads."""
    metadata: dict[str, Any] = {
        "license": license_id,
        "tags": ["decant", "knowledge-distillation", "teacher-distributions"],
        "size_categories": [_size(report.tokens)],
        "configs": [{"config_name": "default", "data_files": "shards/part-*.parquet"}],
        CACHE_ID: manifest.cache_id,
    }
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=False)
    rows = [("", ""), ("---", "---"), *_rows(manifest, report)]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{head}---

# A teacher's next-token distributions

For each target token of the data, the teacher's most probable next tokens with their log probs, and
the mass of the rest: what a student needs to be distilled from the teacher without running it.

{table}

## Read it

```python
from decant.storage import CacheReader  # pip install decant

cache = CacheReader("hf://datasets/{repo}")
sequence = cache[0]
print(sequence.input_ids, sequence.positions, sequence.token_ids, sequence.logprobs)
```

`decant pull {repo} DIR` copies it and verifies every byte; `decant train` trains from either. The
files are Parquet, one row per token; the format is described in Decant's `docs/format.md`.
"""


def stated_cache_id(card: str) -> str:
    """The id of the cache that a card is of; "" if it says none."""
    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return ""
    return str(metadata.get(CACHE_ID, "")) if isinstance(metadata, dict) else ""


def check_license(license_id: str) -> None:
    """Raise ValueError unless it is what the hub's metadata can hold."""
    if not LICENSE.fullmatch(license_id):
        raise ValueError(
            f"--license {license_id!r} is no identifier of a licence: expected one such as "
            "apache-2.0, cc-by-4.0 or other; the teacher's licence and the data's both count"
        )


def escaped(text: str) -> str:
    """Text on one line in which nothing is markup, a link or HTML; cut where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > LONGEST:
        line = line[: LONGEST - 1] + "…"
    return MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), line)


def _rows(manifest: Manifest, report: Report) -> list[tuple[str, str]]:
    teacher = manifest.teacher
    temperatures = ", ".join(f"{t:g}" for t in manifest.temperatures)
    sampled = sampler_text(manifest.source)
    rows = [
        ("teacher", escaped(f"{teacher.name} ({teacher.architecture}, {teacher.dtype})")),
        ("teacher fingerprint", escaped(teacher.fingerprint)),
        ("scored by", escaped(teacher.engine)),
        ("tokenizer fingerprint", escaped(manifest.tokenizer.fingerprint) or "none"),
        ("vocabulary", f"{manifest.shared_vocab_size:,} ids"),
        ("data", escaped(str(manifest.source.get("path", "unknown")))),
        *([("sampled by", escaped(sampled))] if sampled else []),
        ("kept", f"{escaped(manifest.truncation.text())}, {escaped(manifest.precision)}"),
        ("temperatures", temperatures),
        ("sequences", f"{report.sequences:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("targets", f"{report.targets:,}"),
        ("bytes", f"{report.bytes:,} in {report.shards:,} shards"),
        ("bytes per target", _number(report.bytes_per_target, ".1f")),
    ]
    for of in report.temperatures:
        rows.append((f"mass kept at T={of.temperature:g}", _spread(of.retained_mass)))
    rows += [
        ("perplexity of the teacher on this data", _number(report.teacher_perplexity, ".3f")),
        ("top-1 agreement with the data", _number(report.top1_agreement, ".4f")),
        ("calibration error of the top 1", _number(report.calibration_error, ".4f")),
        ("rejected sequences", f"{report.rejected_sequences:,}"),
        ("cache id", escaped(manifest.cache_id)),
        ("format version", str(manifest.format_version)),
    ]
    return [(name, value) for name, value in rows if value]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.mean:.4f} on average, {spread.p05:.4f} at the lowest 5 %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(tokens: int) -> str:
    return next((name for limit, name in SIZES if tokens < limit), "n>1B")
