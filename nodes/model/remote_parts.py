"""The transformer's modules as other packs see them: sizes are true, and what would be called or replaced is refused.

A node may look into ComfyUI's WanModel: read sizes and shapes of weights, call an embedding, replace a block's forward.
The modules are in the workers, so here each is a `RemotePart`, which answers what it can and refuses the rest. The
refusal is an AttributeError where Python asks for an attribute, so hasattr and getattr with a default work.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch

from ..common import refusals
from ..common.origin import asking_code

log = logging.getLogger(__name__)


class RemotePart(torch.nn.Module):
    """A module of the transformer that is in the workers.

    Args:
        path: the module's name below the transformer; "" for the transformer itself.
        tensors: the module's weights on the meta device, by their names below the module.
    """

    def __init__(self, path: str, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            part, dot, rest = name.partition(".")
            if dot:
                parts.setdefault(part, {})[rest] = tensor
        for name, value in {"_path": path, "_tensors": tensors, "_below": parts, "_made": {}}.items():
            object.__setattr__(self, name, value)

    def part(self, name: str) -> RemotePart | None:
        """The module `name` of this module; None where there is no such module."""
        if name in self._below and name not in self._made:
            tensors = self._below[name]
            names = {key.partition(".")[0] for key in tensors}
            kind = RemoteBlocks if names == {str(number) for number in range(len(names))} else RemotePart
            self._made[name] = kind(self._name(name), tensors)
        return self._made.get(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_made" not in vars(self):
            return super().__getattr__(name)
        tensor = self._tensors.get(name)
        found = tensor if tensor is not None else self.part(name)
        if found is None:
            try:
                return super().__getattr__(name)
            except AttributeError:
                pass
            refusals.refuse_part(self._name(name))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        kept = self.part(name)
        if kept is not None and value is kept:
            return  # put back by a node that had replaced it for a while
        if is_compiled(value):
            say_that_nothing_is_compiled()
        elif self._must_stay(name, value):
            refusals.refuse_object_patch(f"diffusion_model.{self._name(name)}")
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if not self._must_stay(name, None):
            super().__delattr__(name)

    def _must_stay(self, name: str, value: object) -> bool:
        """Whether a node that sets the attribute `name` to `value` wants to change what the module computes."""
        known = name in self._tensors or name in self._below or name == "__class__"
        return known or callable(value) or isinstance(value, torch.Tensor)

    def _name(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def forward(self, *_args: Any, **_options: Any) -> None:
        """Refuse to compute."""
        refusals.refuse_call(self._path)

    def compile(self, *_args: Any, **_options: Any) -> None:
        """Do nothing, and say so."""
        say_that_nothing_is_compiled()

    def register_forward_hook(self, *args: Any, **options: Any) -> Any:
        """Refuse code that would run behind a module of the transformer."""
        if self._path:
            refusals.refuse_object_patch(f"diffusion_model.{self._path}")
        return super().register_forward_hook(*args, **options)

    def register_forward_pre_hook(self, *args: Any, **options: Any) -> Any:
        """Refuse code that would run in front of a module of the transformer."""
        if self._path:
            refusals.refuse_object_patch(f"diffusion_model.{self._path}")
        return super().register_forward_pre_hook(*args, **options)

    def load_state_dict(self, *_args: Any, **_options: Any) -> Any:
        """Refuse weights."""
        refusals.refuse_weights()

    def state_dict(self, *_args: Any, destination: Any = None, prefix: str = "", **_options: Any) -> Any:
        """The names and shapes of the weights as tensors on the meta device, which LoRA loaders look up."""
        destination = {} if destination is None else destination
        destination.update((prefix + name, tensor) for name, tensor in self._tensors.items())
        return destination

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights by name, on the meta device. None without `recurse`, by which ComfyUI asks what to load."""
        for name, tensor in self._tensors.items() if recurse else ():
            yield f"{prefix}.{name}" if prefix else name, torch.nn.Parameter(tensor, requires_grad=False)

    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """The module and all below it by name. This module alone with a `memo`, as ComfyUI walks through the model."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name in self._below if memo is None else ():
            part = self.part(name)
            assert part is not None  # `_below` has it
            yield from part.named_modules(None, f"{prefix}.{name}" if prefix else name)

    def extra_repr(self) -> str:
        """What `repr` says of the module."""
        return f"{self._path or 'transformer'}, in the XDit+USP workers"


class RemoteBlocks(RemotePart):
    """A list of modules, such as the blocks."""

    def __len__(self) -> int:
        return len(self._below)

    def __iter__(self) -> Iterator[Any]:
        return (self.part(str(number)) for number in range(len(self)))

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


def is_compiled(value: object) -> TypeGuard[Any]:
    """Whether `value` is what torch.compile makes of a `RemotePart` or of one of its methods."""
    if type(value).__name__ == "OptimizedModule":  # the class that torch.compile makes; some packs patch its attributes
        inner = object.__getattribute__(value, "_modules").get("_orig_mod")
    else:
        inner = getattr(getattr(value, "_torchdynamo_orig_callable", None), "__self__", None)
    return isinstance(inner, RemotePart)


@functools.cache
def say_that_nothing_is_compiled() -> None:
    """Log, once in a process, that torch.compile has no effect."""
    asker = asking_code()
    log.warning(
        "torch.compile does nothing for this model%s: its transformer runs in the XDit+USP workers, and nothing was "
        "compiled. Remove the node that compiles it.",
        f" ({asker})" if asker else "",
    )
