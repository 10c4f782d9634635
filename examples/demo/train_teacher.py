"""Train the demo's tokenizer and teacher from scratch on local text: `make demo-teacher`.

A 4.5 M-parameter Llama and a 4,096-token byte-level BPE, trained on the standard library's sources
(held-out modules never). Writes fp16 safetensors, the tokenizer and `recipe.json` into one
directory that `from_pretrained` loads.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import torch
from corpus import documents
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCAB_SIZE = 4096
LENGTH = 256


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=[END])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, model_max_length=2 * LENGTH
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents, each after one end-of-text token, as one int16 stream."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream: list[int] = []
    for ids in encoded:
        stream.append(tokenizer.bos_token_id)
        stream.extend(ids)
    return torch.tensor(stream, dtype=torch.int16)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, stream: torch.Tensor, batch: int = 32) -> float:
    """Mean next-token loss in nats over windows of LENGTH tokens."""
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH).long()
    model.eval()
    losses = [
        model(input_ids=chunk, labels=chunk).loss.item() * len(chunk)
        for chunk in windows.split(batch)
    ]
    model.train()
    return sum(losses) / len(windows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="training time budget")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW takes a tenth")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_texts = [text for _, text in documents("train", "validation")]
    heldout_texts = [text for _, text in documents("heldout")]
    tokenizer = train_tokenizer(train_texts)
    train = token_stream(tokenizer, train_texts)
    heldout = token_stream(tokenizer, heldout_texts)
    print(f"{len(train):,} training tokens, {len(heldout):,} held-out tokens", flush=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=640,
            max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1 or p is model.lm_head.weight]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1),
        torch.optim.AdamW(others, lr=args.lr / 10, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lrs = [args.lr, args.lr / 10]
    params = sum(p.numel() for p in model.parameters())
    print(f"{params:,} parameters", flush=True)

    # The schedule follows the clock: the budget is time, so a slower machine trains fewer steps.
    generator = torch.Generator().manual_seed(args.seed)
    num_windows = (len(train) - 1) // LENGTH
    order = torch.randperm(num_windows, generator=generator)
    start = time.monotonic()
    budget_s = args.minutes * 60
    step = cursor = 0
    bar = tqdm(total=round(budget_s), unit="s")
    while (elapsed := time.monotonic() - start) < budget_s:
        progress = elapsed / budget_s
        warmup = min(1.0, (step + 1) / 100)
        decay = min(1.0, (1.0 - progress) / 0.5)
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * warmup * decay
        if cursor + args.batch > num_windows:
            order, cursor = torch.randperm(num_windows, generator=generator), 0
        rows = order[cursor : cursor + args.batch]
        cursor += args.batch
        offset = int(torch.randint(0, LENGTH, (1,), generator=generator))
        starts = (rows * LENGTH + offset).clamp(max=len(train) - LENGTH)
        ids = torch.stack([train[s : s + LENGTH] for s in starts.tolist()]).long()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update(round(time.monotonic() - start) - bar.n)
        if step % 200 == 0:
            tokens = step * args.batch * LENGTH
            heldout_now = heldout_loss(model, heldout)
            bar.write(f"step {step} tokens {tokens:,} loss {loss:.3f} heldout {heldout_now:.3f}")
            save(model, tokenizer, args.out)
    bar.close()

    save(model, tokenizer, args.out)
    final = heldout_loss(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32), heldout)
    tokens = step * args.batch * LENGTH
    recipe = {
        "command": f"python train_teacher.py --minutes {args.minutes:g} --batch {args.batch} "
        f"--lr {args.lr:g} --seed {args.seed}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "text": "standard library sources without tests; held-out modules by name hash",
        "training_tokens_seen": tokens,
        "epochs": round(tokens / len(train), 2),
        "parameters": params,
        "heldout_loss_nats": round(final, 4),
    }
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
