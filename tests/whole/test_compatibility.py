"""What earlier code wrote goes on: caches, configs, unfinished dumps.

`tests/fixtures/version-3` holds a teacher, records, a `dump.yaml` and a `train.yaml`, and what the
first release's code made of them: a whole cache with the values it decoded from it (`cache.npz`), a
dump of which half the shards are done, and the losses of the training. It is never written again.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.storage import CacheReader, verify
from tests.support import FIXTURES
from tests.support.commands import command

NAMES = ("token_ids", "logprobs", "log_z", "log_tail", "label_logprob", "input_ids")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The fixture in a folder of its own."""
    return Path(shutil.copytree(FIXTURES / "version-3", tmp_path / "earlier"))


def decoded(cache: Path) -> dict[str, np.ndarray]:
    """All columns of a cache."""
    reader = CacheReader(cache)
    rows = [reader.read(group) for group in reader.row_groups()]
    return {name: np.concatenate([getattr(r, name) for r in rows]) for name in NAMES}


def test_an_earlier_cache_has_the_values_it_had(folder: Path) -> None:
    """Every decoded value is the one that the code of that time gave."""
    assert verify(folder / "cache").ok
    expected = np.load(folder / "cache.npz")
    for name, values in decoded(folder / "cache").items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_an_earlier_config_dumps_what_it_dumped(folder: Path) -> None:
    """The same tokens and targets, the same distributions to rounding."""
    done = command(
        "teacher_dump", "run", "--config", "dump.yaml", "--output", "again", folder=folder
    )
    assert done.code == 0, done.stderr
    expected = np.load(folder / "cache.npz")
    found = decoded(folder / "again")
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
    np.testing.assert_allclose(found["label_logprob"], expected["label_logprob"], atol=2e-4)
    np.testing.assert_allclose(found["log_tail"], expected["log_tail"], atol=2e-4)


def test_an_unfinished_dump_is_completed(folder: Path) -> None:
    """By the same command, in its own version of the format, to the values of the whole cache."""
    before = {path: path.read_bytes() for path in (folder / "unfinished/shards").iterdir()}
    done = command(
        "teacher_dump", "run", "--config", "dump.yaml", "--output", "unfinished", folder=folder
    )
    assert done.code == 0, done.stderr
    assert verify(folder / "unfinished").ok
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())
    expected = np.load(folder / "cache.npz")
    found = decoded(folder / "unfinished")
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
    np.testing.assert_allclose(found["label_logprob"], expected["label_logprob"], atol=2e-4)


def test_an_earlier_training_config_trains_as_it_did(folder: Path) -> None:
    """The same losses, step by step, and the same held-out figures."""
    done = command("student_train", "--config", "train.yaml", folder=folder)
    assert done.code == 0, done.stderr
    expected = json.loads((folder / "training.json").read_text())
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses, expected["loss"], rtol=1e-4)
    last = [line["heldout_ce"] for line in lines if "heldout_ce" in line][-1]
    np.testing.assert_allclose(last, expected["heldout_ce"][-1], rtol=1e-4)
