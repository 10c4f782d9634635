"""Claims about the teacher's tokenizer: it is what its file says, here and in the cache."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from decant.schemas import TokenizerInfo, tokenizer_fingerprint
from decant.schemas.tokenizer import PROBES, has_fingerprint
from decant.storage import CacheReader, Store
from decant.storage.cache import paths
from decant.storage.files.sealed import publish_json
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.inputs.config import SequenceConfig, SourceConfig
from decant.teacher_dump.job.run import dump
from decant.teacher_dump.job.start import ConfigChanged
from decant.teacher_dump.tokenizer import load_tokenizer, save_tokenizer, shared_vocab_size
from tests.support import models as teachers

TEXT = "hello there what is two plus two"
CLASSES = {
    "LlamaTokenizerFast": LlamaConfig,
    "LlamaTokenizer": Qwen2Config,
    "GemmaTokenizer": LlamaConfig,
    "GPT2Tokenizer": LlamaConfig,
    "Qwen2Tokenizer": Qwen2Config,
    "PreTrainedTokenizerFast": Qwen2Config,
    "TokenizersBackend": LlamaConfig,
    "Unheard": LlamaConfig,
    "": LlamaConfig,
}
"""A class in tokenizer_config.json -> a model beside it."""


def backend(*, bos: bool = True) -> Tokenizer:
    """The shape of DeepSeek's tokenizer.json: a byte-level BPE behind a split of digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = ByteLevel()
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=295,
            special_tokens=["<s>", "</s>", "<|user|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    frame = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trim = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trim, frame]) if bos else trim
    return tokenizer


def save(folder: Path, name: str, *, bos: bool = True, **config: Any) -> str:
    """Save a tokenizer that says it is of this class, and a model's configuration beside it."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend(bos=bos), bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = "{{ messages[0].content }}"
    wrapped.save_pretrained(folder)
    CLASSES.get(name, LlamaConfig)().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k != "backend"}
    settings |= {"tokenizer_class": name, **config}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v != ""}))
    return str(folder)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_the_file_decides_whatever_the_class(tmp_path, name, bos, caplog):
    """No class loses spaces, adds tokens, or takes or leaves the bos of tokenizer.json."""
    folder = save(tmp_path / "t", name, bos=bos, add_bos_token=not bos, legacy=True)
    exact = backend(bos=bos)
    tokenizer = load_tokenizer(folder)
    for text in (*PROBES, "a<|user|>b </s> c"):
        ids = tokenizer(text)["input_ids"]
        assert ids == exact.encode(text).ids
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.get_vocab() == exact.get_vocab(with_added_tokens=True)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    if name == "LlamaTokenizerFast":
        assert "otherwise than its tokenizer.json" in caplog.text
        assert "hellotherewhatis" in caplog.text


@pytest.mark.parametrize("name", CLASSES)
def test_the_copy_in_a_cache_is_the_same(tmp_path, name):
    """What is saved loads as the same tokenizer, by transformers alone."""
    tokenizer = load_tokenizer(save(tmp_path / "t", name))
    info = save_tokenizer(Store(str(tmp_path / "cache")), tokenizer)
    assert info.fingerprint == tokenizer_fingerprint(tokenizer)
    copy = AutoTokenizer.from_pretrained(tmp_path / "cache/tokenizer")
    assert has_fingerprint(copy, info.fingerprint)
    assert copy(TEXT)["input_ids"] == backend().encode(TEXT).ids


def test_lengths_in_the_file_cut_nothing(tmp_path):
    """A tokenizer.json that was saved with truncation and padding gives whole texts."""
    folder = save(tmp_path, "PreTrainedTokenizerFast")
    cutting = Tokenizer.from_file(f"{folder}/tokenizer.json")
    cutting.enable_truncation(4)
    cutting.enable_padding(length=9)
    cutting.save(f"{folder}/tokenizer.json")
    assert load_tokenizer(folder)(TEXT)["input_ids"] == backend().encode(TEXT).ids


def test_files_beside_the_tokenizer_add_tokens(tmp_path):
    """A token that only the configuration names is added behind the others, with its id."""
    folder = save(tmp_path, "LlamaTokenizerFast", pad_token="[PAD]")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == len(backend().get_vocab()) == len(tokenizer) - 1
    assert tokenizer("a[PAD]", add_special_tokens=False)["input_ids"][-1] == tokenizer.pad_token_id
    assert tokenizer(TEXT)["input_ids"] == backend().encode(TEXT).ids


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    """Without any file, or with a damaged one, in one line."""
    with pytest.raises(ValueError, match=r"no tokenizer in .*set teacher\.tokenizer to its path"):
        load_tokenizer(str(tmp_path))
    folder = save(tmp_path, "PreTrainedTokenizerFast")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(folder)


# Fingerprints


def test_a_fingerprint_covers_all_that_turns_text_into_ids():
    """Normaliser, pre-tokenizer, post-processor, decoder and flags of added tokens count."""
    found = {}
    for part, change in {
        "nothing": lambda t: None,
        "normalizer": lambda t: setattr(t, "normalizer", normalizers.NFC()),
        "pre_tokenizer": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(False)),
        "post_processor": lambda t: setattr(t, "post_processor", processors.ByteLevel()),
        "decoder": lambda t: setattr(t, "decoder", None),
        "added": lambda t: t.add_special_tokens([AddedToken("<|user|>", rstrip=True)]),
    }.items():
        changed = backend()
        change(changed)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=changed, bos_token="<s>")
        found[part] = tokenizer_fingerprint(wrapped)
        older = tokenizer_fingerprint(wrapped, like="sha256:")
        assert (
            older.startswith("sha256:") and "v2_" not in older and has_fingerprint(wrapped, older)
        )
        assert has_fingerprint(wrapped, found[part])
    assert len(set(found.values())) == len(found)
    again = PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>")
    assert tokenizer_fingerprint(again) == found["nothing"]
    again.backend_tokenizer.enable_truncation(7)
    assert tokenizer_fingerprint(again) == found["nothing"]


def config_of(tmp_path: Path, teacher: Path, *records: dict, **sequences: Any) -> DumpConfig:
    """A dump of the records into tmp_path/cache."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=TeacherConfig(path=str(teacher), device="cpu", dtype="float32"),
        source=SourceConfig(path=str(source)),
        sequences=SequenceConfig(max_length=64, **sequences),
    )


