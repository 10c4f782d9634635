"""Step time and peak memory of offline distillation over plain fine-tuning and online distillation.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --shape qwen-0.5b --device cuda --mixed-precision bf16

A random teacher dumps a cache of sequences of uneven length at k=64. Then the same fresh student
takes the same packed batches through the same optimizer with

    offline   forward KL to the cache, read from disk: as `student_train` does it
    ce        cross-entropy, transformers' own loss on whole logits: plain fine-tuning
    ce_fused  our cross-entropy alone, fused with the head
    online    forward KL over whole logits to the teacher, resident beside the student

Every run is a process of its own, so that peaks of memory do not mix; the ways alternate and ratios
are medians over rounds. Time: of the clock on a GPU; on the CPU processor time of the whole
process, reading threads included, which other jobs disturb less. Peak memory: allocated on the GPU,
or resident on the CPU above the imports, from the building of the models on.
"""

import argparse
import csv
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

RESULTS = Path(__file__).parent / "results" / "train.csv"
WAYS = ("offline", "ce", "ce_fused", "online")
K = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """A student, its teacher, and the batches."""

    student: dict[str, int]
    teacher: dict[str, int]
    vocab_size: int
    max_length: int
    batch_size: int
    steps: int
    warmup_steps: int


SHAPES = {
    "tiny": Shape(
        student=dict(hidden_size=256, num_hidden_layers=4, intermediate_size=768, heads=4),
        teacher=dict(hidden_size=512, num_hidden_layers=6, intermediate_size=1536, heads=8),
        vocab_size=16_000,
        max_length=256,
        batch_size=6,
        steps=8,
        warmup_steps=2,
    ),
    "small": Shape(
        student=dict(hidden_size=384, num_hidden_layers=8, intermediate_size=1024, heads=6),
        teacher=dict(hidden_size=768, num_hidden_layers=10, intermediate_size=2048, heads=12),
        vocab_size=32_000,
        max_length=512,
        batch_size=4,
        steps=6,
        warmup_steps=2,
    ),
    "qwen-0.5b": Shape(
        student=dict(hidden_size=896, num_hidden_layers=24, intermediate_size=4864, heads=14),
        teacher=dict(hidden_size=1536, num_hidden_layers=28, intermediate_size=8960, heads=12),
        vocab_size=151_936,
        max_length=2048,
        batch_size=8,
        steps=20,
        warmup_steps=5,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--packing", choices=["none", "rows", "padding_free"], default="rows")
    parser.add_argument("--attention", default="", help="for example flash_attention_2")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the GPU, for MFU")
    parser.add_argument("--folder", default="", help="keep teacher and cache here")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, args.one, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "cache/manifest.json").exists():
            make_cache(SHAPES[args.shape], folder, args.device)
        found = []
        for number in range(args.rounds):
            ways = args.ways[number % len(args.ways) :] + args.ways[: number % len(args.ways)]
            for way in ways:
                found.append({"round": number, "way": way, **measured(args, way, folder)})
                print(found[-1], file=sys.stderr, flush=True)
    report(args, found)


def make_cache(shape: Shape, folder: Path, device: str) -> None:
    """A random teacher and what it says of random sequences, through `teacher_dump`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config_of(shape, shape.teacher, wide=True))
    teacher.save_pretrained(folder / "teacher")
    generator = np.random.default_rng(0)
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(shape.batch_size * (shape.steps + shape.warmup_steps)):
            length = int(generator.integers(shape.max_length // 4, shape.max_length + 1))
            ids = generator.integers(0, shape.vocab_size, length).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")
    command = ["-m", "teacher_dump", "run", "--output", str(folder / "cache")]
    command += ["--teacher.path", str(folder / "teacher"), "--teacher.dtype", "float32"]
    command += ["--source.path", str(folder / "texts.jsonl")]
    command += ["--teacher.tokenizer", "none"]
    command += ["--sequences.max_length", str(shape.max_length), "--truncation.k", str(K)]
    if device == "cuda":
        command += ["--teacher.dtype", "bfloat16"]
    subprocess.run([sys.executable, *command], check=True)


def config_of(shape: Shape, size: dict[str, int], *, wide: bool = False) -> LlamaConfig:
    """A Llama; `wide` weights give distributions that are not flat."""
    fields = dict(size)
    heads = fields.pop("heads")
    return LlamaConfig(
        **fields,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else 1,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.06 if wide else 0.02,
    )


def measured(args: argparse.Namespace, way: str, folder: Path) -> dict[str, float]:
    """One run in a process of its own."""
    options = [arg for arg in sys.argv[1:] if arg != "--folder"]
    if args.folder:
        options.remove(args.folder)
    command = [sys.executable, __file__, *options, "--one", way, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, way: str, folder: Path) -> dict[str, float]:
    """Train some steps; times and memory of those after the warmup."""
    from accelerate import Accelerator

    from decant.student_train import CacheStream, Distiller, LossConfig, OptimizerConfig
    from decant.student_train.data.steps import steps_of
    from decant.student_train.model.student import compile_layers
    from decant.student_train.runtime.distributed import backward
    from decant.student_train.runtime.optimizer import adamw

    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    device = accelerator.device
    stream = CacheStream(folder / "cache", batch_size=shape.batch_size)
    data = steps_of(
        stream, num_microbatches=1, packing=args.packing, pin_memory=device.type == "cuda"
    )
    if way != "offline":  # the others read no distributions: their batches are there already
        data = iter([next(data) for _ in range(shape.steps + shape.warmup_steps)])
    before = resident_bytes()
    torch.manual_seed(0)
    options = {"attn_implementation": args.attention} if args.attention else {}
    student = AutoModelForCausalLM.from_config(config_of(shape, shape.student), **options)
    student.to(device).train()
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    kd_weight = 0.0 if way == "ce_fused" else 1.0
    loss = LossConfig(kd_weight=kd_weight, ce_weight=1.0 - kd_weight)
    model = Distiller(student, loss, shape.vocab_size)
    if args.compile:
        compile_layers(student)
    num_parameters = sum(p.numel() for p in student.parameters())
    model, optimizer = accelerator.prepare(model, adamw(model, OptimizerConfig()))
    teacher = None
    if way == "online":
        dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=dtype, **options)
        teacher.to(device).eval()
    forward = losses_of(way, model, teacher, accelerator)

    seconds, processor, waited, tokens, targets = [], [], 0.0, 0, 0
    for number in range(shape.warmup_steps + shape.steps):
        synchronize(device)
        start, start_processor = time.perf_counter(), time.process_time()
        (batch,) = next(data).microbatches
        wait = time.perf_counter() - start
        backward(accelerator, forward(batch.to(device)))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        if number >= shape.warmup_steps:
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_processor)
            waited += wait
            tokens += batch.input_ids.numel()
            targets += batch.num_targets
    total = sum(seconds)
    layers, hidden = shape.student["num_hidden_layers"], shape.student["hidden_size"]
    flops = (6 * num_parameters + 6 * layers * hidden * shape.max_length) * targets
    return {
        "parameters": num_parameters,
        "step_s": total / len(seconds),
        "step_processor_s": sum(processor) / len(processor),
        "targets_per_s": targets / total,
        "places_per_target": tokens / targets,
        "data_wait_share": waited / total,
        "peak_bytes": peak_bytes(device, before),
        "mfu": flops / total / (args.peak_tflops * 1e12) if args.peak_tflops else 0.0,
    }


def losses_of(way: str, model: Any, teacher: Any, accelerator: Any) -> Callable[[Any], Tensor]:
    """What turns a batch into the loss of a way."""

    def inputs(batch: Any) -> dict[str, Tensor]:
        if batch.position_ids is None:
            return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}

    def ours(batch: Any) -> Tensor:
        return model(batch).loss

    def plain(batch: Any) -> Tensor:
        labels = torch.full_like(batch.input_ids, -100).flatten()
        labels[batch.predictors + 1] = batch.labels
        labels = labels.view_as(batch.input_ids)
        with accelerator.autocast():
            return model.student(**inputs(batch), labels=labels, use_cache=False).loss

    def online(batch: Any) -> Tensor:
        with accelerator.autocast():
            with torch.no_grad():
                logits = teacher(**inputs(batch), use_cache=False).logits
                expected = logits.flatten(0, 1)[batch.predictors].float().log_softmax(-1)
                del logits
            logits = model.student(**inputs(batch), use_cache=False).logits
        found = logits.flatten(0, 1)[batch.predictors].float().log_softmax(-1)
        return F.kl_div(found, expected, reduction="batchmean", log_target=True)

    return {"offline": ours, "ce_fused": ours, "ce": plain, "online": online}[way]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes(device: torch.device, before: int) -> int:
    """Allocated on a GPU at most, or resident above `before`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def report(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Print a table of medians and write all runs down."""

    def values(way: str, name: str) -> list[float]:
        return [row[name] for row in found if row["way"] == way]

    def ratios(way: str, name: str) -> Iterator[float]:
        return (a / b for a, b in zip(values("offline", name), values(way, name), strict=True))

    print(
        f"\n{args.shape} on {args.device}, {args.mixed_precision}, packing {args.packing}, k={K}, "
        f"{found[0]['parameters']:,} parameters, medians of {args.rounds} rounds\n"
    )
    clock = "step_s" if args.device == "cuda" else "step_processor_s"
    print("| way | s per step | of processor | targets/s | MFU | peak MiB | wait | time | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for way in args.ways:
        row = {name: statistics.median(values(way, name)) for name in found[0] if name != "way"}
        mfu = f"{row['mfu']:.1%}" if args.peak_tflops else ""
        beside = ["", ""]
        if "offline" in args.ways and way != "offline":
            beside = [f"{statistics.median(ratios(way, n)):.3f}" for n in (clock, "peak_bytes")]
        print(
            f"| {way} | {row['step_s']:.4f} | {row['step_processor_s']:.4f} | "
            f"{row['targets_per_s']:,.0f} | {mfu} | "
            f"{row['peak_bytes'] / 2**20:,.0f} | {row['data_wait_share']:.2%} | "
            f"{beside[0]} | {beside[1]} |"
        )
    print("\ntime, memory: of offline over this way")
    with RESULTS.open("w", newline="") as file:
        settings = {"shape": args.shape, "device": args.device, "packing": args.packing}
        writer = csv.DictWriter(file, [*settings, *found[0]])
        writer.writeheader()
        writer.writerows({**settings, **row} for row in found)


if __name__ == "__main__":
    main()
