"""What a dump costs beyond the teacher's forward: speed against two other routes, and memory.

    python benchmarks/bench_dump.py speed --teacher DIR --source FILE [--k 16 64]
    python benchmarks/bench_dump.py speed --shape llama-1b --length 2048 --dtype bfloat16
    python benchmarks/bench_dump.py speed --teacher DIR --source FILE --engine vllm
    python benchmarks/bench_dump.py memory [--vocab 32000 152000] [--lengths 512 2048]

`speed`: three ways to score the same sequences take turns; ratios are medians over the rounds.

    forward       the model over the same batches up to its logits, which are dropped
    dump          `teacher_dump.fill`: scoring, top k, encoding, compression, fsync, commit
    dictionaries  DistillKit's way: a dictionary of k entries per token as vLLM's prompt_logprobs
                  gives it (made of log_softmax and topk where transformers runs), then tensors

With a `--shape` weights and tokens are random. `memory`: the peak of a process, by vocabulary and
length, and its growth over the dump.

One file, as both benchmarks are run by it in processes of their own.
"""

import argparse
import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save, save_model
from transformers import LlamaConfig, Qwen2Config

from decant.schemas import Truncation
from decant.storage import Store
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, TeacherConfig
from decant.teacher_dump.engines.vllm.process import torch_is_cpu_only, worker_environment
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.inputs.sequences import SequenceCounts
from decant.teacher_dump.inputs.sources import iter_records
from decant.teacher_dump.job.fill import fill_shards, open_teacher
from decant.teacher_dump.job.shard_inputs import sequences_of
from decant.teacher_dump.job.start import open_or_create
from decant.teacher_dump.teacher import describe_teacher, hash_weights

SHAPES: dict[str, tuple[type, tuple[int, int, int, int, int]]] = {
    # hidden, layers, heads, key-value heads, intermediate
    "tiny": (LlamaConfig, (64, 2, 2, 1, 128)),
    "llama-50m": (LlamaConfig, (512, 12, 8, 4, 1408)),
    "llama-1b": (LlamaConfig, (2048, 16, 32, 8, 8192)),
    "qwen-1.5b": (Qwen2Config, (1536, 28, 12, 2, 8960)),
    "qwen-7b": (Qwen2Config, (3584, 28, 28, 4, 18944)),
    "llama-8b": (LlamaConfig, (4096, 32, 32, 8, 14336)),
}


@dataclass(frozen=True)
class Logprob:
    """What vLLM keeps of one entry."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def save_shape(folder: Path, shape: str, vocab_size: int, length: int, dtype: str) -> Path:
    """Save a random model of this shape."""
    kind, (hidden, layers, heads, kv_heads, intermediate) = SHAPES[shape]
    config = kind(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=length + 1,  # vLLM must generate a token
        tie_word_embeddings=hidden < 3000,
    )
    return save_model(config, folder, dtype, "cuda" if torch.cuda.is_available() else "cpu")


def save_tokens(file: Path, vocab_size: int, length: int, count: int) -> Path:
    """Save sequences of random tokens, all of this length."""
    rng = np.random.default_rng(0)
    with file.open("w") as out:
        for _ in range(count):
            out.write(
                json.dumps({"input_ids": rng.integers(0, vocab_size, length).tolist()}) + "\n"
            )
    return file


def batches(sequences: list[TokenSequence], tokens: int, device: Any) -> Iterator[torch.Tensor]:
    """[B, L] ids, longest first, of at most `tokens` each."""
    left = sorted(sequences, key=lambda s: -len(s.input_ids))
    while left:
        length = len(left[0].input_ids)
        batch, left = left[: max(1, tokens // length)], left[max(1, tokens // length) :]
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        yield ids.to(device)


@torch.inference_mode()
def bare_forward(model: Any, sequences: list[TokenSequence], tokens: int) -> None:
    """The logits of all sequences."""
    for ids in batches(sequences, tokens, model.device):
        model(input_ids=ids, use_cache=False).logits  # noqa: B018


@torch.inference_mode()
def dictionaries(model: Any, sequences: list[TokenSequence], tokens: int, k: int) -> None:
    """A dictionary per token, and tensors of them."""
    for ids in batches(sequences, tokens, model.device):
        logits = model(input_ids=ids, use_cache=False).logits
        for row in logits:
            top = row.float().log_softmax(dim=1).topk(k)
            values, best = top.values.tolist(), top.indices.tolist()
            to_tensors(
                [
                    {
                        token: Logprob(value, rank)
                        for rank, (token, value) in enumerate(zip(*entries, strict=True), 1)
                    }
                    for entries in zip(best, values, strict=True)
                ]
            )


def to_tensors(prompt_logprobs: list[dict[int, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, k] ids and log probs of a sequence's dictionaries, as DistillKit's capture makes them."""
    best = [sorted(d.items(), key=lambda e: -e[1].logprob) for d in prompt_logprobs]
    width = min(len(entries) for entries in best)
    ids = torch.tensor([[token for token, _ in entries[:width]] for entries in best])
    return ids, torch.tensor([[p.logprob for _, p in entries[:width]] for entries in best])


