"""Read the tensors of a `torch.save` file without torch, and without running anything of it.

Knows the zip form of dictionaries, lists and dense tensors of plain dtypes; refuses all else.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
}
DTYPES = {*STORAGES.values(), "uint16", "uint32", "uint64"}


UNREADABLE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError, OSError, ValueError),
    *(LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, NotImplementedError),
    *(RecursionError, RuntimeError),
)
"""What the two libraries raise on bytes that are no such file."""


class Tensor:
    """A dense tensor: its dtype as torch calls it, and its values."""

    def __init__(self, dtype: str, values: NDArray) -> None:
        self.dtype, self.values = dtype, values


class _Storage:
    """Bytes, and what they are of; "" if that is said elsewhere."""

    def __init__(self, dtype: str, data: bytes) -> None:
        self.dtype, self.data = dtype, data


def read_tensors(data: bytes) -> Any:
    """What was saved, with `Tensor` for tensors; bfloat16 is given as float32.

    Raises ValueError if it is anything but a file of `torch.save` with such contents.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_stored(archive, len(data))
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return _Unpickler(archive, pickled).load()
    except UNREADABLE as error:
        raise ValueError(f"no file of torch.save with plain tensors: {error}") from error


def _check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError for members that unpack to more than the file: torch compresses nothing."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise ValueError(f"its member {member.filename!r:.80} is compressed")


def _check_memo(pickled: bytes) -> None:
    """Raise UnpicklingError for a memo of more places than the stream has operations.

    The unpickler makes room up to the highest number of a place, which may be 2^32.
    """
    for operations, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        if "PUT" in operation.name and argument is not None and argument > operations:
            raise pickle.UnpicklingError(f"it puts something at place {argument} of its memo")


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        pickled = archive.read(name)
        _check_memo(pickled)
        super().__init__(io.BytesIO(pickled))
        self._archive, self._folder = archive, name.removesuffix("data.pkl")
        self._storages: dict[str, bytes] = {}
        order = self._folder + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise pickle.UnpicklingError("its bytes are big-endian")

    def find_class(self, module: str, name: str) -> Any:
        """The few names that tensors need."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_tensor_v3"),
        ):
            return _rebuilt
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return ""
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """The bytes of a storage."""
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        member = f"{self._folder}data/{key}"
        if member not in self._storages:
            self._storages[member] = self._archive.read(member)
        return _Storage(dtype, self._storages[member])


def _rebuilt(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool,
    _hooks: Any,
    dtype: Any = "",
    *_: Any,
) -> Tensor:
    name = storage.dtype or dtype
    if name not in DTYPES or len(size) != len(stride):
        raise pickle.UnpicklingError(f"it holds a tensor of {name!r}")
    kept = np.dtype("<u2" if name == "bfloat16" else name).newbyteorder("<")
    flat = np.frombuffer(storage.data, kept)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and not (offset >= 0 and min(stride, default=0) >= 0 and last < len(flat)):
        raise pickle.UnpicklingError(f"a tensor of {size} lies outside its {len(flat)} numbers")
    if math.prod(size) > len(flat):
        raise pickle.UnpicklingError(f"a tensor of {size} repeats its {len(flat)} numbers")
    steps = [step * kept.itemsize for step in stride]
    values = np.lib.stride_tricks.as_strided(flat[offset:], size, steps, writeable=False)
    if name == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return Tensor(name, values)
