"""What an import takes: which file of which tool, and what may be done with it."""

from dataclasses import dataclass

TABLES = ("distillkit", "axolotl")
RESPONSES = ("vllm", "trl", "tinker")
FORMATS = (*TABLES, *RESPONSES, "megatron", "llamacpp")
UNKNOWN_LABEL = ("refuse", "bound", "skip")
ONLY_FOR = {
    "logprobs_field": ("axolotl",),
    "codec": ("distillkit",),
    "tokens": ("megatron",),
    "bos": ("llamacpp",),
}
"""The options that some formats have; without effect with the others."""
DENSE_K = 64
"""Entries kept of whole distributions, unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """What to import and how."""

    path: str
    """What the other tool wrote: a file, or a directory of them."""
    file_format: str
    """distillkit | axolotl | vllm | trl | tinker | megatron | llamacpp."""
    teacher: str
    """Whose distributions these are; goes into the manifest."""
    tokenizer: str = ""
    """Directory of the tokenizer of the ids; empty if there is none at hand."""
    vocab_size: int = 0
    """V: rows of the teacher's output layer; 0 = one more than the tokenizer's largest id."""
    k: int = 0
    """Entries to keep per target; 0 = all that every target has, 64 of whole distributions."""
    varying: bool = False
    """Keep lists as long as each is (method topp), and not the same number of entries of each."""
    renormalised: bool = False
    """The values are logits, or log probs that add up to 1 over the kept ids."""
    unknown_label: str = "refuse"
    """refuse | bound | skip targets whose actual token is not among the entries."""
    max_excess: float = 0.0
    """Scale lists whose probabilities miss 1 by at most this much, as fitted ones do, to 1."""
    shift: int = 0
    """Move every list by so many tokens from where the format puts it."""
    logprobs_field: str = "logprobs"
    """axolotl: the column of log probs, its `logprobs_field`."""
    codec: str = ""
    """distillkit: YAML or JSON file with its codec's settings; empty = found beside the rows."""
    tokens: str = ""
    """megatron: the samples' tokens in the order of training: .npy, or rows with input_ids."""
    bos: int = -1
    """llamacpp: id that the model saw in place of each chunk's first token; -1 = as in the file."""
    precision: str = "f32"
    """f32 | f16 | compact."""
    shard_targets: int = 2_000_000
    """Targets per shard, at least."""

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            raise ValueError(f"format {self.file_format!r} is not one of {FORMATS}")
        if self.unknown_label not in UNKNOWN_LABEL:
            raise ValueError(f"unknown label {self.unknown_label!r} is not one of {UNKNOWN_LABEL}")
        if not (self.tokenizer or self.vocab_size) and self.file_format != "llamacpp":
            raise ValueError("give --tokenizer, or --vocab-size if there is none at hand")
        for name, formats in ONLY_FOR.items():
            default = type(self).__dataclass_fields__[name].default
            if self.file_format not in formats and getattr(self, name) != default:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no effect with --format {self.file_format}")
        if self.file_format == "megatron" and not self.tokens:
            raise ValueError(
                "--format megatron needs --tokens: its files hold no tokens; give those that the "
                "teacher was fed, a row per sample in the order of training"
            )
        if self.varying and (self.k or self.renormalised):
            raise ValueError("--varying excludes --k and --renormalised")
        for name in ("k", "vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not 0 <= self.max_excess < float("inf"):
            raise ValueError(f"max_excess is {self.max_excess}: expected 0 or more")
        if self.shard_targets < 1:
            raise ValueError(f"shard_targets is {self.shard_targets}: expected at least 1")
