"""Records, a tokenizer with unequal sentences, and what becomes of the one through the other."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from decant.teacher_dump.inputs.border import BorderCheck
from decant.teacher_dump.inputs.records import Record, TokenSequence
from decant.teacher_dump.inputs.sequences import SequenceConfig, SequenceCounts, iter_sequences

VOCAB_SIZE = 300
SENTENCES = ["hello world, how are you?", "the user asks and the assistant answers", "a b c \n"]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " world"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "the answers"},
]
ANSWERS = " world<|end|>the answers<|end|>"
HEADER = "{{ '<|start|>' + m.role + '\n' }}"
PLAIN_TEMPLATE = (
    "{% for m in messages %}" + HEADER + "{{ m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)


def build_tokenizer(
    *, adds_bos: bool = True, template: str = PLAIN_TEMPLATE, head: str = "<s>", **special: str
):
    """A byte-level BPE that trims spaces from its offsets, as that of Llama 3 does.

    With `adds_bos` it puts `head` before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<s>", "</s>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trim: Any = processors.ByteLevel(trim_offsets=True)
    before = [(token, tokenizer.token_to_id(token)) for token in head.split()]
    bos = processors.TemplateProcessing(single=f"{head} $A", special_tokens=before)
    tokenizer.post_processor = processors.Sequence([trim, bos]) if adds_bos else trim
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | special
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    wrapped.chat_template = template
    return wrapped


TOKENIZER = build_tokenizer()
MARKED_TOKENIZER = build_tokenizer(template=MARKED_TEMPLATE)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def bare(text: str) -> list[int]:
    """Return the tokens of the text alone."""
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def record(sample_id: str = "s", **fields: Any) -> Record:
    """Make a record of the fields."""
    return Record(sample_id, fields, f"data.jsonl line of {sample_id}")


def run(
    *records: Record, tokenizer: Any = TOKENIZER, **options: Any
) -> tuple[list[TokenSequence], SequenceCounts]:
    """Return the sequences of the records, whose border is checked, and their tally."""
    counts = SequenceCounts()
    config = SequenceConfig(**options)
    border = None
    if tokenizer is not None:
        accept = config.accept_rendering
        border = BorderCheck(tokenizer, targets=config.targets, accept=accept)
    found = iter_sequences(
        records, tokenizer, config, vocab_size=VOCAB_SIZE, counts=counts, border=border
    )
    return list(found), counts


def one(fields: Record, **options: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the only sequence, and those of them that are targets."""
    [sequence], _ = run(fields, **options)
    return sequence.input_ids.tolist(), sequence.input_ids[sequence.is_target].tolist()


def chat_targets(tokenizer: Any, messages: Any = CHAT, **options: Any) -> str:
    """Return the text of the targets of a conversation."""
    _, targets = one(record(messages=messages), tokenizer=tokenizer, **options)
    return tokenizer.decode(targets)
