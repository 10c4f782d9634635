"""When and how a student is evaluated, and the names of the metrics."""

from dataclasses import dataclass, field

from decant.student_train.config.paths import expand_home

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class GenerationConfig:
    """Prompts to answer at every evaluation, with references to compare the answers with."""

    path: str = ""
    """JSON lines with `prompt` and `response`, or `messages`; none = nothing is generated."""
    prompts: str = "auto"
    """How prompts of text are put to the student: text, as they are; chat, as what a user says in
    the chat template; auto: chat if the cache holds conversations."""
    chat_template: str = ""
    """File of the chat template that the cache was dumped with, if that was not the tokenizer's."""
    num_samples: int = 0
    """How many of the prompts, from the first on; 0 = all."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    do_sample: bool = False
    """Draw the answers, with the same random numbers each time; false takes the most probable
    token at every place."""
    temperature: float = 1.0
    """Softmax temperature of drawn answers."""
    top_p: float = 1.0
    """Drawn answers keep to the smallest set of tokens with this mass."""
    batch_size: int = 8
    """Prompts at once, per process."""

    def __post_init__(self) -> None:
        expand_home(self, "path", "chat_template")
        if self.prompts not in ("auto", "chat", "text"):
            raise ValueError(f"eval.generation.prompts {self.prompts!r} is not auto, chat or text")
        if self.prompts == "text" and self.chat_template:
            raise ValueError("eval.generation.chat_template has no effect with prompts: text")
        if self.num_samples < 0 or self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                "eval.generation needs num_samples >= 0, max_new_tokens >= 1 and batch_size >= 1"
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("eval.generation needs temperature > 0 and 0 < top_p <= 1")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError(
                "eval.generation: temperature and top_p have no effect without do_sample"
            )
        others = (self.num_samples, self.max_new_tokens, self.do_sample, self.batch_size)
        asked = (self.prompts, self.chat_template)
        if not self.path and (others != (0, 128, False, 8) or asked != ("auto", "")):
            raise ValueError("eval.generation: the other keys have no effect without path")


OF_ENTRIES = ("top1_agreement", "acceptance_lower", "acceptance_upper")
"""Metrics that labels alone do not tell."""
HIGHER_IS_BETTER = ("top1_accuracy", "top1_agreement", "acceptance_lower", "acceptance_upper")


NAMES = (
    *("heldout_ce", "heldout_perplexity", "heldout_divergence", "heldout_loss", "teacher_ce"),
    *("heldout_bits_per_byte", "heldout_divergence_per_byte"),
    *("ece", *HIGHER_IS_BETTER),
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out targets, from a cache: no teacher."""

    cache: str = ""
    """A held-out cache of the same teacher tokenizer."""
    heldout_fraction: float = 0.0
    """Instead of a cache: this share of the training cache's sequences is never trained on."""
    every_steps: int = 0
    """Also evaluate every so many steps; 0 = only at the end."""
    batch_size: int = 16
    """Sequences per batch and process."""
    keep_best: str = ""
    """A metric of the evaluation, for example heldout_ce: the saved student is then the one with
    the best, not the last; also `metric/name` for one cache of a mixture."""
    patience: int = 0
    """Stop when so many evaluations were no better than the best; 0 = never."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Prompts to answer at every evaluation."""

    @property
    def has_targets(self) -> bool:
        """Whether there are held-out targets."""
        return bool(self.cache or self.heldout_fraction)

    def __post_init__(self) -> None:
        expand_home(self, "cache")
        if self.cache and self.heldout_fraction:
            raise ValueError("eval.cache and eval.heldout_fraction exclude each other")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"eval.heldout_fraction must lie in [0, 1): {self.heldout_fraction}")
        if self.every_steps < 0 or self.batch_size < 1:
            raise ValueError("eval.every_steps must be >= 0 and eval.batch_size >= 1")
        if self.every_steps and not (self.has_targets or self.generation.path):
            raise ValueError(
                "eval.every_steps needs eval.cache, eval.heldout_fraction or eval.generation.path"
            )
        metrics = (*NAMES * self.has_targets, *ROUGE * bool(self.generation.path))
        if self.keep_best and self.keep_best.split("/")[0] not in metrics:
            raise ValueError(
                f"eval.keep_best {self.keep_best!r} is not among the metrics of this evaluation: "
                f"{', '.join(metrics) or 'there are none'}"
            )
        if self.keep_best and not self.every_steps:
            raise ValueError("eval.keep_best has no effect without eval.every_steps")
        if self.patience < 0 or (self.patience and not self.keep_best):
            raise ValueError("eval.patience must be >= 0, and needs eval.keep_best")