def vllm_routes(path: str, dtype: str, length: int, tokens: int, k: int) -> dict[str, Callable]:
    """The forward and the dictionaries of vLLM itself; for a process of its own."""
    from vllm import LLM, SamplingParams

    on_cpu = {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
    options: dict[str, Any] = {} if torch.cuda.is_available() else on_cpu
    llm = LLM(
        model=path,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_logprobs=k,
        logprobs_mode="raw_logprobs",
        max_model_len=length + 1,
        max_num_batched_tokens=tokens,
        enable_prefix_caching=False,
        **options,
    )

    def ask(sequences: list[TokenSequence], count: int | None) -> list[Any]:
        prompts = [{"prompt_token_ids": s.input_ids.tolist()} for s in sequences]
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=count, detokenize=False
        )
        return llm.generate(prompts, params, use_tqdm=False)

    def dictionaries_(sequences: list[TokenSequence]) -> None:
        for answer in ask(sequences, k):
            to_tensors(answer.prompt_logprobs[1:])

    return {"forward": lambda sequences: ask(sequences, None), "dictionaries": dictionaries_}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time and of this process's processor time."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def fill(config: DumpConfig, engine: Any) -> tuple[float, float]:
    """Time of scoring and committing all shards of a started cache."""
    teacher = hash_weights(describe_teacher(config.teacher))
    writer = open_or_create(config, Store(config.output), teacher, lambda _: None)
    return timed(lambda: list(fill_shards(writer, engine, writer.plan, max_rejected=0.0)))


def speed(args: argparse.Namespace, scratch: Path) -> None:
    """Print and save the table."""
    rows: list[tuple[Any, ...]] = []
    print(
        f"{'k':>5} {'route':>13} {'targets/s':>11} {'of forward':>11} {'CPU us/target':>14}"
        f" {'GPU peak GB':>12}   rounds"
    )
    for k in args.k:
        targets, found, peaks = measured(args, scratch, k)
        for name, times in found.items():
            ratios = [f[0] / t[0] for f, t in zip(found["forward"], times, strict=True)]
            row = (
                k,
                name,
                round(targets / statistics.median(wall for wall, _ in times)),
                round(statistics.median(ratios), 3),
                round(1e6 * statistics.median(cpu for _, cpu in times) / targets, 1),
                round(peaks[name] / 1e9, 2),
            )
            rows.append(row)
            print(
                f"{k:5d} {name:>13} {row[2]:11,d} {row[3]:11.3f} {row[4]:14.1f} {row[5]:12.2f}   "
                + " ".join(f"{ratio:.3f}" for ratio in ratios),
                flush=True,
            )
    header = ("k", "route", "targets_per_s", "of_forward", "cpu_us_per_target", "gpu_peak_gb")
    save(f"dump_{args.shape or Path(args.teacher).name}_{args.engine}.csv", header, rows)


