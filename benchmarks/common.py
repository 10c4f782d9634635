"""What the benchmarks share: results as CSV, memory of this process, generated caches, models."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from decant.schemas import Manifest, TeacherInfo, TokenizerInfo, Truncation

RESULTS = Path(__file__).parent / "results"


def save(name: str, header: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file into benchmarks/results, numbers with six digits."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])


def peak_mb() -> float:
    """The most resident memory that this process has held, in MiB."""
    return status_mb("VmHWM")


def status_mb(field: str) -> float:
    """A figure of this process's memory in MiB, as Linux names it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def draft(
    vocab_size: int,
    truncation: Truncation,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    precision: str = "compact",
) -> Manifest:
    """The start of a cache of generated sequences."""
    return Manifest.draft(
        teacher=TeacherInfo(
            name="generated",
            fingerprint="",
            architecture="",
            engine="",
            dtype="",
            vocab_size=vocab_size,
        ),
        tokenizer=TokenizerInfo(fingerprint="", files={}),
        shared_vocab_size=vocab_size,
        truncation=truncation,
        temperatures=temperatures,
        precision=precision,
        source={},
        sequences={},
    )


def save_model(config: Any, folder: Path, dtype: str = "float32", device: str = "cpu") -> Path:
    """Save a random causal LM of a configuration, always the same; return the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
