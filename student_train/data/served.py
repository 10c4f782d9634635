"""Which losses a cache can serve, asked before anything is trained."""

import logging

from decant.schemas import Manifest, Truncation
from decant.storage import CacheReader
from decant.storage.cache.lineage import SAMPLER
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.schedule import Schedule, values_of
from decant.student_train.losses.kinds import RANKINGS, SAMPLED

log = logging.getLogger(__name__)

OF_SEVERAL_IDS = (*RANKINGS, "tail_kl")
"""Kinds that compare kept ids with each other."""


def refuse_unserved(loss: LossConfig, reader: CacheReader, *, aligned: bool = False) -> None:
    """Raise ValueError, naming cache and kind, if its targets do not have what the loss looks at.

    `aligned` says that the student has another tokenizer. What is only unwise is logged.
    """
    manifest, url = reader.manifest, reader.url
    if loss.gap is not None and aligned:
        raise ValueError(
            f"loss.gap compares the probabilities of whole samples, and {url} is of another "
            "tokenizer than the student's: leave it out there"
        )
    if loss.kind in SAMPLED:
        _refuse_unsampled(loss, manifest, url, aligned=aligned)
    else:
        refuse_unkept(loss, manifest.truncation, url)


def refuse_unkept(loss: LossConfig, truncation: Truncation, url: str) -> None:
    """Raise ValueError, naming cache and kind, if so truncated targets lack what a kind looks at.

    Not for kinds that look at the sampled token alone, which every cache has.
    """
    rule, text = truncation.rule, truncation.text()
    if rule.has_draws and (loss.kind != "fkl" or loss.tail != "bucket"):
        raise ValueError(
            f"{url} holds {text}, and sampled targets serve kind fkl with tail bucket (and opd), "
            f"not {loss.kind} with tail {loss.tail}"
        )
    if rule.has_entries:
        return
    if loss.gap is not None:
        raise ValueError(
            f"loss.gap moves how p and q are mixed, and {url} holds {text}: leave it out, or dump "
            "with truncation.method topk"
        )
    if loss.kind in OF_SEVERAL_IDS:
        raise ValueError(
            f"loss.kind {loss.kind} compares several kept ids of a target, and {url} holds {text}: "
            "take another kind (fkl, rkl, opd, ...), or dump with truncation.method topk"
        )
    if loss.tail != "bucket":
        raise ValueError(
            f"loss.tail {loss.tail} stands for ids that were not kept, and {url} holds {text}: "
            "leave loss.tail bucket"
        )


def _refuse_unsampled(loss: LossConfig, manifest: Manifest, url: str, *, aligned: bool) -> None:
    clip = loss.of_kind.get("clip", 0.0)
    is_clipped = max(values_of(Schedule(**clip) if isinstance(clip, dict) else clip)) > 0
    if aligned:
        raise ValueError(
            f"loss.kind {loss.kind}: {url} is of another tokenizer than the student's, so its "
            "tokens are no samples of the student: sample with the student and dump with a teacher "
            "of its tokenizer, or take another kind"
        )
    if manifest.source.get("unknown_label") == "bound":
        raise ValueError(
            f"loss.kind {loss.kind}: where a label was not kept, {url} (an import with "
            "unknown_label bound) holds a bound of its log prob and not the log prob: rescore it "
            "with its teacher, or import with unknown_label skip"
        )
    if is_clipped and not manifest.sampler_logprobs:
        raise ValueError(
            f"loss.kind {loss.kind} with clip needs the log probs of the model that sampled the "
            f"tokens, and {url} keeps none: dump it with source.generate.by naming that model, or "
            "set loss.clip to 0"
        )
    sampler = manifest.source.get(SAMPLER)
    if not sampler:
        log.warning(
            "%s: its manifest names no sampler. opd follows the reverse KL on the student's own "
            "samples; on other texts it is something else",
            url,
        )
    elif (sampler["temperature"], sampler["top_p"]) != (1, 1):
        log.warning(
            "%s was sampled at temperature %g and top-p %g: opd is unbiased at 1 and 1 alone",
            url,
            sampler["temperature"],
            sampler["top_p"],
        )


def warn_of_prefixes(prefixes: str | None, reader: CacheReader) -> None:
    """Log where a cache's manifest says otherwise than the config whose prefixes it holds."""
    sampler = reader.manifest.source.get(SAMPLER)
    if prefixes == "teacher" and sampler:
        log.warning(
            "%s has prefixes: teacher, and was sampled by %s", reader.url, sampler.get("path")
        )
    if prefixes == "student" and not sampler:
        log.warning(
            "%s has prefixes: student, and its manifest names no sampler (source.generate.by)",
            reader.url,
        )
