"""What the students of `loss_order.py` are measured by: a teacher's word on whole files.

Every file of a split gives its first windows of text, on which the teacher's distributions are
kept whole, and prompts that teacher and student continue. Figures are kept per file, as sums, so
that intervals can be had by drawing files again.

Shape letters: N targets, V vocabulary, W windows, L tokens of a window, B answers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

LENGTH = 256
PROMPT, ANSWER = 48, 32
"""Tokens of a prompt, and of the answer to it."""
SAMPLES = 1
"""Sampled answers to a prompt."""
NUM_BINS = 15
CHUNK = 2048
FIGURES = ("ce", "kl_forward", "kl_reverse", "acceptance", "agreement")
"""Sums over a file's targets; the first three in nats."""


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Windows of some files, and what the teacher says of them."""

    windows: Tensor
    """[W, L] token ids, -1 after the end of a file."""
    file_of_window: Tensor
    log_p: Tensor
    """[N, V] of every token of the windows but the first, row by row."""
    prompts: Tensor
    file_of_prompt: Tensor
    greedy: Tensor
    """[B, ANSWER] the teacher's greedy answers, one per prompt."""
    samples: Tensor
    """The teacher's sampled answers, SAMPLES per prompt, all prompts one after the other."""

    @property
    def num_files(self) -> int:
        """Files with a target."""
        return int(self.file_of_window.max()) + 1


def of_texts(texts: Iterable[str], teacher: str, num_windows: int) -> Heldout:
    """Tokenise the first windows of every text and ask the teacher."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows, owners = [], []
    for number, text in enumerate(texts):
        ids = [start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        parts = [ids[i : i + LENGTH] for i in range(0, min(len(ids), num_windows * LENGTH), LENGTH)]
        for part in parts:
            if len(part) > 1:
                windows.append(part + [-1] * (LENGTH - len(part)))
                owners.append(number)
    windows_WL, file_of_window = torch.tensor(windows), torch.tensor(owners)
    long = windows_WL[:, PROMPT - 1] >= 0
    prompts = windows_WL[long, :PROMPT]
    return Heldout(
        windows=windows_WL,
        file_of_window=file_of_window,
        log_p=torch.cat([log_probs(model, some) for some in windows_WL.split(16)]),
        prompts=prompts,
        file_of_prompt=file_of_window[long],
        greedy=answers(model, prompts, sample=False),
        samples=answers(model, prompts, sample=True),
    )


@torch.no_grad()
def log_probs(model: PreTrainedModel, windows_WL: Tensor) -> Tensor:
    """[N, V] log probs of every token but the first of each row."""
    real = windows_WL >= 0
    logits = model(input_ids=windows_WL.clamp(min=0), attention_mask=real.long()).logits[:, :-1]
    return logits[real[:, 1:]].float().log_softmax(1)


@torch.no_grad()
def answers(model: PreTrainedModel, prompts: Tensor, sample: bool) -> Tensor:
    """[B, ANSWER] continuations: the greedy one, or SAMPLES at temperature 1; nothing ends them."""
    torch.manual_seed(0)
    repeated = prompts.repeat(SAMPLES, 1) if sample else prompts
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    found = model.generate(
        repeated,
        attention_mask=torch.ones_like(repeated),
        min_new_tokens=ANSWER,
        max_new_tokens=ANSWER,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return found[:, prompts.shape[1] :]


@torch.no_grad()
def measure(student: PreTrainedModel, heldout: Heldout) -> dict[str, Any]:
    """Sums per file of a student's figures; see FIGURES, and `generated`."""
    sums = np.zeros((len(FIGURES), heldout.num_files))
    bins = np.zeros((heldout.num_files, NUM_BINS))  # Σ (right - confidence)
    counts, row = np.zeros(heldout.num_files), 0
    for windows_WL, owner in zip(
        heldout.windows.split(8), heldout.file_of_window.split(8), strict=True
    ):
        labels_N = windows_WL[:, 1:][windows_WL[:, 1:] >= 0]
        of_target = owner[:, None].expand(-1, LENGTH - 1)[windows_WL[:, 1:] >= 0].numpy()
        log_q_NV = log_probs(student, windows_WL)
        log_p_NV = heldout.log_p[row : row + len(labels_N)]
        row += len(labels_N)
        values = target_figures(log_p_NV, log_q_NV, labels_N)
        for number, name in enumerate(FIGURES):
            np.add.at(sums[number], of_target, values[name].double().numpy())
        bin_of = (values["confidence"] * NUM_BINS).long().clamp(max=NUM_BINS - 1).numpy()
        gap = values["right"].double().numpy() - values["confidence"].double().numpy()
        np.add.at(bins, (of_target, bin_of), gap)
        np.add.at(counts, of_target, 1)
    return {
        "targets": counts.astype(int).tolist(),
        **{name: sums[number].round(3).tolist() for number, name in enumerate(FIGURES)},
        "bins": bins.round(3).tolist(),
    }


