"""One process of several: trains with `DistillationTrainer`, and with a program of examples/loops.

Started by torchrun with a folder that has `cache` and `student`, and a second port; leaves `ddp`
and `ddp-plain`.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from decant.student_train.trainers import CacheDataset, DistillationTrainer
from tests.support import ROOT
from tests.support.trainings import LOSS, trainer_arguments

torch.set_num_threads(1)


def main() -> None:
    """Train twice."""
    folder = Path(sys.argv[1])
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        trainer_arguments(
            folder / "ddp", per_device_train_batch_size=2, ddp_backend="gloo", eval_strategy="epoch"
        ),
        train_dataset=CacheDataset(folder / "cache"),
        eval_dataset=CacheDataset(folder / "cache", part="heldout", heldout_fraction=0.3),
        loss=LOSS,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    assert trainer.accelerator.num_processes == 2
    torch.distributed.destroy_process_group()
    os.environ |= {"MASTER_PORT": sys.argv[2], "TORCHELASTIC_USE_AGENT_STORE": "False"}
    sys.argv[1:] = [str(folder / name) for name in ("cache", "student", "ddp-plain")]
    runpy.run_path(str(ROOT / "examples/loops/plain_pytorch.py"), run_name="__main__")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
