"""Peak memory that `train --dry-run` predicts, and what the training then uses.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --shape large-vocabulary

A cache of random distributions at k=64, with sequences of uneven length, then the dry run and the
whole training, saving and reading back included, each a process of its own. Both figures are of the
GPU where there is one, else the resident memory of the process.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from decant.schemas import Manifest, ScoredSequence, TeacherInfo, TokenizerInfo, Truncation
from decant.storage.cache.plan import plan_of
from decant.storage.cache.writer import write_cache

RESULTS = Path(__file__).parent / "results" / "memory.csv"
K = 64
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 1024}
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "small-vocabulary": (
        49_152,
        512,
        {
            "student": {
                "config": {
                    **LLAMA,
                    "hidden_size": 576,
                    "intermediate_size": 1536,
                    "num_hidden_layers": 10,
                    "num_attention_heads": 9,
                    "num_key_value_heads": 3,
                }
            },
            "batch_size": 4,
        },
    ),
    "large-vocabulary": (
        262_144,
        256,
        {
            "student": {
                "config": {
                    **LLAMA,
                    "hidden_size": 320,
                    "intermediate_size": 1024,
                    "num_hidden_layers": 6,
                    "num_attention_heads": 5,
                    "num_key_value_heads": 1,
                }
            },
            "batch_size": 2,
        },
    ),
    "packed-bf16": (
        49_152,
        512,
        {
            "student": {
                "config": {
                    **LLAMA,
                    "hidden_size": 384,
                    "intermediate_size": 1024,
                    "num_hidden_layers": 8,
                    "num_attention_heads": 6,
                    "num_key_value_heads": 2,
                }
            },
            "batch_size": 4,
            "gradient_accumulation": 2,
            "packing": "rows",
            "mixed_precision": "bf16",
        },
    ),
}
"""Vocabulary, longest sequence, and what the run sets."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=[*SHAPES])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    rows = []
    for name in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder), args.steps))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """What is predicted for a shape, and what it takes."""
    vocab_size, max_length, fields = SHAPES[name]
    num_sequences = steps * fields["batch_size"] * fields.get("gradient_accumulation", 1)
    make_cache(folder / "cache", vocab_size, max_length, num_sequences * 5 // 4)
    run = {
        "cache": str(folder / "cache"),
        "output": str(folder / "run"),
        "loss": {"ce_weight": 0.1},
        "steps": steps,
        "plots": False,
        "eval": {"heldout_fraction": 0.2, "batch_size": fields["batch_size"]},
        **fields,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(run))
    report, _ = command(folder, "--dry-run")
    predicted = float(re.findall(r"peak memory +([\d.]+) GB", report)[0])
    summary, resident = command(folder, "--json")
    training = json.loads(summary)["peak_memory_mb"] / 1e3
    on_gpu = "of the GPU" in report
    measured = training if on_gpu else max(training, resident)
    return {
        "shape": name,
        "vocab_size": vocab_size,
        "parameters": int(re.findall(r"([\d,]+) held", report)[0].replace(",", "")),
        "predicted_gb": predicted,
        "training_gb": round(training, 2),
        "measured_gb": round(measured, 2),
        "predicted_over_measured": round(predicted / measured, 3),
    }


def command(folder: Path, option: str) -> tuple[str, float]:
    """What a training prints, and the peak of its resident memory in GB."""
    program = (
        "import resource, sys\n"
        "from decant.student_train.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "scale = 1 if sys.platform == 'darwin' else 1024\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)\n"
        "sys.exit(code)\n"
    )
    arguments = ["--config", str(folder / "train.yaml"), option]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    text, _, peak = done.stdout.rpartition("peak ")
    return text, int(peak) / 1e9


def make_cache(path: Path, vocab_size: int, max_length: int, num_sequences: int) -> None:
    """A cache of random distributions; lengths are even from a quarter of the longest on."""
    generator = np.random.default_rng(0)
    truncation = Truncation(k=K)
    draft = Manifest.draft(
        teacher=TeacherInfo(
            name="random",
            fingerprint="none",
            architecture="none",
            engine="numpy",
            dtype="float32",
            vocab_size=vocab_size,
        ),
        tokenizer=TokenizerInfo(fingerprint="", files={}),
        shared_vocab_size=vocab_size,
        truncation=truncation,
        temperatures=(1.0,),
        precision="compact",
        source={"path": "nowhere", "fingerprint": "0"},
        sequences={"max_length": max_length},
    )
    lengths = generator.integers(max_length // 4, max_length + 1, num_sequences)
    lengths[0] = max_length
    sequences = [
        sequence(generator, int(length), vocab_size, f"sequence-{i}")
        for i, length in enumerate(lengths)
    ]
    write_cache(path, draft, sequences, plan_of([sequences]))


def sequence(
    generator: np.random.Generator, length: int, vocab_size: int, sample_id: str
) -> ScoredSequence:
    """Random ids, of each target K kept ones with 0.9 of the mass."""
    n = length - 1
    logits = np.sort(generator.normal(scale=2.0, size=(n, K)), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log(0.9)
    ids = np.stack([generator.choice(vocab_size, K, replace=False) for _ in range(n)])
    input_ids = generator.integers(0, vocab_size, length, dtype=np.int32)
    input_ids[1:] = ids[:, 0]
    return ScoredSequence(
        sample_id=sample_id,
        input_ids=input_ids,
        is_target=np.arange(length) > 0,
        positions=np.arange(1, length, dtype=np.int32),
        token_ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        log_z=np.zeros((n, 1), np.float32),
        log_tail=np.full((n, 1), np.log(0.1), np.float32),
        label_logprob=logprobs[:, 0].astype(np.float32),
    )


if __name__ == "__main__":
    main()
