"""Words in GPU memory that streams write and wait for, without a kernel: CUDA's driver, "Stream Memory Operations".

torch has no call for the waiting half, and its copies take ten times as long to launch as the driver's: with four GPUs
a block sends eighteen times, and waits for as many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and _WRITE_VALUE_32
_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ
_WRITE_DEFAULT = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: everything before it on the stream is visible first

Word = tuple[int, int]
"""An address, and a 32-bit number."""


class StreamMemoryError(RuntimeError):
    """The driver cannot do it, or refused."""


class StreamMemory:
    """The calls of libcuda. Streams are given by their handles.

    Raises:
        StreamMemoryError: there is no driver, or one from before CUDA 11.7.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._batch, self._copy = library.cuStreamBatchMemOp_v2, library.cuMemcpyDtoDAsync_v2
        except (OSError, AttributeError) as error:
            raise StreamMemoryError(f"the CUDA driver has no stream memory operations ({error})") from error
        self._batch.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
        self._batch.restype = ctypes.c_int
        self._copy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._copy.restype = ctypes.c_int

    def copy(self, stream: int, to: int, address: int, nbytes: int) -> None:
        """Copy between two places in the memory of GPUs, by a copy engine."""
        self._check(self._copy(to, address, nbytes, stream))

    def write(self, stream: int, words: Sequence[Word]) -> None:
        """Write words once all that `stream` has to do so far is done."""
        self._do(stream, _WRITE, _WRITE_DEFAULT, words)

    def wait(self, stream: int, words: Sequence[Word]) -> None:
        """Let `stream` go on once every word has its number or, as a cyclic number, at most 2**31 more."""
        self._do(stream, _WAIT, _GREATER_OR_EQUAL, words)

    def _do(self, stream: int, operation: int, flags: int, words: Sequence[Word]) -> None:
        """One call for all of them. CUstreamBatchMemOpParams is a union of six 64-bit words."""
        numbers = [n for address, value in words for n in (operation, address, value, flags, 0, 0)]
        self._check(self._batch(stream, len(words), (ctypes.c_uint64 * len(numbers))(*numbers), 0))

    def _check(self, code: int) -> None:
        if code != 0:
            raise StreamMemoryError(f"the CUDA driver refused a stream memory operation (error {code})")
