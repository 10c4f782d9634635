"""Small language models of larger vocabularies, really trained, and caches of their distributions.

    python benchmarks/vocab_models.py                 all of it: about half an hour of one core

Noise compresses like noise, so `bench_format.py` measures on these. Text is the Python sources of
this environment; one directory in sixteen is held out, and that part is what the caches score. The
input and output embeddings start from the training text's bigrams (positive pointwise mutual
information, reduced to the hidden size), with the unigram log frequencies in the first dimension;
then the whole is trained, first with a sampled softmax, at last with the full one. What is there
is not made again; time is processor time.
"""

import argparse
import ctypes
import hashlib
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decant.storage.files.durable import publish

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/vocab-models"
VOCAB_SIZES = {"4k": 4_096, "32k": 32_768, "100k": 100_000}
"""Names of the models; the 4k one is the demo's teacher."""
CACHE_K = 128
DRAWS = {"4k": 32, "32k": 19, "100k": 23}
"""Draws per target of the sampled caches: about 12 distinct ids."""
END = "<|endoftext|>"
HIDDEN, LAYERS, LENGTH = 128, 2, 128
BATCH_TOKENS, FULL_BATCH_TOKENS, FULL_CHUNK = 4096, 1024, 256
CANDIDATES = 8192
FULL_SHARE = 0.25
"""Share of the training time with the full softmax."""
TRAIN_BYTES, HELDOUT_BYTES, DUMP_BYTES = 48_000_000, 2_000_000, 220_000
HELDOUT_WINDOWS = 200
"""Of LENGTH tokens, for the loss."""
LEFT_OUT = {"site-packages", "encodings", "pydoc_data"}
MAX_FILE_BYTES = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=VOCAB_SIZES, nargs="+", default=[*VOCAB_SIZES])
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, per model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Large tensors come and go: glibc is to keep their pages (M_MMAP_MAX, M_TRIM_THRESHOLD).
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, -1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        make(name, args.minutes)


def make(name: str, minutes: float) -> None:
    """The model and the two caches of one vocabulary, where they are missing."""
    if name == "4k":
        model, source = ROOT / "examples/demo/teacher", FOLDER / "demo/heldout.jsonl.zst"
        if not source.exists():
            run("examples/demo/corpus.py", "--out", source.parent)
    else:
        model, source = FOLDER / f"model-{name}", FOLDER / "heldout.jsonl.zst"
        if not (model / "config.json").exists():
            train(VOCAB_SIZES[name], model, minutes)
        if not source.exists():
            write_heldout(source)
    sample = ("--truncation.method", "sample", "--truncation.draws", DRAWS[name])
    dump(model, source, FOLDER / f"cache-{name}", "--truncation.k", CACHE_K)
    dump(model, source, FOLDER / f"cache-{name}-sample", *sample)


def dump(model: Path, source: Path, cache: Path, *options: object) -> None:
    """Score a held-out text at full precision; running it again completes it or does nothing."""
    run(
        *("-m", "teacher_dump", "run", "--output", cache, "--precision", "f32"),
        *("--teacher.path", model, "--teacher.dtype", "float32"),
        *("--teacher.max_batch_tokens", 1024, "--source.path", source),
        *("--sequences.max_length", 256, "--sequences.packing", "concat", *options),
    )


