"""Which records to read, whether they are answered and by whom, how they become sequences."""

import dataclasses
import datetime
import json
from dataclasses import dataclass, field
from typing import Any

from decant.teacher_dump.inputs.kinds import FIELDS
from decant.teacher_dump.inputs.records import SourceError

FORMATS = ("auto", "jsonl", "parquet", "hf", "cache")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class GenerateConfig:
    """Responses of the teacher's own, or of another model, in place of a text that is given."""

    n: int = 0
    """Responses to sample for each record's prompt or messages; 0 = score the given text."""

    by: str = ""
    """Who samples them: a student's directory, the output of a training, or a hub id, of the
    teacher's tokenizer; "" = the teacher. Its log prob of each sampled token is kept."""

    by_engine: str = ""
    """Engine of `by`: transformers, the default, or vllm."""

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
        if self.by_engine not in ("", "transformers", "vllm"):
            raise ValueError(
                f"by_engine is {self.by_engine!r}: expected transformers or vllm, which sample here"
            )
        if self.by_engine and not self.by:
            raise ValueError(
                f"by_engine: {self.by_engine} has no effect without by: the teacher samples with "
                "teacher.engine"
            )
        if self.temperature == 0 and (self.n > 1 or self.top_p < 1):
            raise ValueError(
                "temperature: 0 gives the same response every time: n must be 1 and top_p 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Which records to read."""

    path: str
    """File, directory, glob, the name or local path of a Hugging Face dataset, or a cache, whose
    sequences are scored again."""

    format: str = "auto"
    """auto, jsonl (JSON lines or one array; also .gz and .zst), parquet, hf, or cache."""

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

    parts: int = 1
    """Deal the records, those within limit, into so many parts, and read one of them."""

    part: int = 0
    """Which part, from 0: record i is in part i modulo parts."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Let the teacher or another model answer the records, and score what it says."""

    def __post_init__(self) -> None:
        """Refuse what cannot be right for any source."""
        if not self.path:
            raise ValueError("source path is empty: give a file, directory, glob or dataset name")
        if self.format not in FORMATS:
            raise ValueError(f"source format is {self.format!r}: expected one of {FORMATS}")
        if self.limit < 0:
            raise ValueError(f"source limit is {self.limit}: expected 0 (all records) or more")
        if not 0 <= self.part < self.parts:
            raise ValueError(
                f"source part is {self.part} of {self.parts} parts: expected 0 to parts - 1"
            )
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


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class SequenceConfig:
    """How records become token sequences."""

    max_length: int = 1024
    """Longest sequence in tokens, special tokens included."""

    overlong: str = "truncate"
    """Longer records: truncate, split (into windows "id#1", "id#2", ...), or error."""

    empty: str = "error"
    """Records without text, messages, or two tokens: error, or drop."""

    duplicates: str = "keep"
    """Records of the same tokens and targets as an earlier one: keep, or drop; both count them."""

    packing: str = "none"
    """none, or concat: plain texts joined and cut into windows of exactly max_length."""

    window_head: str = "repeat"
    """What later windows of a text begin with: repeat (what the tokenizer puts first, such as the
    bos, as no target), or none."""

    targets: str = "response"
    """Scored tokens of messages and prompt + response: response, or all."""

    add_bos: bool = False
    """Start text and prompts with the bos token even if the tokenizer by itself does not."""

    add_eos: bool = True
    """End text and responses with the eos token even if the tokenizer by itself does not."""

    target_share: float = 1.0
    """Keep this share of each sequence's targets, those of which the teacher's entropy is highest;
    the others become context."""

    keep_messages: bool = True
    """Keep the words of conversations in the cache, from which students of other tokenizers render
    their own: 2.3 bytes a target on the answers of the demo; other records have none."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, e.g. {enable_thinking: false}."""

    chat_date: str = ""
    """The date (2026-01-31) for chat templates that ask for today's; they are refused without."""

    chat_template: str = ""
    """File of a chat template to use in place of the tokenizer's own."""

    max_unrenderable: float = 0.05
    """Share of the records that may be left out, and counted, because the chat template cannot say
    what they mean (3 always may); 0: the first one stops the dump."""

    accept_rendering: bool = False
    """Go on where the tokens do not say what the record says: a template that leaves words out."""

    def __post_init__(self) -> None:
        """Refuse unknown values, and options without effect in this combination."""
        for name, allowed in (
            ("overlong", ("truncate", "split", "error")),
            ("empty", ("error", "drop")),
            ("duplicates", ("keep", "drop")),
            ("packing", ("none", "concat")),
            ("targets", ("response", "all")),
            ("window_head", ("repeat", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {allowed}")
        if self.max_length < 2:
            raise ValueError(
                f"max_length is {self.max_length}: expected at least 2, nothing predicts the first"
            )
        if self.packing == "concat" and not self.add_eos:
            raise ValueError("packing: concat ends each document with the eos: set add_eos: true")
        if self.packing == "concat" and self.overlong != "truncate":
            raise ValueError(
                f"overlong: {self.overlong} has no effect with packing: concat, which cuts"
                " everywhere; leave it out"
            )
        if self.window_head != "repeat" and not self.makes_windows:
            raise ValueError(
                f"window_head: {self.window_head} has no effect without overlong: split or packing:"
                " concat; leave it out"
            )
        if not 0 < self.target_share <= 1:
            raise ValueError(f"target_share is {self.target_share}, must lie in (0, 1]")
        if not 0 <= self.max_unrenderable <= 1:
            raise ValueError(f"max_unrenderable is {self.max_unrenderable}, must lie in [0, 1]")
        try:
            json.dumps(self.chat_template_kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"chat_template_kwargs must hold plain JSON values: {error}; quote dates"
            ) from error
        try:
            datetime.date.fromisoformat(self.chat_date or "2026-01-31")
        except ValueError as error:
            raise ValueError(
                f"chat_date is {self.chat_date!r}: expected a date such as 2026-01-31"
            ) from error

    @property
    def makes_windows(self) -> bool:
        """Whether a text may become several sequences."""
        return self.overlong == "split" or self.packing == "concat"


def refuse_hf_options(config: SourceConfig) -> None:
    """Raise SourceError if options of Hugging Face datasets are set for files."""
    if config.split != "train" or config.subset:
        raise SourceError(
            f"split={config.split!r}, subset={config.subset!r} are for Hugging Face datasets and"
            f" have no effect on the files of {config.path!r}: leave them out, or set format: hf"
        )
