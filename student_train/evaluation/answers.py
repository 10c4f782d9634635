"""ROUGE of what a student writes to prompts whose responses are known. No teacher is needed."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from decant.student_train.config.evaluation import ROUGE, GenerationConfig
from decant.student_train.evaluation.chat_prompts import ChatPrompts
from decant.student_train.evaluation.rouge import Rouge

GENERATIONS = "generations.jsonl"


class Generation:
    """The prompts and what scores the answers; checked before training."""

    def __init__(
        self,
        config: GenerationConfig,
        tokenizer: Any | None,
        *,
        add_bos: bool,
        seed: int,
        chat: ChatPrompts | None = None,
    ) -> None:
        """`add_bos` as the cache was dumped with: prompts begin as they did there.

        `chat` is how conversations are put to the student, if they can be.

        Raises ValueError for a file without prompts and responses, or a cache without a tokenizer,
        ImportError if rouge-score is not installed.
        """
        self._rouge = Rouge("eval.generation")
        if tokenizer is None:
            raise ValueError("eval.generation needs a cache with a tokenizer; this one has none")
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._head = _head(tokenizer, add_bos)
        self.records = _records(Path(config.path), config.num_samples)
        self._chat = chat
        ends = {tokenizer.eos_token_id}
        has_messages = not all(isinstance(record["prompt"], str) for record in self.records)
        if chat and (chat.wraps_texts or has_messages):
            ends |= {*chat.ends()}
        self._ends = sorted(token for token in ends if token is not None)
        self._asked = [self._ask(number) for number in range(len(self.records))]

    @torch.no_grad()
    def metrics(
        self, student: Any, accelerator: Accelerator, output: Path | None = None
    ) -> dict[str, float]:
        """Mean ROUGE F-measures over the prompts, in [0, 1], the same on every process.

        With `output`, the answers go into its generations.jsonl. Training's random state stays.
        """
        was_training = student.training
        student.eval()
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = list(range(rank, len(self.records), world))
        answers: list[dict[str, Any]] = []
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed + rank)
            for start in range(0, len(mine), self.config.batch_size):
                answers += self._answer(student, mine[start : start + self.config.batch_size])
        student.train(was_training)
        everything = sorted(gather_object(answers), key=lambda answer: answer["index"])
        if output is not None and accelerator.is_main_process:
            lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in everything]
            (output / GENERATIONS).write_text("".join(lines))
        names = (*ROUGE, "generated_tokens")
        return {name: sum(a[name] for a in everything) / len(everything) for name in names}

    def _ask(self, number: int) -> tuple[list[int], Any]:
        """The ids of a prompt, and what is asked by them: a text, or messages."""
        record = self.records[number]
        asked = record["prompt"]
        if isinstance(asked, str) and not (self._chat and self._chat.wraps_texts):
            return [*self._head, *self.tokenizer(asked, add_special_tokens=False).input_ids], asked
        where = f"{self.config.path} record {number} (from 0)"
        if self._chat is None:
            raise ValueError(
                f"{where} holds messages, for which there is no chat template: name one in "
                "eval.generation.chat_template (prompts: auto or chat), or give prompts of text"
            )
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        try:
            return self._chat.ids(messages, record), messages
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _answer(self, student: Any, picks: list[int]) -> list[dict[str, Any]]:
        tokenizer, config = self.tokenizer, self.config
        prompts = [self._asked[i][0] for i in picks]
        longest, rows = max(map(len, prompts)), student.config.get_text_config().vocab_size
        paddings = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # may be beyond the rows
        pad = next(token for token in paddings if token is not None and token < rows)
        ids = torch.full((len(picks), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left, so that answers follow their prompts
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        given = student.generate(
            input_ids=ids.to(student.device),
            attention_mask=mask.to(student.device),
            max_new_tokens=config.max_new_tokens,
            do_sample=config.do_sample,
            pad_token_id=pad,
            eos_token_id=self._ends or None,
            **(drawn if config.do_sample else {}),
        )[:, longest:].cpu()
        answers = []
        for i, row in zip(picks, given, strict=True):
            tokens = row.tolist()
            end = next((at for at, token in enumerate(tokens) if token in self._ends), len(tokens))
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            reference, asked = self.records[i]["response"], self._asked[i][1]
            is_chat = not isinstance(asked, str)
            answers.append(
                {
                    "index": i,
                    **self.records[i],
                    "prompt": asked,
                    "response": _said(reference) if is_chat else reference,
                    "generated": _said(text) if is_chat else text,
                    "generated_tokens": end,
                    **self._rouge(reference, text),
                }
            )
        return answers


def _head(tokenizer: Any, add_bos: bool) -> list[int]:
    """What the dump put before a prompt: the tokenizer's own habit, then add_bos."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    starts = [i for i in range(len(framed)) if framed[i : i + len(bare)] == bare]
    head = list(framed[: starts[0]]) if starts else []
    if add_bos and tokenizer.bos_token_id not in head:
        head = [tokenizer.bos_token_id, *head]
    return head


def _said(text: str) -> list[dict[str, str]]:
    """What the assistant says, in the form of a record's answer to messages."""
    return [{"role": "assistant", "content": text}]


def _records(path: Path, limit: int) -> list[dict[str, Any]]:
    """`prompt`, a text or messages, and `response`, a text, of each; also tools and variables."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"eval.generation.path {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"eval.generation.path {path} is not UTF-8, give plain JSON lines: {error}"
        ) from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if limit and len(records) == limit:
            break
        if not line.strip():
            continue
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} line {number}: expected a JSON object with prompt and response, or "
                f"messages: {error!r}"
            ) from error
        prompt, response = records[-1]["prompt"], records[-1]["response"]
        if not (_is_asked(prompt) and isinstance(response, str) and response):
            raise ValueError(
                f"{path} line {number}: prompt and response must be texts, not empty; or the "
                "prompt messages, of which the last is not the assistant's"
            )
    if not records:
        raise ValueError(f"eval.generation.path {path} holds no record")
    return records


def _record(fields: dict[str, Any]) -> dict[str, Any]:
    """What is asked and expected: of `messages`, whatever comes before the last, an answer."""
    beside = {name: fields[name] for name in ("tools", "chat_template_kwargs") if fields.get(name)}
    if fields.get("messages") is not None and "prompt" not in fields:
        *asked, answer = fields["messages"]
        if answer["role"] != "assistant":
            raise ValueError("the messages end without the assistant's")
        return {"prompt": asked, "response": answer["content"], **beside}
    response = fields["response"]
    if isinstance(response, list) and len(response) == 1:
        response = response[0]["content"]
    return {"prompt": fields["prompt"], "response": response, **beside}


def _is_asked(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and "role" in message for message in prompt)
        and prompt[-1]["role"] != "assistant"
    )
