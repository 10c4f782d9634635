"""`decant align`: the figures of an alignment without a model."""

import json
from pathlib import Path

import pytest

from decant.storage import CacheReader
from decant.student_train.alignment.command import AlignArguments, run_align
from tests.support import alignments


def test_align_says_what_a_student_could_learn(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares that add up, of all targets of the cache; the same as JSON."""
    alignments.save(alignments.byte_level(310, digits=True), tmp_path)
    assert run_align(AlignArguments(url=str(cache), tokenizer=str(tmp_path), json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = ("one_to_one", "one_to_many", "many_to_one", "many_to_many")
    assert sum(found[kind] for kind in kinds) == found["chunks"] > 0
    assert found["targets"] == CacheReader(cache).manifest.num_targets
    assert found["sequences"] == len(CacheReader(cache)) and found["left_out"] == 0
    assert 0 < found["found_mass"] <= found["kept_mass"]
    run_align(AlignArguments(url=str(cache), tokenizer=str(tmp_path)))
    text = capsys.readouterr().out
    for part in ("1:1", "1:N", "M:1", "M:N", "of it has an event", "left out", "0 of"):
        assert part in text


def test_a_folder_without_a_tokenizer_is_refused(cache: Path, tmp_path: Path) -> None:
    """As there is nothing that says what its tokens are."""
    with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
        run_align(AlignArguments(url=str(cache), tokenizer=str(tmp_path)))
