"""Write the student as a training begins with it, `student.from_teacher`, to compare it with.

Some of the teacher's layers, everything else as it is: embeddings, head, tokenizer and template
stay the teacher's.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from decant.storage.files.durable import publish
from decant.student_train.model.cut import cut as cut_layers


def cut(teacher: Path, student: Path, layers: Sequence[int]) -> int:
    """Write the teacher with these layers alone, in this order; returns its parameters.

    Raises ValueError for layers that the teacher does not have. `student` appears when it is whole.
    """
    model = cut_layers(AutoModelForCausalLM.from_pretrained(teacher), list(layers), 0)
    temporary = student.with_name(student.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(temporary)
    publish(temporary, student)
    return model.num_parameters()


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
