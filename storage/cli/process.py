"""What every command's process does: exit codes, one clean line per error, interruption."""

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from decant.storage.cli.machine import is_a_library_s, refusal
from decant.storage.cli.terminal import escaped_lines

DONE, BAD_DATA, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

OUTPUT = "standard output"
"""As a file is named."""

GOES_ON = "what is committed stays; the same command goes on from there"
STARTS_OVER = "nothing is left behind; the same command starts over"
"""What a KeyboardInterrupt may say of the command it ended; by default that it goes on."""


def run(main: Callable[[list[str]], int]) -> None:
    """Run a command's `main` on the process's arguments and exit with its code.

    0 done, 1 the data is bad, 2 the user must change something (one line on stderr each; `--debug`
    anywhere adds the traceback), 130 interrupted.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    log = logging.StreamHandler()
    log.setFormatter(_Escaping("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    for library in ("httpx", "httpx2", "botocore", "aiobotocore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Of torchao, which transformers loads with every model: kernels of other devices.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not debug:
        sys.unraisablehook = _quietly
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, _EscapedOutput(sys.stdout))
    with _exit_codes(debug):
        code = main(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe is still handled
        sys.exit(code)


class _Escaping(logging.Formatter):
    """What is logged may quote a cache: nothing in it is obeyed by a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped_lines(super().format(record))


def _quietly(lost: Any) -> None:
    """Say nothing of a file that a destructor could not close: why it was left has been told."""
    if not issubclass(lost.exc_type, OSError):
        sys.__unraisablehook__(lost)


class _EscapedOutput:
    """An output on which nothing is obeyed by a terminal, whoever prints what of a cache."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def write(self, text: str) -> int:
        with _naming_output():
            self._output.write("\t".join(map(escaped_lines, text.split("\t"))))
        return len(text)

    def flush(self) -> None:
        with _naming_output():
            self._output.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), OUTPUT) from error


def libraries_on_stderr() -> contextlib.AbstractContextManager[Any]:
    """While this is held, what is printed goes to stderr: stdout is for a command's result."""
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def _exit_codes(debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted: {str(interrupt) or GOES_ON}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # who reads our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        is_told = isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MemoryError))
        if not (is_told or is_a_library_s(error)):
            raise
        _give_up_lost_output()
        if debug:
            traceback.print_exc()
        hint = "" if debug else "\n(--debug shows the traceback)"
        from decant.schemas.strict import FormatError, UnfitError  # heavy, and here at hand

        print(f"error: {escaped_lines(refusal(error))}{hint}", file=sys.stderr)
        is_damage = isinstance(error, FormatError) and not isinstance(error, UnfitError)
        sys.exit(BAD_DATA if is_damage else USER_ERROR)


def _give_up_lost_output() -> None:
    """Let go of what was printed and cannot be written: Python would complain once more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupt_on_terminate() -> None:
    """Treat SIGTERM, which batch systems send before they kill, like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)

    others = sys.unraisablehook

    def again(lost: Any) -> None:
        """Ask once more: an interrupt that strikes inside a destructor is swallowed there."""
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            others(lost)

    sys.unraisablehook = again
