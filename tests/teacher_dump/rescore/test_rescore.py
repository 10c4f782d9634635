"""The sequences of a cache are scored again: the same tokens, targets and ids, other numbers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.teacher_dump import DumpConfig, dump
from tests.support import models
from tests.support.commands import command
from tests.support.dumps import change, save_records


def sequences(url: Path) -> list[tuple[str, bytes, bytes, str | None]]:
    """Sample id, tokens, targets and conversation of each."""
    return [
        (s.sample_id, s.input_ids.tobytes(), s.is_target.tobytes(), s.messages)
        for s in CacheReader(url)
    ]


@pytest.fixture(scope="module")
def chats(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of conversations, in several shards; never write to it."""
    folder = tmp_path_factory.mktemp("chats")
    records = [
        {
            "id": f"r {i}",
            "messages": [
                {"role": "user", "content": " ".join(models.WORDS[: 3 + i % 4])},
                {"role": "assistant", "content": "lazy dog " * i},
            ],
        }
        for i in range(1, 8)
    ]
    path = save_records(folder / "records.jsonl", *records)
    config = change(dump_config, "source.path", str(path))
    dump(dataclasses.replace(config, output=str(folder / "cache"), temperatures=[1.0]))
    return folder / "cache"


def test_rescoring_changes_what_was_asked_for_alone(chats: Path, tmp_path: Path) -> None:
    """Another k: tokens, masks, ids and shards stay; what both keep is the same."""
    words = ("rescore", str(chats), str(tmp_path / "new"), "--k", "24")
    planned = command("decant", *words, "--dry-run")
    assert planned.code == 0 and not (tmp_path / "new").exists(), planned.stderr
    done = command("decant", *words)
    assert done.code == 0, done.stderr
    assert sequences(tmp_path / "new") == sequences(chats) and sequences(chats)[0][3]
    old, new = CacheReader(chats), CacheReader(tmp_path / "new")
    assert verify(tmp_path / "new").ok
    assert new.manifest.truncation == Truncation(k=24)
    assert new.manifest.temperatures == old.manifest.temperatures
    assert [p.num_sequences for p in new.plan] == [p.num_sequences for p in old.plan]
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(b.token_ids[:, :16], a.token_ids)
        np.testing.assert_allclose(b.logprobs[:, :16], a.logprobs, atol=1e-4)  # type: ignore[index]
    lineage = new.manifest.source["lineage"]
    assert lineage["operation"] == "rescore"
    assert lineage["from"][0]["cache_id"] == old.manifest.cache_id
    again = command("decant", *words)
    assert again.code == 0 and "complete already" in again.stderr


def test_temperatures_are_added(chats: Path, dump_config: DumpConfig, tmp_path: Path) -> None:
    """As a dump at both would have stored them; not one that is there, not by another teacher."""
    words = ("add-temperature", str(chats), str(tmp_path / "new"), "--temperature")
    done = command("decant", *words, "2")
    assert done.code == 0, done.stderr
    new = CacheReader(tmp_path / "new")
    assert new.manifest.temperatures == (1.0, 2.0)
    assert sequences(tmp_path / "new") == sequences(chats)
    origin = CacheReader(chats).manifest.source["path"]
    config = change(dump_config, "source.path", origin)
    dump(dataclasses.replace(config, output=str(tmp_path / "both"), temperatures=[1.0, 2.0]))
    for a, b in zip(CacheReader(tmp_path / "both"), new, strict=True):
        for name, value in a.known().items():
            np.testing.assert_allclose(b.known()[name], value, atol=1e-5, err_msg=name)
    there = command("decant", *words, "1")
    assert there.code == 2 and "is stored already" in there.stderr
    models.save_teacher(tmp_path / "other", seed=7)
    out = str(tmp_path / "hot")
    words = ("add-temperature", str(chats), out, "--temperature", "3", "--teacher")
    other = command("decant", *words, str(tmp_path / "other"))
    assert other.code == 2 and "another teacher than that of" in other.stderr
    assert not Path(out).exists()


def test_a_teacher_of_another_tokenizer_is_refused(
    chats: Path, other_teacher_path: Path, tmp_path: Path
) -> None:
    """Its ids mean other texts."""
    words = ("rescore", str(chats), str(tmp_path / "new"), "--teacher", str(other_teacher_path))
    done = command("decant", *words)
    assert done.code == 2 and "are of another tokenizer" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_cache_is_a_source_like_any_other(
    chats: Path, dump_config: DumpConfig, tmp_path: Path
) -> None:
    """Found by its manifest; `limit` reads its first sequences, other options are refused."""
    config = change(change(dump_config, "source.path", str(chats)), "source.limit", 5)
    dump(dataclasses.replace(config, output=str(tmp_path / "five")))
    assert sequences(tmp_path / "five") == sequences(chats)[:5]
    bad = change(config, "source.split", "test")
    with pytest.raises(ValueError, match=r"have no effect on .* a cache"):
        dump(dataclasses.replace(bad, output=str(tmp_path / "bad")))
    manifest = json.loads((tmp_path / "five" / "manifest.json").read_text())
    assert manifest["source"]["path"] == str(CacheReader(chats).manifest.source["path"])
