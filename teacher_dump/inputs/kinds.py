"""The kinds of record that people have, each brought to one of four forms.

Owns which fields make which kind, and what a kind means: the forms are `text`, `messages`,
`prompt` + `response`, and `input_ids`. Knows nothing of tokenizers, templates or masks.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decant.teacher_dump.inputs.records import Record, SourceError

Fields = dict[str, Any]

TARGET_MASKS = (
    *("loss_mask", "completion_mask", "assistant_masks", "assistant_mask"),
    *("response_mask", "is_target"),
)
"""One 0 or 1 for each of the input_ids: which of them are targets."""

ANSWERS = ("response", "completion", "output")
"""Fields that hold the answer of a kind."""
WRITTEN_BY_A_MODEL = (
    *("generated", "generated_text", "generated_response", "generation", "generations"),
    *("prediction", "predictions", "predicted", "predicted_text", "hypothesis"),
    *("model_output", "model_response", "model_answer"),
)
"""Fields in which files of evaluations keep what a model wrote, beside the reference."""

ROLES = {
    **{role: "user" for role in ("human", "user")},
    **{role: "assistant" for role in ("gpt", "assistant", "chatgpt", "model", "bot")},
    **{role: "system" for role in ("system",)},
    **{role: "tool" for role in ("tool", "observation", "function_response")},
}
"""Who speaks in a ShareGPT conversation -> the role in a chat template."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


TEXT, MESSAGES, ANSWERED, READY = "text", "messages", "prompt + response", "input_ids"
"""The forms."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of record."""

    name: str
    fields: tuple[str, ...]
    """All of them make it."""
    also: tuple[str, ...]
    """What is read besides, where it is there."""
    form: Callable[[Record], tuple[str, Fields]]
    """Its form, and the fields that this has in place of the kind's own."""


@dataclass(frozen=True, slots=True)
class Formed:
    """A record in its form."""

    kind: str
    """As the user knows it."""
    form: str
    record: Record


def formed(record: Record) -> Formed:
    """Find the kind of a record and bring it to its form; what is of no kind stays beside it.

    A field that is null is absent. A record that has nothing but nulls where a kind has its fields
    is an empty one of that kind. Raises SourceError if the record is of no kind, or of several.
    """
    present = {name for name, value in record.fields.items() if value is not None}
    kinds = [kind for kind in KINDS if present.issuperset(kind.fields)]
    if not kinds:
        given = present.intersection(NAMES)
        kinds = [kind for kind in KINDS if given <= set(kind.fields) <= record.fields.keys()][:1]
    if len(kinds) != 1:
        found = f"both {' and '.join(k.name for k in kinds)}" if kinds else "no kind of sample"
        choice = ""
        if kinds:
            choice = f", such as {{{kinds[0].fields[-1]}: ''}} to leave that out"
        raise SourceError(
            f"{record.where}: the record is {found}, its fields are {sorted(present)}: expected"
            f" exactly one of {ACCEPTED}; rename or drop fields, in the source or by source.fields"
            f"{choice}"
        )
    (kind,) = kinds
    form, fields = kind.form(record)
    own = (*kind.fields, *kind.also)
    if form != READY:
        _refuse_two_answers(record, kind, form)
    others = {name: value for name, value in record.fields.items() if name not in own}
    masks = [name for name in TARGET_MASKS if name in present]
    if masks and form != READY:
        raise SourceError(
            f"{record.where}: {masks[0]} belongs to input_ids and has no effect on {kind.name}:"
            " drop it, or give input_ids"
        )
    return Formed(kind.name, form, dataclasses.replace(record, fields={**others, **fields}))


