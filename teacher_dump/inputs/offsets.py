"""Which tokens of a text stand in given stretches of its characters.

Owns the character offsets of tokens and the rule for a token that straddles a border. Knows
nothing of conversations, prompts or responses.
"""

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from decant.teacher_dump.inputs.records import Ids, Mask

Span = tuple[int, int]
"""Characters start to end (exclusive) of a text."""

Offsets = npt.NDArray[np.int64]
"""[L, 2]: for each token, the characters from its start to its end (exclusive)."""


def tokens_in_spans(offsets: Offsets, spans: Iterable[Span]) -> Mask:
    """Which of the tokens hold at least one character of a span: bool [L].

    A token that straddles a border counts, at either end. A span is what is to be learned, so no
    character of it may lie in tokens that are no targets: of the prompt "Answer: " with the
    response "yes" the only token of the response may be " yes", and the full stop of an answer may
    share its token with the line feed after it. What that adds is at most the rest of one token of
    the text at each border, as the teacher reads it. A token without characters (a space that the
    tokenizer puts before a word) counts where it stands before a character of the span.
    """
    starts, ends = offsets.reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        if start == end:
            continue
        mask |= (starts < end) & ((ends > start) | ((starts == ends) & (starts == start)))
    return mask


class OffsetTokenizer:
    """Texts to token ids and character offsets, without special tokens of the tokenizer's own.

    Every character that a token holds is inside its offsets, and no other. The post-processor of
    many tokenizers (Llama 3) trims spaces from the offsets; without special tokens to add it does
    nothing else, so it is left out. An added token that swallows the spaces beside it (Phi-3) has
    the offsets of its own text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError for a tokenizer that gives no offsets."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "the tokenizer gives no character offsets, which targets: response needs: use its"
                " fast version, give input_ids with a loss_mask, or set targets: all"
            )
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.backend_tokenizer.post_processor = None
        self._swallowing = {
            token_id: token
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.lstrip or token.rstrip
        }

    def __call__(self, texts: list[str]) -> list[tuple[Ids, Offsets]]:
        """Ids [L] and offsets [L, 2] of each text."""
        if not texts:
            return []
        encoding = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        found = []
        for text, ids, pairs in zip(
            texts, encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            flat = np.fromiter(itertools.chain.from_iterable(pairs), dtype=np.int64)
            offsets = flat.reshape(-1, 2)
            if self._swallowing:
                self._shrink(text, ids, offsets)
            found.append((np.array(ids, dtype=np.int64), offsets))
        return found

    def _shrink(self, text: str, ids: list[int], offsets: Offsets) -> None:
        for position, token_id in enumerate(ids):
            if token := self._swallowing.get(token_id):
                start, end = offsets[position]
                inside = text.find(token.content, start, end)
                if inside >= 0:
                    offsets[position] = inside, inside + len(token.content)
