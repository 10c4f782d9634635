"""Claims about a teacher that disagrees with itself, and so sets its own tolerance."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from decant.teacher_dump import DumpConfig, TeacherConfig, dump
from decant.teacher_dump.audit.run import audit
from tests.support import models


class CrowdedConfig(LlamaConfig):
    """A Llama that minds company."""

    model_type = "crowded"


class CrowdedModel(LlamaForCausalLM):
    """Says something else where more than two sequences share a batch."""

    config_class = CrowdedConfig

    def __init__(self, config: Any) -> None:
        """Stretch the last states by a tenth for each row beyond two."""
        super().__init__(config)
        self.model.norm.register_forward_hook(
            lambda module, given, out: out * (1 + 0.1 * max(0, len(out) - 2))
        )


AutoConfig.register("crowded", CrowdedConfig)
AutoModelForCausalLM.register(CrowdedConfig, CrowdedModel)


def test_a_teacher_that_disagrees_with_itself_excuses_nothing(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    """Its scores follow the batch: that is a finding, and so is the cache of such scores.

    The finding names the quantity and its size; the tolerance stays that of float32.
    """
    torch.manual_seed(0)
    CrowdedModel(CrowdedConfig(**models.DECODER)).save_pretrained(tmp_path / "crowded")
    models.build_tokenizer().save_pretrained(tmp_path / "crowded")
    teacher = dataclasses.replace(dump_config.teacher, path=str(tmp_path / "crowded"))
    dump(dataclasses.replace(dump_config, teacher=teacher, output=str(tmp_path / "cache")))
    config = TeacherConfig(path=str(tmp_path / "crowded"), max_batch_tokens=256)
    report = audit(str(tmp_path / "cache"), config, sample=24)
    kinds = {finding.kind for finding in report.findings}
    assert "control" in kinds and len(kinds) > 1
    (text,) = [f.text for f in report.findings if f.kind == "control"]
    assert text.startswith("the teacher disagrees with itself") and "float32" in text
    (logprob,) = [q for q in report.quantities if q.name == "logprob"]
    assert logprob.control_p99 > 0.2 and logprob.tolerance <= 0.05
