"""ROUGE of what a student writes to prompts whose responses are known. No teacher is needed.

rouge_score is imported here alone, and only when generation is asked for.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from decant.student_train.config.evaluation import ROUGE, GenerationConfig

GENERATIONS = "generations.jsonl"


class Generation:
    """The prompts and what scores the answers; checked before training."""

    def __init__(
        self, config: GenerationConfig, tokenizer: Any | None, *, add_bos: bool, seed: int
    ) -> None:
        """`add_bos` as the cache was dumped with: prompts begin as they did there.

        Raises ValueError for a file without prompts and responses, or a cache without a tokenizer,
        ImportError if rouge-score is not installed.
        """
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError(
                "eval.generation needs rouge-score: pip install 'decant[rouge]'"
            ) from error
        logging.getLogger("absl").setLevel(logging.WARNING)  # it says which tokenizer it takes
        if tokenizer is None:
            raise ValueError("eval.generation needs a cache with a tokenizer; this one has none")
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._scorer = RougeScorer(list(ROUGE), use_stemmer=True)
        self._head = _head(tokenizer, add_bos)
        self.records = _records(Path(config.path), config.num_samples)

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

    def _answer(self, student: Any, picks: list[int]) -> list[dict[str, Any]]:
        tokenizer, config = self.tokenizer, self.config
        prompts = [
            self._head + tokenizer(self.records[i]["prompt"], add_special_tokens=False).input_ids
            for i in picks
        ]
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
            eos_token_id=tokenizer.eos_token_id,
            **(drawn if config.do_sample else {}),
        )[:, longest:].cpu()
        answers = []
        for i, row in zip(picks, given, strict=True):
            tokens = row.tolist()
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            scores = self._scorer.score(self.records[i]["response"], text)
            answers.append(
                {
                    "index": i,
                    **self.records[i],
                    "generated": text,
                    "generated_tokens": len(tokens),
                    **{name: scores[name].fmeasure for name in ROUGE},
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


def _records(path: Path, limit: int) -> list[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"eval.generation.path {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"eval.generation.path {path} is not UTF-8, give plain JSON lines: {error}"
        ) from error
    records: list[dict[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if limit and len(records) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append({name: record[name] for name in ("prompt", "response")})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} line {number}: expected a JSON object with prompt and response: {error!r}"
            ) from error
        if not all(isinstance(text, str) and text for text in records[-1].values()):
            raise ValueError(f"{path} line {number}: prompt and response must be texts, not empty")
    if not records:
        raise ValueError(f"eval.generation.path {path} holds no record")
    return records