def measured(
    args: argparse.Namespace, scratch: Path, k: int
) -> tuple[int, dict[str, list[tuple[float, float]]], dict[str, int]]:
    """Targets, and for each route its times by round and its peak of GPU memory in bytes."""
    config = dump_config(args, scratch, k, "unset")
    teacher = describe_teacher(config.teacher)
    records = iter_records(config.source)
    sequences = list(sequences_of(config, teacher, SequenceCounts(), records))
    engine: Any = open_teacher(config, teacher)
    tokens = args.batch_tokens

    def dumped() -> tuple[float, float]:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            return fill(dump_config(args, scratch, k, f"{folder}/cache"), engine)

    routes: dict[str, Callable[[], tuple[float, float]]]
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        if args.engine == "vllm":
            other = Other(args, scratch, k)
            stack.callback(other.close)
            routes = {
                "forward": lambda: other.ask("forward"),
                "dump": dumped,
                "dictionaries": lambda: other.ask("dictionaries"),
            }
        else:
            model = engine._model
            routes = {
                "forward": lambda: timed(lambda: bare_forward(model, sequences, tokens)),
                "dump": dumped,
                "dictionaries": lambda: timed(lambda: dictionaries(model, sequences, tokens, k)),
            }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in routes}
        peaks = dict.fromkeys(routes, 0)
        for round_ in range(-1, args.rounds):  # the first one warms up
            for name, route in routes.items():
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                times = route()
                if round_ >= 0:
                    found[name].append(times)
                if torch.cuda.is_available():
                    peaks[name] = torch.cuda.max_memory_allocated()
    return sum(int(s.is_target.sum()) for s in sequences), found, peaks