def _refuse_two_answers(record: Record, kind: Kind, form: str) -> None:
    """Raise SourceError if another field may be meant by what is to be scored as well."""
    scored = kind.fields[-1]
    answers = () if form == TEXT else ANSWERS
    for name in (*answers, *WRITTEN_BY_A_MODEL):
        value = record.fields.get(name)
        is_said = isinstance(value, str | list) and len(value) > 0
        if name in kind.fields or not is_said or value == record.fields[scored]:
            continue
        # An answer stands in another's place; no answer is a text, or messages, by itself.
        theirs = f"{{{scored}: {name}}} scores {name}, " if scored in ANSWERS else ""
        raise SourceError(
            f"{record.where}: {name} stands beside {scored}, and either may be what is to be"
            f" scored: source.fields {theirs}{{{name}: ''}} scores {scored}"
        )


def is_empty(formed: Formed) -> bool:
    """Whether a record has no content at all, which could not even be encoded."""
    fields = formed.record.fields
    if formed.form == ANSWERED:
        return fields["prompt"] is None or fields["response"] is None
    content = fields[formed.form]
    return content is None or (hasattr(content, "__len__") and len(content) == 0)


def as_question(record: Record) -> Record:
    """The record with nothing but what is to be answered: `prompt`, a text, or `messages`.

    An answer beside a prompt is left out; messages stay whole. Raises SourceError if the record
    holds nothing to answer, or two things.
    """
    present = {name for name, value in record.fields.items() if value is not None}
    found = [name for name in QUESTIONS if name in present]
    if len(found) != 1:
        raise SourceError(
            f"{record.where}: the record has {' and '.join(found) or 'nothing'} to answer, its "
            f"fields are {sorted(present)}: expected either prompt or messages"
        )
    return dataclasses.replace(record, fields=QUESTIONS[found[0]](record))


def as_conversation(record: Record) -> Record:
    """The question as messages: of a text, the one that a user says. Raises SourceError."""
    if "messages" in record.fields:
        return record
    prompt = record.fields["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise SourceError(
            f"{record.where}: sample {record.sample_id!r} has an empty prompt, or none of text: "
            "remove the record"
        )
    return dataclasses.replace(record, fields={"messages": [{"role": "user", "content": prompt}]})


def messages_of(record: Record, name: str) -> Any:
    """The messages in a field: a list, its JSON, or a table of columns, as some writers store it.

    Anything else is returned as it is, for whoever reads messages to name.
    """
    value = record.fields.get(name)
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except ValueError:
            return value
        return decoded if isinstance(decoded, list) else value
    if isinstance(value, dict) and value:
        columns = list(value.values())
        if all(isinstance(column, list) for column in columns):
            lengths = {len(column) for column in columns}
            if len(lengths) == 1:
                return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _text(record: Record) -> tuple[str, Fields]:
    return TEXT, {"text": record.fields["text"]}


def _messages(record: Record) -> tuple[str, Fields]:
    return MESSAGES, {"messages": messages_of(record, "messages"), **_with_chat(record)}


def _answered(answer: str) -> Callable[[Record], tuple[str, Fields]]:
    """`prompt` and an answer under this name: two texts, or two lists of messages."""

    def form(record: Record) -> tuple[str, Fields]:
        prompt, response = record.fields["prompt"], record.fields[answer]
        if _is_said(prompt) != _is_said(response) and None not in (prompt, response):
            raise SourceError(
                f"{record.where}: prompt is {prompt!r:.60}, {answer} is {response!r:.60}:"
                " expected a string each, or a list of messages each"
            )
        if not _is_said(prompt) or not _is_said(response):
            return ANSWERED, {"prompt": prompt, "response": response}
        messages = [*map(_as_context, prompt), *response]
        return MESSAGES, {"messages": messages, **_with_chat(record)}

    return form


def _is_said(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message for message in value
    )


def _as_context(message: Fields) -> Fields:
    """The message of a prompt: what the assistant says in it is not a target."""
    if message["role"] != "assistant":
        return message
    kept = {name: v for name, v in message.items() if name not in ("loss", "train", "training")}
    return {**kept, "weight": 0}


