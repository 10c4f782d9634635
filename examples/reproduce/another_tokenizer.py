"""Students of another tokenizer from one cache: what each way of training leaves, in bits per byte.

    make demo-real
    python -m examples.reproduce.another_tokenizer --steps 400 --seeds 0 1 2

Needs two caches of plain text by one teacher, to train on and held out (--train, --heldout): those
of `make demo-real` hold 47,000 and 8,000 targets of SmolLM2-135M-Instruct and are enough to try
this; figures worth quoting take a few million targets, so that no text is read often. A byte-level
BPE of each size in --vocab is trained on the text of the first cache. Small students of each learn
for equally many steps in four ways: cross-entropy alone (ce), the likelihood of chunks from a cache
of labels alone (labels), events with the forward KL (fkl), and these with half a cross-entropy
(both). The ceiling is the forward KL of a student of the teacher's own tokenizer (own). To compare
with, gold and gold-even train by the rule of `gold.py`, which ranks what has no counterpart.
Printed are bits per byte on held-out text, over all of it and over the tokens that hold digits, by
mean and spread.

With --student, a trained model goes on with its own tokenizer, as SmolLM2 with a part of its layers
from a cache of another family's teacher. The ceiling is then `--ways own` with --train a cache of
the same text by a teacher of that tokenizer, and the way none measures the student as it begins:

    python -m examples.real.cut_student --teacher SMOLLM2 --out CUT --layers 0 7 14 22 29
    python -m examples.reproduce.another_tokenizer --train CACHE --heldout CACHE --student CUT \
        --steps 40 --batch-size 4 --lr 2e-4 --ways none ce fkl both gold
"""

