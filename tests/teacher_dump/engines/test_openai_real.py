"""Real stock servers as teachers, against a plain float32 forward of the same weights.

vLLM's own server on a CPU, without our plugin, in vLLM's environment; llama.cpp's server
(llama-cpp-python) wherever $LLAMA_PYTHON names an interpreter that has it.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, dump
from decant.teacher_dump.engines import TeacherConfig, open_engine
from decant.teacher_dump.engines.opening import open_generator
from decant.teacher_dump.engines.seam import Prompt, Sampling, SequenceError, Unavailable
from decant.teacher_dump.inputs.config import GenerateConfig
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.teacher import describe_teacher
from tests.support import models
from tests.support.chat_servers import chat_config, save_chat_teacher
from tests.support.dumps import save_records
from tests.support.services import free_port, wait_for
from tests.support.stock_servers import V, build_tokenizer, log_probs, stock_config

VLLM_NATS = 2e-4
"""How far vLLM's kernels lie from a plain forward, both in float32."""
CHAT_NATS = 1e-3
"""How far its tails do with k = 8, which are 1 - sum p of numbers of 32 bits."""
LLAMA_NATS = 0.1
"""How far llama.cpp's do, whose cached keys and values have 16 bits."""
TOKENIZER = build_tokenizer()


class Server:
    """A server in a process of its own."""

    def __init__(self, arguments: list[str], port: int, **variables: str) -> None:
        """Start it and wait until it lists its models."""
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        self._process = subprocess.Popen(arguments, env=environment, start_new_session=True)
        wait_for(self._is_ready)

    def close(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "the server has ended"
        with contextlib.suppress(urllib.error.URLError, OSError):
            return urllib.request.urlopen(f"{self.url}/v1/models", timeout=5).status == 200
        return False


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of which every token has a text of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    save_chat_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    """The same, here."""
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def vllm(path: Path) -> Iterator[Server]:
    """VLLM's own server with its own limits."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    port = free_port()
    options = {
        "model": path,
        "served-model-name": "tiny",
        "dtype": "float32",
        "port": port,
        "host": "127.0.0.1",
        "max-num-batched-tokens": 256,
    }
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    server = Server(arguments, port, **variables)
    yield server
    server.close()


def sequences_of(count: int, first: int) -> list[TokenSequence]:
    """Texts behind a beginning token, with targets from token `first` on."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        text = " ".join(rng.choice(models.WORDS, int(rng.integers(2, 12))))
        ids = np.array([0, *TOKENIZER(text)["input_ids"]], np.int32)
        made.append(TokenSequence(f"sample-{number}", ids, np.arange(len(ids)) >= first))
    return made


def opened(config: TeacherConfig, k: int) -> Any:
    """An engine for the top k."""
    return open_engine(
        config,
        "",
        vocab_size=V,
        truncation=Truncation(k=k),
        temperatures=(1.0,),
        max_length=100,
        tokenizer=TOKENIZER,
    )


def disagreement(engine: Any, model: Any, first: int) -> float:
    """The largest difference of any number from a plain forward, in nats."""
    return max(difference(s, model) for s in engine.score(sequences_of(12, first), 0))


def difference(scored: Any, model: Any) -> float:
    """The largest difference of any number of one sequence from a plain forward, in nats."""
    logp = log_probs(model, scored.input_ids)[scored.positions - 1]
    ids = scored.token_ids.astype(np.int64)
    rest = logp.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    pairs = [
        (scored.logprobs, np.take_along_axis(logp, ids, axis=1)),
        (scored.logprobs, -np.sort(-logp, axis=1)[:, : ids.shape[1]]),
        (scored.log_tail[:, 0], np.logaddexp.reduce(rest, axis=1)),
        (scored.label_logprob, logp[np.arange(len(logp)), scored.labels]),
    ]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


@pytest.mark.vllm
@pytest.mark.parametrize("api", ["auto", "completions"])
def test_vllm(vllm: Server, path: Path, model: Any, api: str) -> None:
    """By prompt_logprobs, and by echo with ids in place of texts."""
    engine = opened(stock_config(path, vllm.url, api=api), 20)
    assert engine.card.api == ("completions" if api == "completions" else "vllm")
    worst = disagreement(engine, model, 1)
    print(f"largest difference: {worst:.2g} nats")
    assert worst < VLLM_NATS
    engine.close()


@pytest.mark.vllm
def test_vllm_says_who_it_is(vllm: Server, path: Path) -> None:
    """Its model, root and version, its context and its own limit of 20 entries."""
    config = stock_config(path, f"{vllm.url}/v1")
    teacher = describe_teacher(config)
    assert teacher.info.name == f"tiny ({path})"
    assert teacher.info.engine.startswith("openai vllm 0.")
    assert teacher.max_positions == models.MAX_POSITIONS - 1
    assert teacher.max_entries == 20
    with pytest.raises(Unavailable, match=r"at most 20 entries.*--max-logprobs 64"):
        opened(config, 64)


@pytest.mark.vllm
def test_vllm_samples(vllm: Server, path: Path, model: Any) -> None:
    """At temperature 0 what a plain forward says, ended by a stop id."""
    prompt = sequences_of(1, 1)[0].input_ids
    expected = prompt.tolist()
    for _ in range(8):
        expected.append(int(log_probs(model, expected)[-1].argmax()))
    answer = expected[len(prompt) :]
    stop = answer[3]
    sampling = Sampling(temperature=0.0, top_p=1.0, stop_ids=(stop,), vocab_size=V)
    generator = open_generator(
        stock_config(path, vllm.url), "", sampling=sampling, max_length=100, tokenizer=TOKENIZER
    )
    (response,) = generator.generate([Prompt(token_ids=prompt, max_new_tokens=8, seed=1)])
    generator.close()
    assert response.token_ids.tolist() == answer[: answer.index(stop) + 1]
    assert response.finish_reason == "stop"


@pytest.mark.vllm
def test_vllm_as_a_chat_api(vllm: Server, path: Path, model: Any, tmp_path: Path) -> None:
    """Log probs of its answers are the model's, at whatever temperature they are sampled."""
    records = [{"id": str(i), "prompt": f"the lazy dog {i}"} for i in range(4)]
    config = DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=chat_config(path, vllm.url),
        source=SourceConfig(
            path=str(save_records(tmp_path / "prompts.jsonl", *records)),
            generate=GenerateConfig(n=2, max_new_tokens=12, temperature=0.7),
        ),
        sequences=SequenceConfig(max_length=64),
        truncation=Truncation(k=8),
        precision="f32",
    )
    manifest = dump(config)
    worst = 0.0
    for scored in CacheReader(config.output):
        assert scored.num_targets == 12
        worst = max(worst, difference(scored, model))
    print(f"largest difference: {worst:.2g} nats; {manifest.teacher}")
    assert worst < CHAT_NATS
    parts = Path(config.output, "generated").glob("*.parquet")
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(rows) == 8 and not any(row["num_unnamed"] for row in rows)


