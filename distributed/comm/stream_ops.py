"""Words in memory that streams write and wait for, without a kernel: CUDA's driver, "Stream Memory Operations".

torch has no call to let a stream wait for a word, and its copies take ten times as long to launch as the driver's. With
four GPUs each rank sends eighteen transfers in a block, and waits for as many.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and _WRITE_VALUE_32
_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ
_WRITE_DEFAULT = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: everything before it on the stream is visible first

_ANYWHERE = 4  # CU_MEMORYTYPE_UNIFIED: the address says where
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

Word = tuple[int, int]
"""An address, and a 32-bit number."""
Rows = tuple[int, int]
"""The address of a first row, and the bytes from one row to the next."""


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("from_x", ctypes.c_size_t), ("from_y", ctypes.c_size_t), ("from_kind", ctypes.c_int),
        ("from_host", ctypes.c_void_p), ("from_device", ctypes.c_uint64), ("from_array", ctypes.c_void_p),
        ("from_pitch", ctypes.c_size_t),
        ("to_x", ctypes.c_size_t), ("to_y", ctypes.c_size_t), ("to_kind", ctypes.c_int),
        ("to_host", ctypes.c_void_p), ("to_device", ctypes.c_uint64), ("to_array", ctypes.c_void_p),
        ("to_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t), ("rows", ctypes.c_size_t),
    )  # fmt: skip


class _Bytes:
    """Bytes on a device in the form in which torch takes memory from other libraries (`__cuda_array_interface__`).

    The bytes are given back with the last tensor that views them.
    """

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}


class StreamMemoryError(RuntimeError):
    """The CUDA driver has no stream memory operations, or refused one."""


class StreamMemory:
    """Stream memory operations and copies of the CUDA driver (libcuda). Streams are given by their handles.

    Raises:
        StreamMemoryError: there is no driver, or one from before CUDA 11.7.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._batch, self._copy = library.cuStreamBatchMemOp_v2, library.cuMemcpy2DAsync_v2
            self._allocate, self._free = library.cuMemAlloc_v2, library.cuMemFree_v2
            self._mapped = library.cuMemHostGetDevicePointer_v2
        except (OSError, AttributeError) as error:
            raise StreamMemoryError(f"the CUDA driver has no stream memory operations ({error})") from error
        self._batch.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
        self._batch.restype = ctypes.c_int
        self._copy.argtypes = (ctypes.POINTER(_Copy), ctypes.c_void_p)
        self._copy.restype = ctypes.c_int
        self._allocate.argtypes = (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t)
        self._free.argtypes = (ctypes.c_uint64,)
        self._mapped.argtypes = (ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint)

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Bytes [nbytes] on the current device, allocated by the driver and not by torch's allocator.

        Raises:
            torch.OutOfMemoryError: the device has too few bytes.
        """
        address = ctypes.c_uint64()
        code = self._allocate(ctypes.byref(address), nbytes)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes / 2**20:.2f} MiB.")
        self._check(code)
        there = _Bytes(address.value, nbytes)
        weakref.finalize(there, self._free, address.value).atexit = False
        return torch.as_tensor(there, device=device)

    def address_of(self, host: int) -> int:
        """The address by which devices reach page-locked memory of the host; `host` is its address in this process."""
        address = ctypes.c_uint64()
        self._check(self._mapped(ctypes.byref(address), host, 0))
        return address.value

    def copy(self, stream: int, to: Rows, source: Rows, width: int, rows: int) -> None:
        """Copy `rows` rows of `width` bytes by a copy engine, between GPUs or page-locked memory of the host."""
        copy = _Copy(
            from_kind=_ANYWHERE, from_device=source[0], from_pitch=source[1],
            to_kind=_ANYWHERE, to_device=to[0], to_pitch=to[1], width=width, rows=rows,
        )  # fmt: skip
        self._check(self._copy(ctypes.byref(copy), stream))

    def write(self, stream: int, words: Sequence[Word]) -> None:
        """Write words, each an address and a number, once all that `stream` has to do so far is done."""
        self._do(stream, _WRITE, _WRITE_DEFAULT, words)

    def wait(self, stream: int, words: Sequence[Word]) -> None:
        """Let `stream` go on once every word has its number or, as a cyclic number, at most 2**31 more."""
        self._do(stream, _WAIT, _GREATER_OR_EQUAL, words)

    def _do(self, stream: int, operation: int, flags: int, words: Sequence[Word]) -> None:
        """Give `stream` one operation for each word, by one call of the driver.

        CUstreamBatchMemOpParams is a union of six 64-bit words.
        """
        numbers = [n for address, value in words for n in (operation, address, value, flags, 0, 0)]
        self._check(self._batch(stream, len(words), (ctypes.c_uint64 * len(numbers))(*numbers), 0))

    def _check(self, code: int) -> None:
        if code != 0:
            raise StreamMemoryError(f"the CUDA driver refused a stream memory operation (error {code})")
