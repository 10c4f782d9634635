"""Targets per second of a dump over the bare forward of the same teacher, in paired runs.

    python benchmarks/bench_dump.py --teacher DIR --source build/demo/train.jsonl.zst

The bare forward runs the model over the same batches up to its logits and drops them. The dump is
the whole of `teacher_dump.dump` from the first sequence of a shard to its commit: forward, top-k,
encoding, compression, fsync. Runs alternate; the ratio is the median over pairs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from schemas import Truncation
from teacher_dump import DumpConfig, SequenceConfig, SourceConfig, TeacherConfig, dump
from teacher_dump.inputs import sequences_of
from teacher_dump.sequences import SequenceCounts, TokenSequence
from teacher_dump.teacher import describe_teacher


@torch.inference_mode()
def bare_forward(model: torch.nn.Module, sequences: list[TokenSequence], tokens: int) -> float:
    """Seconds for the logits of all sequences, in batches of at most `tokens`."""
    start = time.perf_counter()
    left = sorted(sequences, key=lambda s: -len(s.input_ids))
    while left:
        length = len(left[0].input_ids)
        batch, left = left[: max(1, tokens // length)], left[max(1, tokens // length) :]
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        model(input_ids=ids.to(model.device), use_cache=False).logits  # noqa: B018
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=40, help="records of the source")
    args = parser.parse_args()

    def config(k: int, output: str) -> DumpConfig:
        return DumpConfig(
            output=output,
            teacher=TeacherConfig(
                path=args.teacher, dtype="float32", max_batch_tokens=args.batch_tokens
            ),
            source=SourceConfig(path=args.source, limit=args.limit),
            sequences=SequenceConfig(max_length=args.max_length, packing="concat"),
            truncation=Truncation(k=k),
        )

    some = config(args.k[0], "unused")
    sequences = list(sequences_of(some, describe_teacher(some.teacher), SequenceCounts()))
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    bare_forward(model, sequences[:8], args.batch_tokens)

    print(
        f"{'k':>5} {'forward targets/s':>18} {'dump targets/s':>15} {'ratio, median':>14}   pairs"
    )
    for k in args.k:
        forwards, dumps = [], []
        for _ in range(args.pairs):
            seconds = bare_forward(model, sequences, args.batch_tokens)
            with tempfile.TemporaryDirectory() as folder:
                totals = dump(config(k, str(Path(folder, "cache")))).totals
            assert totals is not None
            forwards.append(totals.targets / seconds)
            dumps.append(totals.targets / totals.seconds)
        ratios = [d / f for d, f in zip(dumps, forwards, strict=True)]
        print(
            f"{k:5d} {statistics.median(forwards):18,.0f} {statistics.median(dumps):15,.0f} "
            f"{statistics.median(ratios):14.3f}   {' '.join(f'{r:.3f}' for r in ratios)}"
        )


if __name__ == "__main__":
    main()
