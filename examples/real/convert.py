"""Convert the GGUF file of `fetch.py` into a folder of safetensors that transformers loads.

The weights are dequantised: exact in float32, the same numbers that GGUF programs compute with.
The tokenizer is mended in one place: transformers reads vocabulary and merges from the file, but
not `tokenizer.ggml.pre`, which says how text is split before the merges.
"""

import argparse
import shutil
import sys
from pathlib import Path

from decant.storage.files.durable import publish
from examples.real.fetch import GGUF

PRE_TOKENIZER = "smollm"  # every digit alone, then GPT-2's rule


def convert(packages: Path, folder: Path) -> None:
    """Write model, tokenizer and chat template into `folder`, which appears when it is whole."""
    sys.path.append(str(packages))  # before transformers looks for gguf
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    gguf = packages / GGUF
    found = GGUFReader(gguf).fields["tokenizer.ggml.pre"].contents()
    if found != PRE_TOKENIZER:
        raise ValueError(
            f"{gguf}: tokenizer.ggml.pre is {found!r}, expected {PRE_TOKENIZER!r}: put that rule "
            "into convert.py"
        )
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    publish(temporary, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of fetch.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    args = parser.parse_args()
    convert(args.packages, args.out)
    print(f"{args.out}: the dequantised model, its tokenizer and its chat template")


if __name__ == "__main__":
    main()