def test_spaces_reach_the_cache(tmp_path):
    """A Llama by its configuration with a byte-level tokenizer is read with its spaces."""
    teachers.build_model(vocab_size=300).save_pretrained(tmp_path / "teacher")
    save(tmp_path / "teacher", "LlamaTokenizerFast", legacy=True, add_bos_token=True)
    teachers.build_model(vocab_size=300).config.save_pretrained(tmp_path / "teacher")
    dump(config_of(tmp_path, tmp_path / "teacher", {"text": TEXT}))
    (sequence,) = CacheReader(tmp_path / "cache")
    assert sequence.input_ids.tolist() == [*backend().encode(TEXT).ids, 1]
    assert backend().decode(sequence.input_ids.tolist()) == TEXT


def test_a_cache_of_the_older_fingerprint_goes_on(tmp_path, teacher_path):
    """A rerun compares in the cache's own scheme; another tokenizer is refused all the same."""
    config = config_of(tmp_path, teacher_path, {"text": "the quick fox"})
    manifest = dump(config)
    older = tokenizer_fingerprint(teachers.build_tokenizer(), like="sha256:0")
    assert manifest.tokenizer.fingerprint.startswith("sha256:v2_")
    assert older.startswith("sha256:") and not older.startswith("sha256:v2_")
    rewrite_fingerprint(tmp_path / "cache", older)
    assert dump(config).tokenizer.fingerprint == older
    teachers.build_tokenizer(280).save_pretrained(tmp_path / "other")
    teacher = dataclasses.replace(config.teacher, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ConfigChanged, match=rf"tokenizer\.fingerprint: the cache has '{older}'"):
        dump(dataclasses.replace(config, teacher=teacher))


def rewrite_fingerprint(cache: Path, fingerprint: str) -> None:
    """Let a cache, of which nothing is scored, say that its tokenizer has this fingerprint."""
    store = Store(str(cache))
    manifest = CacheReader(cache).manifest
    info = TokenizerInfo(fingerprint=fingerprint, files=manifest.tokenizer.files)
    changed = dataclasses.replace(manifest, tokenizer=info, cache_id="", records=None, totals=None)
    changed = dataclasses.replace(changed, cache_id=changed.identity_hash())
    publish_json(store, paths.MANIFEST, changed.to_json())
    for folder in (paths.SHARDS, paths.RECORDS):
        store.remove_folder(folder)


# Ids beyond the model's rows


def test_added_tokens_may_lie_beyond_the_rows(tmp_path, caplog):
    """The shared vocabulary is the smaller; a record that holds such a token is named."""
    tokenizer = teachers.build_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    teachers.build_model(vocab_size=rows).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with caplog.at_level(logging.INFO):
        manifest = dump(config_of(tmp_path, tmp_path / "teacher", {"text": "the fox"}))
    assert manifest.shared_vocab_size == rows
    assert f"{rows} output rows, its tokenizer 1 added tokens beyond them (<image>)" in caplog.text
    config = config_of(tmp_path, tmp_path / "teacher", {"id": "i", "text": "the fox <image>"})
    with pytest.raises(ValueError, match=rf"sample 'i' has token id {rows} at position 4"):
        dump(dataclasses.replace(config, output=str(tmp_path / "other")))


def test_other_ids_beyond_the_rows_are_refused():
    """A vocabulary that is larger than the model belongs to another one."""
    tokenizer = teachers.build_tokenizer()
    assert shared_vocab_size(tokenizer, 320, "t") == shared_vocab_size(tokenizer, 300, "t") == 300
    assert shared_vocab_size(None, 320, "t") == 320
    with pytest.raises(ValueError, match="ids up to 299, the teacher t only 290 output rows"):
        shared_vocab_size(tokenizer, 290, "t")
