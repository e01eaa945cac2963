"""Words in GPU memory that streams write and wait for, without a kernel: CUDA's driver, "Stream Memory Operations".

torch has no call for the waiting half, and its copies take ten times as long to launch as the driver's: with four GPUs
a block sends eighteen times.
"""

from __future__ import annotations

import ctypes

_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ
_WRITE_DEFAULT = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: everything before it on the stream is visible first


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
            self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
            self._copy = library.cuMemcpyDtoDAsync_v2
        except (OSError, AttributeError) as error:
            raise StreamMemoryError(f"the CUDA driver has no stream memory operations ({error})") from error
        for call in (self._write, self._wait):
            call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
            call.restype = ctypes.c_int
        self._copy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._copy.restype = ctypes.c_int

    def copy(self, stream: int, to: int, address: int, nbytes: int) -> None:
        """Copy between two places in the memory of GPUs, by a copy engine."""
        self._check(self._copy(to, address, nbytes, stream))

    def write(self, stream: int, address: int, value: int) -> None:
        """Write a 32-bit word once all that `stream` has to do so far is done."""
        self._check(self._write(stream, address, value, _WRITE_DEFAULT))

    def wait(self, stream: int, address: int, value: int) -> None:
        """Let `stream` go on once the word is `value` or, as a cyclic number, at most 2**31 more."""
        self._check(self._wait(stream, address, value, _GREATER_OR_EQUAL))

    def _check(self, code: int) -> None:
        if code != 0:
            raise StreamMemoryError(f"the CUDA driver refused a stream memory operation (error {code})")
