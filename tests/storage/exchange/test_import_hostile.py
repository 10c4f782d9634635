"""Dumps of strangers: whatever they hold, one line that names the file, in bounded memory."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from decant.schemas import FormatError
from decant.storage.cache.pages import check_pages
from decant.storage.exchange.arrow_stream import unpacked_bytes
from decant.storage.exchange.bounds import FileBytes
from decant.storage.exchange.foreign import ForeignError
from decant.storage.exchange.importing import import_cache
from decant.storage.exchange.torch_files import read_tensors
from tests.support import ROOT, bombs
from tests.support.foreign import config, distillkit_rows, known_records, write

MEMORY = 3 << 30
"""Bytes of address space beyond what is loaded."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Little memory and time: what asks for more fails here, in place of taking the machine."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, give_up)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(source: Path, tmp_path: Path, file_format: str, match: str = "", **options: Any) -> str:
    """The one line with which it is refused; nothing is left."""
    with pytest.raises(ForeignError, match=match or None) as caught:
        import_cache(config(source, file_format, **options), tmp_path / "cache")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    return str(caught.value)


LINES = {
    "deep": b'{"a": ' + b"[" * 100_000,
    "a huge number": b'{"prompt_token_ids": [' + b"9" * 5000 + b"]}",
    "2^70 as an id": json.dumps(
        {"prompt_token_ids": [1, 2**70], "prompt_logprobs": [None, {"1": -0.1}]}
    ).encode(),
    "2^70 as a key": json.dumps(
        {"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {str(2**70): -0.1}]}
    ).encode(),
    "true as an id": json.dumps(
        {"prompt_token_ids": [True, 2], "prompt_logprobs": [None, {"1": -0.1}]}
    ).encode(),
    "infinity": b'{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"1": Infinity}]}',
    "text as a number": b'{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"1": "x"}]}',
    "lists that are none": b'{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, 7]}',
    "no text": b"\xff\xfe{}",
    "flat lists that end before they begin": json.dumps(
        {
            "prompt_token_ids": [1, 2],
            "prompt_logprobs": {
                "start_indices": [0, "x"],
                "end_indices": [0, None],
                "token_ids": [1],
                "logprobs": [-1.0],
            },
        }
    ).encode(),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_json(tmp_path: Path, name: str) -> None:
    """Depth, numbers, types: by file and line."""
    source = tmp_path / "dump.jsonl"
    source.write_bytes(LINES[name] + b"\n")
    assert "dump.jsonl" in refused(source, tmp_path, "vllm")


def test_one_long_list_makes_no_matrix(tmp_path: Path) -> None:
    """Ten thousand short lists beside a long one are a few lines, and not 10 GB."""
    long = {str(i): -9.0 for i in range(60_000)}
    lists = [None, long, *([{"1": -0.1}] * 10_000)]
    source = tmp_path / "dump.jsonl"
    line = {"prompt_token_ids": [1] * len(lists), "prompt_logprobs": lists}
    source.write_text(json.dumps(line) + "\n")
    refused(source, tmp_path, "vllm", "places in all", vocab_size=300_000)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_pipes_devices_and_links_are_not_opened(tmp_path: Path, suffix: str) -> None:
    """In a folder of files, by any name that is read."""
    folder = tmp_path / "dump"
    (tmp_path / "outside").write_bytes(b"x")
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(tmp_path / "outside"),
        lambda path: path.symlink_to(path),
        lambda path: path.mkdir(),
    ):
        folder.mkdir()
        name = f"data-00000{suffix}"
        make(folder / name)
        if suffix == ".arrow":
            (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        refused(folder, tmp_path, "vllm" if suffix == ".jsonl" else "distillkit")
        for file in folder.iterdir():
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        folder.rmdir()


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/hostname", 7, None])
def test_a_saved_dataset_names_its_own_files(tmp_path: Path, name: Any) -> None:
    """And none that lie elsewhere; nor is its description a pipe."""
    folder = tmp_path / "dump"
    folder.mkdir()
    (tmp_path / "outside.arrow").write_bytes(b"x")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    refused(folder, tmp_path, "distillkit", "outside of|not a saved dataset")
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    refused(folder, tmp_path, "distillkit", "no regular file")


def test_offsets_of_an_arrow_stream_are_looked_at(tmp_path: Path) -> None:
    """Lists that begin outside of their values are refused, and not read."""
    rows = distillkit_rows(known_records())
    table = pa.Table.from_pylist(rows)
    source = tmp_path / "dump.arrow"
    with pa.ipc.new_stream(str(source), table.schema) as stream:
        stream.write_table(table)
    data = source.read_bytes()
    offsets = np.cumsum([0, *(len(row["input_ids"]) for row in rows)]).astype("<i4").tobytes()
    assert offsets in data
    bad = np.frombuffer(offsets, "<i4").copy()
    bad[1:] += 1 << 28
    source.write_bytes(data.replace(offsets, bad.tobytes()))
    refused(source, tmp_path, "distillkit", "cannot be read as an Arrow stream")


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_stream_is_weighed_before_it_is_unpacked(
    tmp_path: Path, compression: str
) -> None:
    """It is read where it unpacks to what fits, and its own word is what is weighed."""
    rows = distillkit_rows(known_records())
    table = pa.Table.from_pylist([{**row, "zeros": [0] * 1000} for row in rows])
    source = tmp_path / "dump.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(source), table.schema, options=options) as stream:
        stream.write_table(table)
    import_cache(config(source), tmp_path / "good")
    assert list(unpacked_bytes(pa.memory_map(str(source)))) > [8000 * len(rows)]
    said, more = (8000 * len(rows)).to_bytes(8, "little"), (5 << 30).to_bytes(8, "little")
    data = source.read_bytes()
    assert said in data
    source.write_bytes(data.replace(said, more))
    refused(source, tmp_path, "distillkit", "batch 0 would unpack to 5")


@pytest.mark.parametrize("name", bombs.BOMBS)
def test_pages_of_parquet_are_weighed_before_they_are_unpacked(tmp_path: Path, name: str) -> None:
    """In the file itself, whatever its footer says of them."""
    source = tmp_path / "dump.parquet"
    source.write_bytes(bombs.BOMBS[name]())
    with (
        open(source, "rb") as file,
        pytest.raises(FormatError, match=r"values in|would unpack|by"),
    ):
        check_pages(FileBytes(file), 0, pq.read_metadata(source), 8 << 20, "x", strict=False)


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED, storage: bytes = b"\0" * 64) -> bytes:
    """A file of `torch.save` around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)
    return out.getvalue()


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("false",)


def tensor(size: str, stride: str, offset: str = "K\x00") -> bytes:
    """A pickle of one float tensor, with the codes of these fields."""
    kind = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    kind += b"X\x03\x00\x00\x00cpuK\x10tQ"
    parts = (offset, size, stride)
    fields = b"".join(part.encode("latin-1") for part in parts)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + kind + fields + b"\x89NtR."


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps(Evil()),
        b"\x80\x02K\x01r\xff\xff\xff\xff.",
        b"\x80\x02K\x01p99999999999\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        tensor("\x8a\x05\x00\x00\x00\x00\x40\x85", "K\x00\x85"),
        tensor("X\x01\x00\x00\x00x\x85", "K\x01\x85"),
        tensor("K\x04\x85", "K\x01\x85", "J\xff\xff\xff\xff"),
        tensor("K\x04", "K\x01\x85"),
        b"",
        b".",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 50_000,
    ],
)
def test_saved_tensors_run_and_claim_nothing(pickled: bytes) -> None:
    """No code, no memo of 2^32 places, no frame of 2^63 bytes, no tensor larger than its bytes."""
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        read_tensors(zipped(pickled))


def test_saved_tensors_are_not_compressed() -> None:
    """A bomb of zeros is no file of torch.save."""
    bomb = zipped(b".", zipfile.ZIP_DEFLATED, b"\0" * (1 << 23))
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(bomb)


def tar_of(member: Callable[[tarfile.TarFile], None], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member(tar)


def bytes_member(name: str, data: bytes) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    return add


def link_member(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("000000.pt.zst")
    info.type, info.linkname = tarfile.SYMTYPE, "000000.pt.zst"
    tar.addfile(info)


def bomb_of(size: int) -> bytes:
    """Zeros, compressed, whose frame does not say how many they are."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    block = b"\0" * (1 << 24)
    return b"".join(packer.compress(block) for _ in range(size >> 24)) + packer.flush()


@pytest.mark.parametrize(
    "member",
    [
        link_member,
        bytes_member("000000.pt.zst", b"no zstd"),
        bytes_member("000000.pt.zst", zstandard.compress(b"no zip")),
        bytes_member("_meta.json", b"[" * 100_000),
    ],
)
def test_tars_of_tensors(tmp_path: Path, member: Callable[[tarfile.TarFile], None]) -> None:
    """A link to itself, no zstd, no tensors, a description without end."""
    folder = tmp_path / "dump"
    folder.mkdir()
    tar_of(member, folder / "cp0_dp0__0.tar")
    np.save(tmp_path / "tokens.npy", np.ones((2, 4), np.int64))
    refused(folder, tmp_path, "megatron", tokens=str(tmp_path / "tokens.npy"))


@pytest.mark.slow
def test_a_bomb_in_a_tar(tmp_path: Path) -> None:
    """It is left before it has unpacked to more than the bound, or than the memory there is."""
    folder = tmp_path / "dump"
    folder.mkdir()
    tar_of(bytes_member("000000.pt.zst", bomb_of(5 << 30)), folder / "cp0_dp0__0.tar")
    np.save(tmp_path / "tokens.npy", np.ones((2, 4), np.int64))
    refused(folder, tmp_path, "megatron", tokens=str(tmp_path / "tokens.npy"))


def test_tokens_that_are_no_array(tmp_path: Path) -> None:
    """An archive, a pickle, more numbers than bytes, a pipe."""
    folder = tmp_path / "dump"
    folder.mkdir()
    tar_of(bytes_member("000000.pt.zst", b"x"), folder / "cp0_dp0__0.tar")
    tokens = tmp_path / "tokens.npy"
    np.savez(tmp_path / "many.npz", a=np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "short.npy", np.ones((2, 4), np.int64))
    short = (tmp_path / "short.npy").read_bytes().replace(b"(2, 4)", b"(9, 9)")
    for data in (
        (tmp_path / "many.npz").read_bytes(),
        (tmp_path / "objects.npy").read_bytes(),
        short,
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"",
    ):
        tokens.write_bytes(data)
        refused(folder, tmp_path, "megatron", tokens=str(tokens))
    tokens.unlink()
    os.mkfifo(tokens)
    refused(folder, tmp_path, "megatron", tokens=str(tokens))


def test_a_header_of_llamacpp_is_held_to_the_file(tmp_path: Path) -> None:
    """Also where the file has as many bytes as it claims, all of them a hole."""
    source = tmp_path / "base.kld"
    for n_ctx, n_vocab, n_chunk in ((2**31 - 1,) * 3, (4, 2**31 - 1, 1), (-1, -1, -1)):
        header = b"_logits_" + np.array([n_ctx, n_vocab, n_chunk], "<i4").tobytes()
        with open(source, "wb") as file:
            file.write(header)
            if n_ctx == 4:
                file.truncate(20 + 16 + 2 * (4 + 2 * ((n_vocab + 1) // 2)))
        refused(source, tmp_path, "llamacpp", vocab_size=0)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
CODECS = {
    "a bomb of aliases": BOMB,
    "a list": "[" + BOMB.splitlines()[0].removeprefix("a: &a ") + "]",
    "deep": "[" * 2000,
    "a tag": "!!python/object/apply:os.system ['false']",
    "k of 2^40": "{d: 1, k: 1099511627776, exact_k: 0, residual_bins: []}",
    "k of text": "{d: 60, k: x, exact_k: 0, residual_bins: []}",
    "bins of numbers": "{d: 60, k: 8, exact_k: 0, residual_bins: [1, 2]}",
    "bins of null": "{d: 60, k: 8, exact_k: 7, residual_bins: [{scale_dtype: [], element_bits: 1, "
    "num_elements: 1}]}",
    "powers of 10^9": "{d: 60, k: 8, exact_k: 0, residual_bins: [], polynomial_terms: [1e9]}",
    "a power of 10^9": "{d: 60, k: 8, exact_k: 0, residual_bins: [], polynomial_terms: [999999]}",
    "terms that are lists": "{d: 60, k: 8, exact_k: 0, residual_bins: [], polynomial_terms: [[1]]}",
    "a degree of 2^40": "{k: 8, exact_k: 0, vocab_size: 60, polynomial_degree: 1099511627776}",
    "a dtype that is a list": "{d: 60, k: 8, exact_k: 8, residual_bins: [], exact_dtype: [x]}",
}


@pytest.mark.parametrize("name", CODECS)
def test_settings_of_a_codec(tmp_path: Path, name: str) -> None:
    """Found beside the rows, where nobody named them."""
    folder = tmp_path / "dump"
    folder.mkdir()
    row = {"input_ids": [1, 2], "compressed_logprobs": [[1]], "bytepacked_indices": [[1]]}
    write(folder / "dump.parquet", [row])
    (folder / "compression_config.yaml").write_text(CODECS[name])
    refused(folder, tmp_path, "distillkit")


FUZZ = """
import random, sys
from pathlib import Path
from decant.storage.exchange.importing import import_cache
from tests.support import foreign, foreign_files
folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
records = foreign.known_records()
generator = random.Random(seed)
sources = {
    "distillkit": foreign.write(folder / "d.parquet", foreign.distillkit_rows(records)),
    "axolotl": foreign.write(folder / "a.jsonl", foreign.axolotl_object_rows(records)),
    "vllm": foreign_files.json_lines(folder / "v.jsonl", foreign_files.vllm_outputs(records)),
    "trl": foreign_files.json_lines(folder / "t.jsonl", [foreign_files.trl_binary(records)]),
    "tinker": foreign_files.json_lines(folder / "k.jsonl", foreign_files.tinker_prompts(records)),
}
words = [b"null", b"-1", b"9" * 30, b"[]", b"{}", b"NaN", b'"x"', b"true", b"1e400", b"\\xff"]
for number in range(count):
    name = generator.choice(list(sources))
    data = sources[name].read_bytes()
    at = generator.randrange(len(data))
    new = generator.choice([bytes([generator.randrange(256)]), generator.choice(words)])
    source = folder / f"case{sources[name].suffix}"
    source.write_bytes(data[:at] + new + data[at + generator.choice([0, 1, 4]):])
    target = folder / f"cache-{number}"
    try:
        import_cache(foreign.config(source, name, unknown_label="bound"), target)
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1, repr(error)
        assert not target.exists()
"""


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_changed_bytes_of_any_format(tmp_path: Path, count: int) -> None:
    """They are imported as what they say then, or refused in one line that names the file."""
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path), "0", str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
