"""Which records to read, and whether the teacher answers them itself."""

import dataclasses
from dataclasses import dataclass, field

from decant.teacher_dump.inputs.kinds import FIELDS
from decant.teacher_dump.inputs.records import SourceError

FORMATS = ("auto", "jsonl", "parquet", "hf")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class GenerateConfig:
    """Responses of the teacher's own, in place of a text that is given."""

    n: int = 0
    """Responses to sample for each record's prompt or messages; 0 = score the given text."""

    temperature: float = 1.0
    """Divides the logits before sampling; 0 = always the most probable token."""

    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens with this mass."""

    max_new_tokens: int = 512
    """Longest response; a prompt with its response never exceeds sequences.max_length."""

    seed: int = 0
    """Of the sampling; a response depends on it, the prompt's number and its own."""

    part_prompts: int = 256
    """Prompts whose responses are kept, or lost by an interruption, together: one file."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, and settings without effect."""
        for name, least in (("n", 0), ("max_new_tokens", 1), ("part_prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if self.temperature != 0 and not 1e-4 <= self.temperature <= 1e4:
            raise ValueError(f"temperature is {self.temperature}: expected 0, or 1e-4 to 1e4")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a mass in (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected 0 to 2^63 - 1")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if self.n == 0 and given:
            raise ValueError(f"source.generate: {given} have no effect with n: 0: set n")
        if self.temperature == 0 and (self.n > 1 or self.top_p < 1):
            raise ValueError(
                "temperature: 0 gives the same response every time: n must be 1 and top_p 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Which records to read."""

    path: str
    """File, directory, glob, or the name or local path of a Hugging Face dataset."""

    format: str = "auto"
    """auto, jsonl (JSON lines or one array; also .gz and .zst), parquet, or hf."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    subset: str = ""
    """Configuration of a Hugging Face dataset ("" is its only one, or its default)."""

    id_field: str = "id"
    """Field that names a sample; without an "id", samples are called "<file name>:<index>"."""

    fields: dict[str, str] = field(default_factory=dict)
    """Names of the source's fields, by the name that is read: {response: answer}; "" leaves one
    out."""

    limit: int = 0
    """Read only this many records from the start (0 = all)."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Let the teacher answer the records, and score what it says."""

    def __post_init__(self) -> None:
        """Refuse what cannot be right for any source."""
        if not self.path:
            raise ValueError("source path is empty: give a file, directory, glob or dataset name")
        if self.format not in FORMATS:
            raise ValueError(f"source format is {self.format!r}: expected one of {FORMATS}")
        if self.limit < 0:
            raise ValueError(f"source limit is {self.limit}: expected 0 (all records) or more")
        if not self.id_field or not self.split:
            raise ValueError("source id_field and split must not be empty")
        if unknown := sorted(set(self.fields) - FIELDS):
            raise ValueError(
                f"source fields names {unknown}: expected some of {', '.join(sorted(FIELDS))}"
            )
        taken = [name for name in self.fields.values() if name]
        if len(set(taken)) < len(taken):
            raise ValueError(f"source fields reads one field twice: {self.fields}")
        if self.format in ("jsonl", "parquet"):
            refuse_hf_options(self)


def refuse_hf_options(config: SourceConfig) -> None:
    """Raise SourceError if options of Hugging Face datasets are set for files."""
    if config.split != "train" or config.subset:
        raise SourceError(
            f"split={config.split!r}, subset={config.subset!r} are for Hugging Face datasets and"
            f" have no effect on the files of {config.path!r}: leave them out, or set format: hf"
        )
