"""The weights in one file of a model, memory-mapped: processes that read a file share its pages."""

from __future__ import annotations

import numpy
import torch
from safetensors import SafetensorError, safe_open

from ..base.regular_file import FileIdentity, changed, not_opened_again, open_regular, path_of
from ..base.tensor_info import TensorInfo

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MappedFile:
    """A file of a model, opened once. Tensors are read from the file that was opened, whatever has its name later.

    Args:
        gguf: whether the file is read as GGUF, not as safetensors.
        identity: what the file was when its header was read.

    Raises:
        CheckpointError: the file is gone, or is no longer the file of the header.
    """

    def __init__(self, path: str, gguf: bool, identity: FileIdentity):
        self._path, self._identity = path, identity
        self._file = open_regular(path)
        if FileIdentity.of(self._file) != identity:
            self._file.close()
            raise changed(path, "after its header was read")
        self._bytes = self._tensors = None
        if gguf:
            mapped = numpy.memmap(self._file, dtype=numpy.uint8, mode="c")  # "c": torch wants writable memory
            self._bytes = torch.from_numpy(mapped)
        else:
            try:
                self._tensors = safe_open(path_of(self._file), framework="pt", device="cpu")
            except SafetensorError as error:
                raise changed(path, "after its header was read") from error
            except OSError as error:
                raise not_opened_again(path) from error

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """A tensor as the file has it: a float tensor of GGUF in its shape, any other tensor of GGUF as its bytes,
        uint8 [nbytes].

        Raises:
            CheckpointError: the file has been written since its header was read.
        """
        self.check_unchanged()
        if self._tensors is not None:
            return self._tensors.get_tensor(info.key)
        assert self._bytes is not None
        data = self._bytes[info.offset : info.offset + info.nbytes]
        return data.view(_FLOATS[info.dtype]).view(info.shape) if info.dtype in _FLOATS else data

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file has been written since its header was read: tensors read before that may
        have changed, as they are mapped."""
        if not FileIdentity.of(self._file).has_content_of(self._identity):
            raise changed(self._path, "while it was in use")