def _share_gpt(record: Record) -> tuple[str, Fields]:
    """`conversations` of {"from", "value"}, or messages under another name."""
    said = messages_of(record, "conversations")
    if said is None:
        return MESSAGES, {"messages": None}
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise SourceError(
            f"{record.where}: conversations is {said!r:.60}: expected a list of objects with from"
            " and value"
        )
    messages = said
    if any(turn.get("from") is not None for turn in said):
        messages = [_turn(record, index, turn) for index, turn in enumerate(said)]
    system = record.fields.get("system")
    if system:
        if not isinstance(system, str) or any(turn.get("role") == "system" for turn in messages):
            raise SourceError(
                f"{record.where}: system is {system!r:.60} beside conversations: expected one"
                " string, or a system turn among the conversations; drop one of the two"
            )
        messages = [{"role": "system", "content": system}, *messages]
    return MESSAGES, {"messages": messages, **_with_chat(record)}


def _turn(record: Record, index: int, turn: Fields) -> Fields:
    speaker = turn.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise SourceError(
            f"{record.where}: turn {index + 1} of conversations is from {speaker!r:.40}: expected"
            f" one of {', '.join(ROLES)}; give messages for anything else"
        )
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**others, "role": role, "content": turn.get("value")}


def _alpaca(record: Record) -> tuple[str, Fields]:
    instruction, response = record.fields["instruction"], record.fields["output"]
    prompt = None if instruction is None else _alpaca_prompt(record)
    return ANSWERED, {"prompt": prompt, "response": response}


def _alpaca_prompt(record: Record) -> str:
    instruction, given = record.fields["instruction"], record.fields.get("input") or ""
    for name, value in (("instruction", instruction), ("input", given)):
        if not isinstance(value, str):
            raise SourceError(f"{record.where}: {name} is {value!r:.60}: expected a string")
    for name in ("system", "history"):
        if record.fields.get(name):
            raise SourceError(
                f"{record.where}: instruction + output come with {name}, for which the prompt that"
                f" is made of them has no place: give messages, or leave it out by source.fields:"
                f" {{{name}: ''}}"
            )
    if given:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=given)
    return ALPACA.format(instruction=instruction)


def _ids(record: Record) -> tuple[str, Fields]:
    return READY, {"input_ids": record.fields["input_ids"]}


def _with_chat(record: Record) -> Fields:
    return {name: record.fields[name] for name in CHAT if record.fields.get(name) is not None}


def _asked(record: Record) -> Fields:
    prompt = record.fields["prompt"]
    if isinstance(prompt, list) and _is_said(prompt):
        return {"messages": prompt, **_with_chat(record)}
    return {"prompt": prompt}


CHAT = ("tools", "chat_template_kwargs")
KINDS = (
    Kind("text", ("text",), (), _text),
    Kind("messages", ("messages",), CHAT, _messages),
    Kind("prompt + response", ("prompt", "response"), CHAT, _answered("response")),
    Kind("prompt + completion", ("prompt", "completion"), CHAT, _answered("completion")),
    Kind("conversations", ("conversations",), ("system", *CHAT), _share_gpt),
    Kind("instruction + output", ("instruction", "output"), ("input",), _alpaca),
    Kind("input_ids", ("input_ids",), (), _ids),
)
ACCEPTED = (
    "text; messages (+ tools); prompt + response; prompt + completion; conversations;"
    " instruction (+ input) + output; input_ids (+ loss_mask, labels, attention_mask)"
)
NAMES = frozenset(name for kind in KINDS for name in kind.fields)
"""Fields that make a kind."""
FIELDS = NAMES.union(
    *(kind.also for kind in KINDS),
    TARGET_MASKS,
    ("labels", "attention_mask", "history"),
    WRITTEN_BY_A_MODEL,
)
"""Every field that is read, and so may be named in `source.fields`."""
QUESTIONS: dict[str, Callable[[Record], Fields]] = {
    "prompt": _asked,
    "messages": lambda record: _messages(record)[1],
    "conversations": lambda record: _share_gpt(record)[1],
    "instruction": lambda record: {"prompt": _alpaca_prompt(record)},
}