@pytest.fixture(scope="module")
def llama(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Server]]:
    """llama.cpp's server, of a model that begins texts with a token and of one that does not."""
    from tests.support.gguf_teacher import save_gguf

    python = os.environ.get("LLAMA_PYTHON")
    if not python:
        pytest.skip("LLAMA_PYTHON names no interpreter")
    folder = tmp_path_factory.mktemp("gguf")
    servers = {}
    for add_bos in (True, False):
        file, port = folder / f"{add_bos}.gguf", free_port()
        save_gguf(file, model, TOKENIZER, add_bos=add_bos)
        options = ["--n_ctx", "128", "--n_threads", "1", "--logits_all", "true"]
        command = [python, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port)]
        servers[add_bos] = Server([*command, *options, "--verbose", "false"], port)
    yield servers
    for server in servers.values():
        server.close()


@pytest.mark.llama
def test_llama(llama: dict[bool, Server], path: Path, model: Any) -> None:
    """It takes text alone, adds the beginning token, and says nothing of the first of text."""
    engine = opened(stock_config(path, llama[True].url), 8)
    assert engine.card.form.sends_text and engine.card.form.begins == (0,)
    worst = disagreement(engine, model, 2)
    print(f"largest difference: {worst:.2g} nats")
    assert worst < LLAMA_NATS
    with pytest.raises(SequenceError, match="gives no log probs for token 1"):
        list(engine.score(sequences_of(1, 1), 0))
    engine.close()


@pytest.mark.llama
def test_llama_without_a_beginning_token(llama: dict[bool, Server], path: Path) -> None:
    """Its rows are shifted by one then, which is found out before anything is scored."""
    with pytest.raises(Unavailable, match="its rows are shifted by one"):
        opened(stock_config(path, llama[False].url), 8)