def run(*arguments: object) -> None:
    """Run `python ...` from the project's root."""
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def documents(split: str, max_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of one split, "train" or "heldout", in the order of a hash of the path.

    A directory is held out or not by its name alone.
    """
    found = []
    for kind in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(kind))
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            if kind == "stdlib" and LEFT_OUT.intersection(name.parts):
                continue
            if (digest(str(name.parent)) % 16 == 0) == (split == "heldout"):
                found.append((digest(str(name)), str(name), path))
    size = 0
    for _, name, path in sorted(found):
        if path.stat().st_size > MAX_FILE_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield name, text
            size += len(text)
        if size >= max_bytes:
            return


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_heldout(path: Path) -> None:
    """DUMP_BYTES of held-out text: a fair sample of pieces of 2,000 characters."""
    pieces = [
        (f"{name}#{start}", text[start : start + 2000])
        for name, text in documents("heldout", HELDOUT_BYTES)
        for start in range(0, len(text), 2000)
    ]
    temporary = path.with_suffix(".tmp")
    with zstandard.open(temporary, "wt", encoding="utf-8") as out:
        for name, text in sorted(pieces, key=lambda piece: digest(piece[0]))[: DUMP_BYTES // 2000]:
            out.write(json.dumps({"id": name, "text": text}) + "\n")
    publish(temporary, path)


def train(vocab_size: int, out: Path, minutes: float) -> None:
    """Tokenizer, bigram initialisation, training; `recipe.json` says what came of it."""
    torch.manual_seed(0)
    texts = [text for _, text in documents("train", TRAIN_BYTES)]
    tokenizer = train_tokenizer(texts, vocab_size)
    stream = token_stream(tokenizer, texts)
    heldout = token_stream(tokenizer, [text for _, text in documents("heldout", HELDOUT_BYTES)])
    heldout = heldout[: HELDOUT_WINDOWS * LENGTH]
    counts = np.bincount(stream, minlength=vocab_size) + 0.5
    unigram = counts / counts.sum()
    progress(f"{vocab_size:,} ids, {len(stream):,} training tokens")
    model = initial_model(tokenizer, stream, unigram)
    report = {"bigram_start_heldout_ce": heldout_loss(model, heldout)}
    progress(f"held-out loss at the start {report['bigram_start_heldout_ce']:.3f}")
    tokens = fit(model, stream, heldout, unigram, minutes)
    report |= {
        "vocab_size": vocab_size,
        "training_minutes": minutes,
        "text_tokens": len(stream),
        "tokens_seen": tokens,
        "heldout_unigram_ce": float(-np.log(unigram[heldout]).mean()),
        "heldout_ce": heldout_loss(model, heldout),
    }
    progress(json.dumps(report))
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(report, indent=1) + "\n")
    model.save_pretrained(out)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> NDArray[np.int32]:
    """All texts, each behind one end-of-text token."""
    start = [tokenizer.bos_token_id]
    encode = tokenizer.backend_tokenizer.encode
    return np.concatenate([np.array(start + encode(text).ids, np.int32) for text in texts])


def initial_model(
    tokenizer: PreTrainedTokenizerFast, stream: NDArray[np.int32], unigram: NDArray[np.float64]
) -> LlamaForCausalLM:
    """A Llama whose blocks add nothing yet and whose embeddings are a bigram model.

    x(a) W(b) = max(0, ln p(a,b) / p(a) p(b)) + ln p(b), the first term at rank HIDDEN - 1, where
    its approximation weighs entry (a, b) by p(a) p(b).
    """
    vocab_size = len(unigram)
    pair, count = np.unique(
        stream[:-1].astype(np.int64) * vocab_size + stream[1:], return_counts=True
    )
    first, second = np.divmod(pair, vocab_size)
    information = np.log(count / count.sum() / unigram[first] / unigram[second])
    information *= count / (count + 1)  # what was seen once is half believed
    positive = information > 0
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([first, second])[:, positive]),
        torch.from_numpy(
            (information * np.sqrt(unigram[first] * unigram[second]))[positive]
        ).float(),
        (vocab_size, vocab_size),
    ).coalesce()
    left, scale, right = torch.svd_lowrank(matrix, q=HIDDEN - 1, niter=3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=3 * HIDDEN,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    root = torch.from_numpy(np.sqrt(unigram)).float()[:, None]
    inputs, outputs = left * scale.sqrt() / root, right * scale.sqrt() / root
    constant = 2 * inputs.norm(dim=1).quantile(0.9)  # so that the norm is nearly constant
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = constant
        model.model.embed_tokens.weight[:, 1:] = inputs
        model.lm_head.weight[:, 0] = torch.from_numpy(np.log(unigram)).float() / constant
        model.lm_head.weight[:, 1:] = outputs
        model.model.norm.weight.fill_(float(constant) * 1.2 / HIDDEN**0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def fit(
    model: LlamaForCausalLM,
    stream: NDArray[np.int32],
    heldout: NDArray[np.int32],
    unigram: NDArray[np.float64],
    minutes: float,
) -> int:
    """Train for a time; returns the tokens seen."""
    embeddings = [model.model.embed_tokens.weight, model.lm_head.weight]
    others = [p for p in model.model.parameters() if p is not embeddings[0]]
    optimizer = torch.optim.AdamW(
        [{"params": embeddings, "base": 1e-3}, {"params": others, "base": 3e-3}],
        *(1e-3, (0.9, 0.98)),
        weight_decay=0.0,
        fused=True,
    )
    generator = np.random.default_rng(0)
    proposal = 0.5 * unigram**0.75 / (unigram**0.75).sum() + 0.5 * unigram
    tokens = step = 0
    start = shown = time.process_time()
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        full = done > 1 - FULL_SHARE
        num_windows = (FULL_BATCH_TOKENS if full else BATCH_TOKENS) // LENGTH
        starts = generator.integers(0, len(stream) - LENGTH - 1, num_windows)
        windows = torch.from_numpy(np.stack([stream[s : s + LENGTH + 1] for s in starts])).long()
        hidden = model.model(windows[:, :-1]).last_hidden_state.flatten(0, 1)
        labels = windows[:, 1:].flatten()
        if full:
            loss = full_loss(hidden, model.lm_head.weight, labels)
        else:
            loss = sampled_loss(hidden, model.lm_head.weight, labels, proposal, generator)
        rate = min(1.0, (step + 1) / 50, 1.5 * (1 - done)) * (0.5 if full else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += len(labels)
        step += 1
        if time.process_time() - shown > 30:
            shown = time.process_time()
            held = heldout_loss(model, heldout[: 64 * LENGTH])
            progress(f"{done:4.0%} {tokens:>10,} tokens, loss {loss:.3f}, held-out {held:.3f}")
    return tokens


def sampled_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    proposal: NDArray[np.float64],
    generator: np.random.Generator,
) -> torch.Tensor:
    """Cross-entropy whose normaliser is estimated from CANDIDATES shared draws.

    Z = exp(x_label) + sum over drawn ids v != label of exp(x_v) / P(v is drawn).
    """
    drawn = np.unique(generator.choice(len(proposal), CANDIDATES, p=proposal))
    log_inclusion = np.log(-np.expm1(CANDIDATES * np.log1p(-proposal[drawn])))
    candidates = torch.from_numpy(drawn)
    logits = hidden_NH @ functional.embedding(candidates, weight_VH).T
    logits = logits - torch.from_numpy(log_inclusion).float()
    at = torch.searchsorted(candidates, labels_N).clamp(max=len(candidates) - 1)
    hit = (candidates[at] == labels_N).nonzero().squeeze(1)
    logits = logits.index_put((hit, at[hit]), torch.tensor(-torch.inf))
    label_logits = (hidden_NH * functional.embedding(labels_N, weight_VH)).sum(1)
    return (torch.logaddexp(torch.logsumexp(logits, 1), label_logits) - label_logits).mean()


def full_loss(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy, backward done chunk by chunk: [N, V] logits never exist at once."""
    leaf = hidden_NH.detach().requires_grad_()
    total = 0.0
    for hidden, labels in zip(leaf.split(FULL_CHUNK), labels_N.split(FULL_CHUNK), strict=True):
        loss = functional.cross_entropy(hidden @ weight_VH.T, labels, reduction="sum")
        (loss / len(labels_N)).backward()
        total += loss.item() / len(labels_N)
    # A term of value 0 that hands the collected gradient on to the blocks.
    return (hidden_NH * leaf.grad).sum() - (hidden_NH * leaf.grad).sum().detach() + total


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, stream: NDArray[np.int32]) -> float:
    """Mean next-token loss in nats over windows of LENGTH tokens."""
    windows = torch.from_numpy(stream[: len(stream) // LENGTH * LENGTH]).long().view(-1, LENGTH)
    losses = []
    for chunk in windows.split(2):
        logits = model(chunk).logits[:, :-1].flatten(0, 1)
        losses.append(functional.cross_entropy(logits, chunk[:, 1:].flatten()).item() * len(chunk))
    return sum(losses) / len(windows)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
