"""The documentation cannot rot: its commands are run, its reference is generated, its links hold.

Every fenced block of `sh`, `bash` or `console` in the README and in docs/ is run in a folder that
has what the pages speak of: a tiny teacher, a student, texts, the files of `# name.yaml` blocks.
A block is left out only by an HTML comment above it, `<!-- not run: reason -->`.
"""

import ast
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from accelerate.commands.launch import launch_command_parser

from tests.support import ROOT, models
from tests.support.commands import command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<reason><!-- not run: [^>]+ -->\n)?^(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
COMMANDS = ("sh", "bash", "console")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    is_run: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order, without indentation."""
    return [
        Block(m["language"], textwrap.dedent(m["text"]), m["reason"] is None)
        for m in BLOCK.finditer(page.read_text())
    ]


def lines(block: Block) -> list[str]:
    """The commands of a block: continued lines joined, prompts, comments and output gone."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    shown = [line for line in text.splitlines() if line.strip()]
    if block.language == "console":
        shown = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    return [line for line in shown if shlex.split(line, comments=True)]


def with_commands() -> list[Path]:
    """Pages that have commands to run."""
    return [
        page
        for page in PAGES
        if any(block.is_run and block.language in COMMANDS for block in blocks(page))
    ]


def name(page: Path) -> str:
    """How a page is called in the names of tests."""
    return str(page.relative_to(ROOT))


def write_files(page: Path, folder: Path) -> set[str]:
    """Write the YAML blocks that start with `# file`; their names."""
    written = set()
    for block in blocks(page):
        first = block.text.split("\n")[0]
        if block.language == "yaml" and (file := re.fullmatch(r"# (\S+\.yaml)", first)):
            (folder / file[1]).write_text(block.text)
            written.add(file[1])
    return written


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README and guides take for granted, their first dump included."""
    folder = tmp_path_factory.mktemp("docs")
    models.save_teacher(folder / "path/or/hub-id", max_position_embeddings=2048)
    models.save_teacher(folder / "path/of/a/pretrained/student", max_position_embeddings=2048)
    (folder / "data").mkdir()
    words = models.WORDS * 2
    texts = "".join(
        json.dumps({"id": f"text-{i}", "text": " ".join(words[i % 7 : i % 7 + 4 + i % 5])}) + "\n"
        for i in range(160)  # so that 1 % held out are not none
    )
    (folder / "data/texts.jsonl.zst").write_bytes(zstandard.compress(texts.encode()))
    prompts = ('{"prompt": "the quick"}', '{"messages": [{"role": "user", "content": "a dog"}]}')
    (folder / "data/prompts.jsonl").write_text("\n".join(prompts))
    said = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "the fox"}]
    (folder / "data/chats.jsonl").write_text(json.dumps({"id": "chat-0", "messages": said}))
    more = [{"id": f"more-{i}", "text": " ".join(words[i : i + 6])} for i in range(4)]
    (folder / "data/more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    models.build_tokenizer().save_pretrained(folder / "DIR")
    write_foreign_dump(folder / "dump.parquet")
    write_files(ROOT / "docs/index.md", folder)
    done = command("teacher_dump", "run", "--config", "dump.yaml", folder=folder)
    assert done.code == 0, done.stderr
    return folder


def write_foreign_dump(path: Path) -> None:
    """A top-k dump as DistillKit writes it: list j is about token j + 1."""
    ids = list(range(10, 30))
    entries = [[token, 200, 201] for token in ids[1:]]
    values = [[math.log(0.5), math.log(0.2), math.log(0.1)] for _ in entries]
    columns = {"input_ids": [ids], "token_ids": [entries], "top_values": [values]}
    pq.write_table(pa.table(columns), path)


def run(line: str, folder: Path) -> None:
    """Run one command of a page to its end, with exit code 0."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":  # sets up environments: only that the target is there
        done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "decant":
        ended = command(*words, folder=folder)
        assert ended.code == 0, f"{line}\n{ended.stderr}"
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])  # refuses unknown options
        assert launched.module
        module, arguments = launched.training_script, launched.training_script_args
        ended = command(module, *arguments, folder=folder)  # alone, as one process would be
        assert ended.code == 0, f"{line}\n{ended.stderr}"
    elif words[0] == "python":
        done = subprocess.run(
            [sys.executable, ROOT / words[1], *words[2:]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    else:
        raise AssertionError(f"no test knows how to run: {line}")


@pytest.mark.parametrize("page", with_commands(), ids=name)
def test_the_commands_of_a_page_run(page: Path, prepared: Path, tmp_path: Path) -> None:
    """In the order of the page, each to exit code 0."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, symlinks=True)
    if "dump.yaml" in write_files(page, folder):
        shutil.rmtree(folder / "caches")
    for block in blocks(page):
        if block.is_run and block.language in COMMANDS:
            for line in lines(block):
                run(line, folder)


def test_few_commands_are_left_out() -> None:
    """Each with a reason that no test machine can meet."""
    left_out = [
        match["reason"].split("not run: ")[1].split(" -->")[0]
        for page in PAGES
        for match in BLOCK.finditer(page.read_text())
        if match["reason"] and match["language"] in COMMANDS
    ]
    assert len(left_out) <= 6
    assert all(re.search(r"GPU|cluster|environment", reason) for reason in left_out)


def test_the_reference_is_generated() -> None:
    """`docs/cli.md` is what `python docs/generate_cli.py` writes."""
    page = runpy.run_path(str(ROOT / "docs/generate_cli.py"))["page"]()
    assert page == (ROOT / "docs/cli.md").read_text(), "run: python docs/generate_cli.py"


def test_every_page_is_in_the_menu_and_every_link_leads_somewhere() -> None:
    """What `mkdocs build --strict` asks, as far as it can be asked without mkdocs."""
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_every_error_that_is_explained_exists() -> None:
    """Each heading of the FAQ that quotes an error quotes what the code says."""
    said = [
        node.value
        for package in ("schemas", "storage", "teacher_dump", "student_train")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r"^### `([^`]+)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 5
    for text in quoted:
        assert any(text in message for message in said), text


def test_the_tree_of_the_architecture_is_generated() -> None:
    """`docs/architecture.md` is what `python docs/generate_architecture.py` writes."""
    page = runpy.run_path(str(ROOT / "docs/generate_architecture.py"))["page"]()
    assert page == (ROOT / "docs/architecture.md").read_text(), (
        "run: python docs/generate_architecture.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    """Every path of a module or a test in the repository."""
    named = re.findall(
        r"\b(?:schemas|storage|teacher_dump|student_train|tests|benchmarks|examples)/[\w/.-]+\.\w+",
        page.read_text(),
    )
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing


SAMPLE = re.compile(r"<!-- sample of: (?P<command>[^>]+) -->\n```text\n(?P<text>.*?)```", re.DOTALL)


def labels(text: str) -> list[str]:
    """What stands before the figures of each line: its words up to two spaces or a digit."""
    found = (re.match(r"[^\d]*?(?=  |\d|:|$)", line.strip()) for line in text.splitlines()[1:])
    return [match[0].strip() for match in found if match and match[0].strip()]


@pytest.mark.parametrize("page", [p for p in PAGES if SAMPLE.search(p.read_text())], ids=name)
def test_sample_outputs_look_like_the_output(page: Path, prepared: Path) -> None:
    """Every line that a page shows of a command is one that the command prints today."""
    for sample in SAMPLE.finditer(page.read_text()):
        done = command(*shlex.split(sample["command"]), folder=prepared)
        assert done.code == 0, done.stderr
        missing = set(labels(sample["text"])) - set(labels(done.stdout))
        assert not missing, sample["command"]