def target_figures(log_p_NV: Tensor, log_q_NV: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """[N] figures of targets of which both distributions are known whole."""
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    gap_NV = log_p_NV - log_q_NV
    confidence_N, chosen_N = q_NV.max(1)
    return {
        "ce": -log_q_NV.gather(1, labels_N[:, None])[:, 0],
        "kl_forward": (p_NV * gap_NV).sum(1),
        "kl_reverse": -(q_NV * gap_NV).sum(1),
        "acceptance": torch.minimum(p_NV, q_NV).sum(1),
        "agreement": (chosen_N == log_p_NV.argmax(1)).float(),
        "confidence": confidence_N,
        "right": (chosen_N == labels_N).float(),
    }


def generated(student: PreTrainedModel, teacher: PreTrainedModel, heldout: Heldout) -> dict:
    """Sums per file over answers: how like the teacher's they are, and how likely to either.

    rouge_l     F of the longest common subsequence with the teacher's greedy answer, tokens
    distinct_2  of the sampled answers of a file: different pairs of tokens over all pairs
    likelihood_risk, coverage_risk   nats per token: the teacher's of what the student samples, and
                                     the student's of what the teacher samples
    """
    greedy = answers(student, heldout.prompts, sample=False)
    samples = answers(student, heldout.prompts, sample=True)
    of_prompt = heldout.file_of_prompt.numpy()
    of_sample = np.tile(of_prompt, SAMPLES)
    found = {name: np.zeros(heldout.num_files) for name in ("prompts", "rouge_l", "distinct_2")}
    for owner, ours, theirs in zip(
        of_prompt, greedy.tolist(), heldout.greedy.tolist(), strict=True
    ):
        found["prompts"][owner] += 1
        found["rouge_l"][owner] += common(ours, theirs) / ANSWER
    for owner in np.unique(of_prompt):
        pairs = [
            pair
            for answer in samples[torch.from_numpy(of_sample == owner)].tolist()
            for pair in pairwise(answer)
        ]
        found["distinct_2"][owner] = len(set(pairs)) / len(pairs) * found["prompts"][owner]
    repeated = heldout.prompts.repeat(SAMPLES, 1)
    for name, judge, said in (
        ("likelihood_risk", teacher, samples),
        ("coverage_risk", student, heldout.samples),
    ):
        nats = answer_nats(judge, repeated, said).numpy()
        found[name] = np.zeros(heldout.num_files)
        np.add.at(found[name], of_sample, nats / SAMPLES)
    return {name: values.round(4).tolist() for name, values in found.items()}


@torch.no_grad()
def answer_nats(model: PreTrainedModel, prompts: Tensor, said: Tensor) -> Tensor:
    """[B] -log prob per token of answers after their prompts."""
    means = []
    for some, answer in zip(prompts.split(32), said.split(32), strict=True):
        logits = model(input_ids=torch.cat([some, answer], 1)).logits[:, some.shape[1] - 1 : -1]
        log_q = logits.float().log_softmax(2)
        means.append(-log_q.gather(2, answer[:, :, None])[:, :, 0].mean(1).double())
    return torch.cat(means)


def common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for token in ours:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            above = row[place]
            row[place] = diagonal + 1 if token == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def kept(path: Path, texts: Iterable[str], teacher: str, num_windows: int) -> Heldout:
    """The same from a file, made where it is missing."""
    if not path.exists():
        found = of_texts(texts, teacher, num_windows)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save({name: getattr(found, name) for name in Heldout.__annotations__}, part)
        part.rename(path)
    return Heldout(**torch.load(path, mmap=True))