class Other:
    """vLLM's own routes in a process of their own, as vLLM takes over the process it lives in."""

    def __init__(self, args: argparse.Namespace, scratch: Path, k: int) -> None:
        """Start it."""
        given = {**vars(args), "k": [k], "scratch": str(scratch)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "other", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(torch_is_cpu_only()),
            text=True,
        )

    def ask(self, route: str) -> tuple[float, float]:
        """Times of a route."""
        assert self._process.stdin and self._process.stdout
        print(route, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("TIMES "):
                wall, processor = json.loads(line.removeprefix("TIMES "))
                return wall, processor
        raise RuntimeError("the vLLM process has ended")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def answer(given: str) -> None:
    """The other end of `Other`."""
    args = argparse.Namespace(**json.loads(given))
    config = dump_config(args, Path(args.scratch), args.k[0], "unset")
    teacher, records = describe_teacher(config.teacher), iter_records(config.source)
    sequences = list(sequences_of(config, teacher, SequenceCounts(), records))
    routes = vllm_routes(config.teacher.path, args.dtype, args.length, args.batch_tokens, args.k[0])
    for line in sys.stdin:
        times = timed(lambda line=line: routes[line.strip()](sequences))  # type: ignore[misc]
        print("TIMES", json.dumps(times), flush=True)


def dump_config(args: argparse.Namespace, scratch: Path, k: int, output: str) -> DumpConfig:
    """The dump of the sequences that the arguments ask for."""
    path, source, tokenizer = args.teacher, args.source, ""
    if args.shape:
        path, source, tokenizer = str(scratch / "teacher"), str(scratch / "ids.jsonl"), "none"
        if not Path(path).exists():
            save_shape(Path(path), args.shape, args.vocab, args.length, args.dtype)
            save_tokens(Path(source), args.vocab, args.length, args.limit)
    return DumpConfig(
        output=output,
        teacher=TeacherConfig(
            path=path,
            tokenizer=tokenizer,
            engine=args.engine,
            dtype=args.dtype,
            max_batch_tokens=args.batch_tokens,
        ),
        source=SourceConfig(path=source, limit=args.limit),
        sequences=SequenceConfig(
            max_length=args.length, packing="none" if args.shape else "concat"
        ),
        truncation=Truncation(k=k),
        shard_targets=args.shard_targets,
    )


def memory(args: argparse.Namespace, scratch: Path) -> None:
    """Print a table of peaks, each of a process of its own."""
    print(
        f"{'V':>8} {'L':>6} {'k':>5} {'loaded MB':>10} {'peak MB':>9} {'at 1/4, 1/2, 1 of it':>28}"
    )
    rows = []
    for vocab in args.vocabs:
        for length in args.lengths:
            given = {"vocab": vocab, "length": length, "k": args.k, "limit": args.limit}
            done = subprocess.run(
                [sys.executable, __file__, "peak", json.dumps(given)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            loaded, peak, *at = json.loads(done.stdout.splitlines()[-1])
            rows.append((vocab, length, args.k, loaded, peak, *at))
            print(
                f"{vocab:8d} {length:6d} {args.k:5d} {loaded:10d} {peak:9d} "
                f"{', '.join(map(str, at)):>28}",
                flush=True,
            )
    header = ("V", "L", "k", "loaded_mb", "peak_mb", "quarter_mb", "half_mb", "whole_mb")
    save("dump_memory.csv", header, rows)


def peak(given: str) -> None:
    """Dump a tiny teacher with the given V and L, and print what the process took."""
    asked = json.loads(given)
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(
            shape="tiny",
            vocab=asked["vocab"],
            length=asked["length"],
            limit=asked["limit"] * 512 // asked["length"],
            dtype="float32",
            engine="transformers",
            batch_tokens=4096,
            shard_targets=asked["limit"] * 512 // 8,
            teacher="",
            source="",
        )
        config = dump_config(args, Path(folder), asked["k"], folder + "/cache")
        teacher = hash_weights(describe_teacher(config.teacher))
        writer = open_or_create(config, Store(config.output), teacher, lambda _: None)
        engine = open_teacher(config, teacher)
        loaded = resident()
        seen = []
        for _ in fill_shards(writer, engine, writer.plan, max_rejected=0.0):
            seen.append(resident())
        at = [seen[len(seen) // 4], seen[len(seen) // 2], seen[-1]]
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps([loaded, highest, *at]))


def resident() -> int:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def main() -> None:
    if sys.argv[1:2] in (["other"], ["peak"]):
        return {"other": answer, "peak": peak}[sys.argv[1]](sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed", help="targets per second against other routes")
    one.add_argument("--teacher", default="", help="a saved model, with --source")
    one.add_argument("--source", default="")
    one.add_argument("--shape", default="", choices=SHAPES, help="a random model instead")
    one.add_argument("--vocab", type=int, default=151_936, help="of a --shape")
    one.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    one.add_argument("--dtype", default="float32")
    one.add_argument("--k", type=int, nargs="+", default=[16, 64])
    one.add_argument("--length", type=int, default=256)
    one.add_argument("--batch-tokens", type=int, default=4096)
    one.add_argument("--limit", type=int, default=40, help="records, or sequences of a --shape")
    one.add_argument("--shard-targets", type=int, default=2_000_000)
    one.add_argument("--rounds", type=int, default=5)
    two = commands.add_parser("memory", help="peak memory by vocabulary and length")
    two.add_argument("--vocabs", type=int, nargs="+", default=[4096, 32_000, 151_936])
    two.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    two.add_argument("--k", type=int, default=64)
    two.add_argument("--limit", type=int, default=256, help="sequences of 512 tokens")
    args = parser.parse_args()
    if args.command == "speed" and bool(args.shape) == bool(args.teacher and args.source):
        parser.error("give --shape, or --teacher and --source")
    with tempfile.TemporaryDirectory() as scratch:
        {"speed": speed, "memory": memory}[args.command](args, Path(scratch))


if __name__ == "__main__":
    main()
