"""What a teacher behind HTTP costs: targets/s and bytes against the same engine in this process.

    python benchmarks/bench_serve.py [--engine transformers|vllm] [--k 64] [--vocab 32000]

A random teacher scores the same random sequences, in turns: in process, and through `teacher_dump
serve` on this machine, with one and with several requests in flight. Both sides share the machine's
cores. Bytes are those of the bodies on the wire.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save, save_model
from transformers import LlamaConfig

from decant.schemas import Truncation
from decant.teacher_dump.engines import TeacherConfig, open_engine
from decant.teacher_dump.engines.http.messages import ScoreRequest
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.inputs.records import TokenSequence

TEMPERATURES = (1.0,)


def save_teacher(path: Path, vocab_size: int, hidden: int, length: int) -> None:
    """A random Llama."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=length,
    )
    save_model(config, path)


def sequences_of(count: int, length: int, vocab_size: int) -> list[TokenSequence]:
    """Random tokens, all but the first targets."""
    rng = np.random.default_rng(0)
    return [
        TokenSequence(
            str(i), rng.integers(0, vocab_size, length).astype(np.int32), np.arange(length) > 0
        )
        for i in range(count)
    ]


def seconds_of(engine: Any, sequences: list[TokenSequence]) -> float:
    """To score all of them."""
    start = time.perf_counter()
    for _ in engine.score(sequences, 0):
        pass
    return time.perf_counter() - start


def start_service(path: Path, engine: str, tokens: int) -> tuple[subprocess.Popen[bytes], str]:
    """A service of the teacher, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "teacher_dump", "serve", "--teacher.path", str(path)]
    command += ["--teacher.engine", engine, "--teacher.tokenizer", "none", "--port", str(port)]
    command += ["--teacher.max_batch_tokens", str(tokens)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return process, url
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with {process.returncode}") from None
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="per forward and per request")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    reduction = Reduction(
        vocab_size=options.vocab,
        truncation=Truncation(k=options.k),
        temperatures=TEMPERATURES,
    )
    sequences = sequences_of(options.sequences, options.length, options.vocab)
    num_targets = sum(int(s.is_target.sum()) for s in sequences)
    sent = len(ScoreRequest.of("0" * 32, reduction, sequences, 0).to_bytes()) / num_targets
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_teacher(path, options.vocab, options.hidden, options.length)

        def opened(config: TeacherConfig) -> Any:
            return open_engine(
                config,
                "" if config.engine == "http" else str(path),
                vocab_size=options.vocab,
                truncation=reduction.truncation,
                temperatures=TEMPERATURES,
                max_length=options.length,
            )

        service, url = start_service(path, options.engine, options.tokens)
        try:
            http: dict[str, Any] = {"engine": "http", "endpoints": (url,)}
            http["max_batch_tokens"] = options.tokens
            local = TeacherConfig(
                path=str(path), engine=options.engine, max_batch_tokens=options.tokens
            )
            engines = {
                "in process": opened(local),
                "http, 1 request": opened(TeacherConfig(**http, requests=1)),
                "http, 4 requests": opened(TeacherConfig(**http)),
            }
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for engine in engines.values():
                seconds_of(engine, sequences[:8])
            for _ in range(options.rounds):
                for name, engine in engines.items():
                    seconds[name].append(seconds_of(engine, sequences))
            for engine in engines.values():
                engine.close()
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait()
    report(options, seconds, num_targets, sent, 4 * reduction.row_words)


def report(
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    num_targets: int,
    sent: float,
    received: int,
) -> None:
    """Print the table and save it."""
    print(
        f"{options.engine}, {num_targets} targets of {options.sequences} sequences, "
        f"V={options.vocab}, k={options.k}; per target {sent:.1f} bytes there, {received} back"
    )
    base = statistics.median(seconds["in process"])
    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        rows.append((name, round(num_targets / middle), round(base / middle, 3)))
        print(
            f"  {name:18} {num_targets / middle:8.0f} targets/s  {base / middle:5.2f} of in process"
        )
    header = ("route", "targets_per_second", "of_in_process")
    save(f"serve_{options.engine}.csv", header, rows)


if __name__ == "__main__":
    main()
