"""ROUGE between texts, by rouge-score, which is imported here alone."""

import logging
from typing import Any

from decant.student_train.config.evaluation import ROUGE


class Rouge:
    """F-measures with stemming of ROUGE-1, -2 and -L."""

    def __init__(self, what: str) -> None:
        """Raises ImportError, naming what needs it, if rouge-score is not installed."""
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError(f"{what} needs rouge-score: pip install 'decant[rouge]'") from error
        logging.getLogger("absl").setLevel(logging.WARNING)  # it says which tokenizer it takes
        self._scorer: Any = RougeScorer(list(ROUGE), use_stemmer=True)

    def __call__(self, reference: str, text: str) -> dict[str, float]:
        """By name, in [0, 1]."""
        scores = self._scorer.score(reference, text)
        return {name: float(scores[name].fmeasure) for name in ROUGE}