import argparse
import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from decant.schemas import Manifest, ScoredSequence, Truncation
from decant.storage import CacheReader
from decant.storage.cache import paths
from decant.storage.cache.plan import plan_of
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.storage.cache.writer import write_cache
from decant.storage.files.store import Store
from decant.student_train import (
    CacheStream,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.alignment.token_bytes import TokenTable
from decant.student_train.config.alignment import AlignConfig
from decant.student_train.data.heldout import heldout_batches
from decant.student_train.model.alignment import Alignment
from examples.reproduce.gold import WAYS as GOLD
from examples.reproduce.gold import train_gold

END = "<|endoftext|>"
WAYS = {
    "ce": LossConfig(kd_weight=0.0, ce_weight=1.0),
    "labels": LossConfig(kind="fkl"),
    "fkl": LossConfig(kind="fkl"),
    "both": LossConfig(kind="fkl", ce_weight=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", default="build/real/cache-text-train", help="a cache of text")
    parser.add_argument("--heldout", default="build/real/cache-text-heldout", help="another one")
    parser.add_argument("--out", type=Path, default=Path("build/reproduce/another-tokenizer"))
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 16384], help="sizes")
    parser.add_argument("--student", default="", help="a model to go on from, in place of BPEs")
    choices = [*WAYS, *GOLD, "own", "none"]
    parser.add_argument("--ways", nargs="+", choices=choices, default=[*WAYS, "own"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=256, help="size of the students")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    if "none" in args.ways and not args.student:
        parser.error("--ways none measures a --student as it begins: name one")
    args.out.mkdir(parents=True, exist_ok=True)
    labels = args.out / "cache-labels"
    if "labels" in args.ways and not (labels / "manifest.json").exists():
        labels_alone(args.train, labels)
    print(f"{'tokenizer':<12}{'way':<10}{'bits per byte':>16}{'on digits':>16}")
    for vocab, way in itertools.product([0] if args.student else args.vocab, args.ways):
        if way == "own" and vocab not in (0, args.vocab[0]):
            continue
        if way == "none":
            found = [bits(args.student, args.heldout)]
        else:
            found = [one(args, vocab, way, seed, labels) for seed in args.seeds]
        name = "its own" if args.student else "teacher's" if way == "own" else f"BPE {vocab:,}"
        shown = [spread([values[i] for values in found]) for i in range(2)]
        print(f"{name:<12}{way:<10}{shown[0]:>16}{shown[1]:>16}", flush=True)


def one(
    args: argparse.Namespace, vocab: int, way: str, seed: int, labels: Path
) -> tuple[float, float]:
    """Train one student; its bits per byte on held-out text, and on the digits in it."""
    own = way == "own"
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    if args.student:
        student = StudentConfig(path=args.student, tokenizer=args.student)
    elif own:
        student = StudentConfig(config=config)
    else:
        tokenizer = str(args.out / f"tokenizer-{vocab}")
        if not Path(tokenizer).exists():
            save_tokenizer(args.train, vocab, tokenizer)
        student = StudentConfig(config=config, tokenizer=tokenizer)
    output = args.out / f"{way}-{Path(args.student).name or vocab}-{seed}-{args.steps}"
    optimizer = OptimizerConfig(lr=args.lr, warmup_ratio=0.05)
    trained = output / "student"
    if way in GOLD:
        if not trained.exists():
            sizes = {"steps": args.steps, "batch_size": args.batch_size, "seed": seed}
            train_gold(way, args.train, trained, student, optimizer, **sizes)
        return bits(str(trained), args.heldout)
    mismatch = "refuse" if own else "align"
    train(
        TrainConfig(
            cache=str(labels if way == "labels" else args.train),
            output=str(output),
            student=student,
            tokenizer_mismatch=mismatch,
            loss=WAYS["fkl" if own else way],
            steps=args.steps,
            batch_size=args.batch_size,
            packing="rows",
            optimizer=optimizer,
            eval=EvalConfig(cache=args.heldout),
            plots=False,
            seed=seed,
        )
    )
    return bits(str(trained), args.heldout)


@torch.no_grad()
def bits(student: str, cache: str) -> tuple[float, float]:
    """Bits per byte on held-out text, and of the tokens in it that hold digits."""
    alignment = Alignment(StudentConfig(path=student), AlignConfig())
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    table = TokenTable.of(alignment.tokenizer, student)
    texts = [table.text_of(torch.tensor([i]).numpy()) for i in range(len(table))]
    has_digit = torch.tensor([any(48 <= byte < 58 for byte in text) for text in texts])
    lengths = torch.from_numpy(table.lengths)
    sums = torch.zeros(2, 2, dtype=torch.float64)  # bits and bytes, of all and of digits
    stream = CacheStream(cache, batch_size=8, **alignment.stream_options)
    for batch, _ in heldout_batches(stream):
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        logits = out.logits.flatten(0, 1)[batch.predictors]
        nats = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        found = torch.stack([nats / math.log(2), lengths[batch.labels]])
        sums += torch.stack([found.sum(1), found[:, has_digit[batch.labels]].sum(1)], 1)
    overall, of_digits = (sums[0] / sums[1].clamp(min=1)).tolist()
    return overall, of_digits


def save_tokenizer(cache: str, vocab: int, path: str) -> None:
    """A byte-level BPE of so many tokens, trained on the text of a cache."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    reader = CacheReader(cache)
    theirs = TokenizerFiles.of_cache(reader).backend_tokenizer
    texts = (theirs.decode(s.input_ids.tolist(), skip_special_tokens=True) for s in reader)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(path)


def labels_alone(cache: str, out: Path) -> None:
    """The same cache with the log prob of the actual token alone."""
    reader = CacheReader(cache)
    ours = reader.manifest
    for name in ours.tokenizer.files:
        file = f"{paths.TOKENIZER}/{name}"
        Store(out).publish(file, Store(cache).read(file))
    manifest = Manifest.draft(
        teacher=ours.teacher,
        tokenizer=ours.tokenizer,
        shared_vocab_size=ours.shared_vocab_size,
        truncation=Truncation(method="label"),
        temperatures=(1.0,),
        precision="compact",
        source=ours.source,
        sequences=ours.sequences,
    )
    sequences = [bare(sequence) for sequence in reader]
    write_cache(out, manifest, sequences, plan_of([sequences]))


def bare(sequence: ScoredSequence) -> ScoredSequence:
    """A sequence without its entries."""
    return dataclasses.replace(
        sequence,
        token_ids=sequence.token_ids[:, :0],
        logprobs=None,
        log_tail=None,
        log_z=sequence.log_z[:, :1],
        messages=None,
    )


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation of several."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
