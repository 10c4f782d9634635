"""Cut a student from a teacher: some of its layers, everything else as it is.

The layers are renamed in the files alone, so that nothing is computed and no number changes.
Embeddings, head, tokenizer and chat template stay the teacher's.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from decant.storage.files.durable import publish

LAYER = re.compile(r"^model\.layers\.(\d+)\.")
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def cut(teacher: Path, student: Path, layers: Sequence[int]) -> int:
    """Write the teacher with these layers alone, in this order; returns its parameters.

    Raises ValueError for layers that the teacher does not have. `student` appears when it is whole.
    """
    config = json.loads((teacher / "config.json").read_text())
    there = config["num_hidden_layers"]
    if not layers or not set(layers) <= set(range(there)) or len(set(layers)) < len(layers):
        raise ValueError(f"{teacher} has layers 0 to {there - 1}, asked for {list(layers)}")
    new_index = {old: new for new, old in enumerate(layers)}
    tensors = {}
    for name, tensor in load_file(teacher / "model.safetensors").items():
        match = LAYER.match(name)
        if match is None:
            tensors[name] = tensor
        elif (old := int(match[1])) in new_index:
            tensors[f"model.layers.{new_index[old]}.{name[match.end() :]}"] = tensor
    config["num_hidden_layers"] = len(layers)
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][old] for old in layers]
    temporary = student.with_name(student.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED:
        if (teacher / name).exists():
            shutil.copy(teacher / name, temporary / name)
    publish(temporary, student)
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="counted from 0")
    args = parser.parse_args()
    parameters = cut(args.teacher, args.out, args.layers)
    print(f"{args.out}: layers {args.layers}, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
