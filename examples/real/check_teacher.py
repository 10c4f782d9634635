"""Check that a converted model is the model: what a wrong conversion would break, each by its name.

A tokenizer that lost a rule still gives back every text, and a model still writes English with it.
What gives it away: the model's own answers are tokenised otherwise than the model wrote them.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

PROBES = (
    "Hello there, what is two plus two?",
    " a space before,  two within, one after ",
    "one line\nanother\n\n\tand one behind a tab\n",
    "1234 and 3.14159;\n\n1. first\n\n2. second:  10",
    "naïve café, Ærø, Straße, Ελλάδα, Москва",
    "漢字かな混じり文 한국어 العربية हिन्दी",
    "smile 😀 family 👩\u200d👩\u200d👧 flag 🇫🇷",
    "def f(x):\n    return x**2  # don't\n",
    "a no-break\u00a0space and a soft\u00adhyphen",
)
CONVERSATION = [{"role": "user", "content": "What is the capital of France?"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LIST_PROMPT = "Give me three tips for sleeping better."
ENGLISH = (
    "The village lies at the foot of a long hill, and a narrow road leads from the station to the "
    "church. On market days the farmers bring apples, cheese and bread, and the children run "
    "between the stalls until it is time to go home. In winter the road is often closed by snow, "
    "so that letters arrive late and the baker has to walk to the next town for flour. Nobody "
    "complains very much. People sit by the fire, tell old stories, and wait for the spring."
)
ENGLISH_NATS = (2.0, 4.0)
"""Where the cross-entropy per token of plain English lies for a model of this size."""


class WrongConversion(Exception):
    """The folder does not hold the model it should."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What the checks measured."""

    greedy: str
    english_nats: float
    shuffled_nats: float


def check(folder: Path) -> Findings:
    """Raise WrongConversion for the first thing that is not as it should be."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text in PROBES:
        _expect(f"decode(encode({text!r}))", tokenizer.decode(tokenizer(text)["input_ids"]), text)
    _expect("rows of the model", model.config.vocab_size, len(tokenizer))
    rendered = tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, tokenize=False
    )
    _expect("the chat template's prompt", rendered, RENDERED)
    greedy = tokenizer.decode(_answer(model, tokenizer, CONVERSATION[0]["content"]))
    if "Paris" not in greedy or not greedy.endswith(tokenizer.eos_token):
        raise WrongConversion(f"the greedy answer about France's capital is {greedy!r}")
    written = _answer(model, tokenizer, LIST_PROMPT)
    again = tokenizer(tokenizer.decode(written))["input_ids"]
    _expect("the tokens of the model's own list", again, written)
    english = _nats(model, tokenizer, ENGLISH)
    if not ENGLISH_NATS[0] < english < ENGLISH_NATS[1]:
        raise WrongConversion(f"English costs {english:.2f} nats per token, not {ENGLISH_NATS}")
    words = ENGLISH.split()
    random.Random(0).shuffle(words)
    return Findings(greedy, english, _nats(model, tokenizer, " ".join(words)))


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise WrongConversion(f"{what}: found {found!r}, expected {expected!r}")


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, question: str) -> list[int]:
    """The greedy answer's tokens, 96 at most."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0]
    return out[prompt["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def _nats(model: Any, tokenizer: Any, text: str) -> float:
    """Cross-entropy per token."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return float(model(input_ids=ids, labels=ids).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the converted model")
    args = parser.parse_args()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        findings = check(args.folder)
    except WrongConversion as error:
        sys.exit(f"error: {args.folder}: {error}")
    print(f"{args.folder}: texts come back, the template and the model's own tokens agree")
    print(f"  greedy answer   {findings.greedy}")
    print(f"  English         {findings.english_nats:.2f} nats per token")
    print(f"  words shuffled  {findings.shuffled_nats:.2f} nats per token")


if __name__ == "__main__":
    main()
