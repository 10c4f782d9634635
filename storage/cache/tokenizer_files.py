"""Keep a tokenizer's files in a cache, with the fingerprint that a dump would give it.

Reads `tokenizer.json` with the tokenizers library alone; `teacher_dump` has all of transformers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import xxhash

from decant.schemas import TokenizerInfo, tokenizer_fingerprint
from decant.schemas.same_tokenizer import CHOICES
from decant.storage.cache import kept_tokenizer, paths
from decant.storage.cache.kept_tokenizer import MAX_BYTES
from decant.storage.cache.reader import CacheReader
from decant.storage.files.scratch import scratch_folder
from decant.storage.files.store import Store

FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What `save_pretrained` of a tokenizer writes."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer of a local directory; has what `schemas.tokenizer_fingerprint` looks at."""

    folder: Path
    backend_tokenizer: tokenizers.Tokenizer
    special_tokens_map: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> "TokenizerFiles":
        """Load from a directory. Raises ValueError if it holds no `tokenizer.json`."""
        folder = Path(path).expanduser()
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"tokenizer {path}: no tokenizer.json there; expected a directory as "
                "AutoTokenizer.from_pretrained(...).save_pretrained(DIR) writes it"
            )
        for name in FILES:
            if (folder / name).is_file() and (folder / name).stat().st_size > MAX_BYTES:
                raise ValueError(f"{folder / name} has more than the {MAX_BYTES} bytes it may have")
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            special: dict[str, Any] = {}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (folder / name).is_file():
                    special |= json.loads((folder / name).read_text(encoding="utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the tokenizers library raises plain Exception, or panics
            raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
        if not backend.get_vocab_size():
            raise ValueError(f"tokenizer {path} has no tokens")
        tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in special.items()
            if key in CHOICES and value is not None
        }
        return cls(folder, backend, tokens)

    @classmethod
    def of_cache(cls, reader: CacheReader) -> "TokenizerFiles":
        """Load the one that is kept in a cache. Raises ValueError if it has no `tokenizer.json`."""
        store = Store(reader.url)
        with scratch_folder() as folder:
            kept_tokenizer.unpack(store, reader.manifest, Path(folder))
            return cls.read(folder)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.get_vocab().values()) + 1

    def save(self, store: Store) -> TokenizerInfo:
        """Copy the files into a cache and say what they are."""
        files = {}
        for name in FILES:
            if (self.folder / name).is_file():
                data = (self.folder / name).read_bytes()
                store.publish(f"{paths.TOKENIZER}/{name}", data)
                files[name] = xxhash.xxh3_128(data).hexdigest()
        return TokenizerInfo(fingerprint=tokenizer_fingerprint(self), files=files)
