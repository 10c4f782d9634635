"""Claims about what a person sees while something long is going on."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from decant.teacher_dump.progress import duration, progress

PROGRAM = """
import logging, sys, time
from decant.teacher_dump.progress import progress
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
with progress("score", "targets", total=400) as bar:
    for shard in range(4):
        for _ in range(10):
            bar.add(10)
            time.sleep(0.03)
        logging.info("shard %d of 4 committed", shard + 1)
logging.info("complete")
"""


def test_lines_appear_whole_above_the_bar() -> None:
    """On a terminal, no line of the log shares a line with the bar, and the bar comes back."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs)
    os.close(theirs)
    data = bytearray()
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        data += block
    assert process.wait() == 0
    screen = [re.split("\r", line)[-1] for line in data.decode().split("\r\n")]
    for number in range(1, 5):
        assert f"shard {number} of 4 committed" in screen
    assert any(line.startswith("score: 100%") for line in screen), screen
    assert screen[-2:] == ["complete", ""]


def test_off_a_terminal_lines_say_rate_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at its time, and none in between."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    with progress("score", "targets", total=4000, initial=1000, every=0) as bar:
        bar.note("3 sequences")
        bar.add(1000)
    with progress("score", "targets", total=4000) as bar:
        bar.add(1000)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"score: 2,000 of 4,000 targets \(50%\), [\d,]+ targets/s, 0 s left; 3 sequences", line
    )


def test_what_comes_in_bursts_is_said_at_their_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of one, ten times as much would seem to be left as there is."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    with progress("score", "sequences", total=40, every=0.05) as bar:
        for _ in range(4):
            time.sleep(0.2)
            for _ in range(10):
                bar.add(1)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" sequences")[0] for line in lines] == [
        f"score: {done} of 40" for done in (10, 20, 30)
    ]


def test_without_a_total_the_rate_alone_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a source is tokenised; a total may come later."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    with progress("tokenise", "sequences", every=0) as bar:
        bar.to(7)
        bar.to(8, 16)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("tokenise: 7 sequences, ") and "left" not in first
    assert second.startswith("tokenise: 8 of 16 sequences (50%), ")


def test_durations_are_for_people() -> None:
    """In the unit that fits."""
    assert [duration(s) for s in (4, 90, 5400)] == ["4 s", "1.5 minutes", "1.5 hours"]
