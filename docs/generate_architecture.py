"""Write the tree of `docs/architecture.md` from the packages' docstrings: run this file.

A test compares the page with what this gives, so the tree cannot differ from the code.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architecture.md")
PACKAGES = ("schemas", "storage", "teacher_dump", "student_train", "decant")
BEGIN, END = "<!-- tree: python docs/generate_architecture.py -->\n", "<!-- end of tree -->\n"


def first_sentence(path: Path) -> str:
    """What the docstring of a module says first."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", r"\|")


def rooms(package: Path) -> list[Path]:
    """The folders of a package that hold modules, the package itself first."""
    return sorted({path.parent for path in package.rglob("*.py") if not path.is_symlink()})


def tree() -> str:
    """A section per package, a table per room."""
    sections = []
    for name in PACKAGES:
        package = ROOT / name
        folders = rooms(package) if name != "decant" else [package]
        for folder in folders:
            level = "###" if folder == package else "####"
            rows = [
                f"| `{path.name}` | {first_sentence(path)} |"
                for path in sorted(folder.glob("*.py"))
                if path.name != "__init__.py"
            ]
            purpose = first_sentence(folder / "__init__.py")
            sections.append(f"{level} {folder.relative_to(ROOT)}/\n\n{purpose}\n")
            if rows:
                sections.append("\n".join(["| file | purpose |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(sections)


def page() -> str:
    """The text of `architecture.md` with today's tree."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + "\n" + tree() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
