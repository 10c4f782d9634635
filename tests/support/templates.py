"""Real chat templates, and a tokenizer that knows their special tokens."""

import functools
import importlib.util
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\|(?:turn|channel|tool|tool_call|tool_response)>"
    r"|<(?:turn|channel|tool|tool_call|tool_response)\|>|<｜[^｜<>]{1,40}｜>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance|think|/think|tool_call|/tool_call)>"
)


@functools.cache
def trl_templates() -> dict[str, str]:
    """The templates that TRL ships, by name, with their training variants; none without TRL."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return {}
    paths = Path(found.origin).parent.glob("chat_templates/*.jinja")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(paths)}


@functools.cache
def _backend() -> Tokenizer:
    """A byte-level BPE that trims spaces from its offsets and puts a bos, as that of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    found = {token for text in trl_templates().values() for token in SPECIAL.findall(text)}
    sentence = "the quick brown fox jumps over a lazy dog hello there what is two plus answer four"
    tokenizer.train_from_iterator(
        [sentence] * 3,
        trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=["<s>", "</s>", *sorted(found)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trim = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trim, bos])
    return tokenizer


def tokenizer_with(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer with this chat template, or with templates by name."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=_backend(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = template
    return wrapped
