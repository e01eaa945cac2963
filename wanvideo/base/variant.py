"""The base class of all Wan variants. Each variant is a class in a module of its own in wanvideo/variants/ and answers
everything that the rest of the program asks about the variant. See docs/adding-a-variant.md.

A model has the layers of any number of variants: an image-to-video model that also has the layers of another variant
is a model of both variants (see `WanConfig.variants`). This module needs no torch.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .shapes import Shapes
from .tensor_info import CheckpointError, TensorInfo

if TYPE_CHECKING:
    from .conditioning import Conditioning
    from .config import WanConfig

# How tensor-parallel ranks divide a tensor: by its rows; by the rows of each half, which are keys and values; by its
# columns, the products being summed; by its rows, the products being put together; or not at all, on the first rank
# alone, as a bias that must enter a sum once.
ROWS, PAIRS, COLUMNS, GATHERED, ONCE = "rows", "pairs", "columns", "gathered", "once"

Splits = tuple[tuple[str, str], ...]
"""Patterns of the ends of tensors' names, each with the way in which such a tensor is divided. A tensor whose name
matches no pattern is whole on every rank."""


def attention_splits(name: str) -> Splits:
    """The splits that give each rank some heads of every `Attention` whose name matches the pattern `name`."""
    return (
        (rf"{name}\.(q|k|v|k_img|v_img)\.(weight|bias)", ROWS),
        (rf"{name}\.norm_(q|k|k_img)\.weight", ROWS),
        (rf"{name}\.o\.weight", COLUMNS),
        (rf"{name}\.o\.bias", ONCE),
    )


def paired_attention_splits(queries: str, pairs: str, output: str) -> Splits:
    """The splits of an attention with keys and values in one matrix; each argument is a pattern of a layer's name."""
    return (
        (rf"{queries}\.(weight|bias)", ROWS),
        (rf"{pairs}\.(weight|bias)", PAIRS),
        (rf"{output}\.weight", COLUMNS),
        (rf"{output}\.bias", ONCE),
    )


@dataclass(frozen=True)
class Key:
    """A keyword argument of the forward of ComfyUI's Wan models.

    Args:
        name: ComfyUI's name of the argument.
        what: the words in which a refusal describes the argument's value, such as "a pose video"; "" for an argument
            that changes nothing by itself, which no model refuses.
        node: the node that a refusal names as the maker of the argument; "" where the refusal names the nodes of other
            variants instead.
    """

    name: str
    what: str = ""
    node: str = ""


@dataclass(frozen=True)
class Asked:
    """The facts on which the shape of a conditioning input depends: the model, the latent and the other inputs.

    Args:
        batch, frames, height, width: sizes of the latent.
        given: the whole conditioning.
    """

    config: WanConfig
    batch: int
    frames: int
    height: int
    width: int
    given: Conditioning


Shape = tuple[int | None, ...]
"""Sizes that a tensor must have; None allows any."""


@dataclass(frozen=True)
class Input:
    """A tensor that a model takes beside latent, timestep and text.

    Args:
        name: the attribute of `Conditioning` that holds the tensor.
        shape: a function from the variant and an `Asked` to the shape that the tensor must have.
        key: ComfyUI's keyword argument whose value is this very tensor; None where `Variant.arrange` makes the tensor.
    """

    name: str
    shape: Callable[[Any, Asked], Shape]
    key: Key | None = None


IMAGE = Input(
    "image",
    lambda _, asked: (asked.batch, None, asked.config.image_dim),
    Key("clip_fea", "a CLIP vision embedding of a start image", "WanImageToVideo"),
)
EXTRA_FRAMES = Input(
    "extra_frames",
    lambda _, asked: (asked.batch, asked.config.in_dim, None, asked.height, asked.width),
    Key("time_dim_concat"),
)
CONTEXT_VIDEOS = Input("context_videos", lambda _, asked: (asked.batch, asked.given.options.context_tokens, None))
SHARED_INPUTS = (IMAGE, EXTRA_FRAMES, CONTEXT_VIDEOS)
"""Inputs that models of several variants take (see `WanConfig.inputs`)."""


@dataclass(frozen=True)
class SideAttention:
    """A variant's attention of each video token to a few further tokens of its frame, such as speech or a face.

    Args:
        share: of the blocks of the video that have this attention, from 0 to 1.
        tokens: further tokens of each frame.
        width: numbers of each further token.
    """

    share: float = 0.0
    tokens: int = 0
    width: int = 0


class TensorShapes:
    """The shapes of the tensors of one file, by which variants recognise themselves.

    Args:
        file: name of the file, for errors.
        tensors: the file's tensors by their original names.
    """

    def __init__(self, file: str, tensors: Mapping[str, TensorInfo]):
        self.file, self.tensors = file, tensors

    def needed(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of the tensor `name`, which the file must have with `dims` dimensions.

        Raises:
            CheckpointError: the file lacks the tensor, or the tensor has another number of dimensions.
        """
        info = self.tensors.get(name)
        if info is None or len(info.shape) != dims:
            raise CheckpointError(
                f"{self.file} has no usable tensor {name}. Download the file again, or choose another."
            )
        return info.shape

    def size(self, name: str, axis: int) -> int:
        """The size of a tensor along an axis; 0 where the file lacks the tensor or the axis."""
        shape = self.tensors[name].shape if name in self.tensors else ()
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    def count(self, name: str) -> int:
        """The number of tensors that the file has under `name` with {} replaced by 0, 1, 2 and so on without a gap."""
        number = 0
        while name.format(number) in self.tensors:
            number += 1
        return number

    def blocks(self, part: str) -> int:
        """The number of different blocks among the tensors named `part`, a dot, the block's number and more."""
        return len({name.split(".")[1] for name in self.tensors if name.startswith(f"{part}.")})


@dataclass(frozen=True)
class Variant:
    """One Wan variant. Defining a subclass registers the variant; its fields are the dimensions of its layers.

    Attributes:
        name: what a user calls a model of this variant, such as image-to-video; "" for layers that come beside those of
            a variant with a name.
        order: the variant's position in lists of variants, and its tensors' position in the list of a model's tensors;
            smaller numbers come first. A model with two named variants has the name of the later variant.
        comfyui_names: ComfyUI's names (model_type) for models of this variant.
        module: whether the layers come in a file of their own, never in the file of a whole model.
        node: the node of ComfyUI that makes latent and conditioning for this variant.
        inputs: tensors that the variant adds to the model's inputs.
        settings: further keyword arguments of ComfyUI's forward that `arrange` reads.
        ignored: keyword arguments that ComfyUI's own model of this variant takes without any use.
        start_image: whether channels beside the latent's are for a start image or a control video.
        splits: how tensor-parallel ranks divide the tensors that this variant adds to the model.
        rounded: parts of the model (first words of tensors' names) outside the blocks whose large matrices are rounded
            to fp8, as the matrices of the blocks are, where a model is held in fp8.
        first_stage, last_stage: parts of the model that act only in front of the first block, or only behind the last
            block, so that other pipeline stages need not hold these parts.
        carried: number of token streams that go from one pipeline stage to the next beside the video's stream.
        why_exact: the reason why displaced patches (DistriFusion) cannot run this variant, which is then computed
            exactly; "" where displaced patches can run the variant.
    """

    name: ClassVar[str] = ""
    order: ClassVar[int] = 1000
    comfyui_names: ClassVar[tuple[str, ...]] = ()
    module: ClassVar[bool] = False
    node: ClassVar[str] = ""
    inputs: ClassVar[tuple[Input, ...]] = ()
    settings: ClassVar[tuple[Key, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()
    start_image: ClassVar[bool] = True
    splits: ClassVar[Splits] = ()
    rounded: ClassVar[frozenset[str]] = frozenset()
    first_stage: ClassVar[frozenset[str]] = frozenset()
    last_stage: ClassVar[frozenset[str]] = frozenset()
    carried: ClassVar[int] = 0
    why_exact: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _classes.append(cls)

    # How it is recognised, and what it consists of.

    @classmethod
    def read(cls: type[V], tensors: TensorShapes) -> V | None:
        """The variant with the dimensions that a file's tensors tell; None where its layers are not in the file.

        Raises:
            CheckpointError: the file has some layers of the variant and lacks others.
        """
        return None

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether a model with these numbers of channels is of this variant if no tensor shows another variant."""
        return False

    def shapes(self, config: WanConfig) -> Shapes:
        """The names and shapes of the tensors that a model has for this variant."""
        return {}

    def layers(self) -> type[Any] | None:
        """The subclass of `WanModel` that adds this variant's layers; None for a variant without layers. The methods of
        the subclass call `super()`, behind which the subclasses of other variants may stand."""
        return None

    def divides(self, config: WanConfig) -> bool:
        """Whether the variant's layers can be spread over the blocks of a model of this size."""
        return True

    def is_constant(self, name: str) -> bool:
        """Whether the tensor `name` has the same numbers in every file, so that the code supplies these numbers."""
        return False

    # Where its tensors act, and what they cost.

    def block_number(self, config: WanConfig, name: str) -> int | None:
        """The number (see `WanConfig.run_order`) of the block that the variant's tensor `name` belongs to, or of the
        block directly behind which the tensor acts; None for a tensor at no block, or of another variant."""
        return None

    def video_block_number(self, config: WanConfig, name: str) -> int | None:
        """The number of the one block of the video that the variant's tensor `name` belongs to or acts at; None for a
        tensor at no block, or of another variant."""
        return self.block_number(config, name)

    def side_blocks(self, config: WanConfig, blocks: range) -> range:
        """The numbers, counted from 0, of the variant's own blocks that run behind `blocks` of the video."""
        return range(0)

    def side_attention(self, config: WanConfig) -> SideAttention:
        """The attention to further tokens of each frame that the variant adds to a model of this size."""
        return SideAttention()

    def token_bytes(self, contexts: int) -> int:
        """Bytes of activations for each token and channel that this variant adds to a forward with `contexts` control
        videos."""
        return 0

    def own_heads(self) -> tuple[int, str] | None:
        """The number of heads of the variant's own attention and the name of its layers in a refusal, where this number
        may differ from the model's; None for a variant without such an attention."""
        return None

    # What it is given.

    def latent_node(self, config: WanConfig) -> str:
        """The node whose latent and conditioning a model of this variant takes."""
        return self.node

    def context_channels(self, config: WanConfig) -> tuple[int, ...]:
        """The numbers of channels that the variant's context videos may have, masks beside them included."""
        return ()

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with the inputs and options that this variant computes from ComfyUI's keyword arguments
        `given`; the arguments that are inputs as they are (see `Input.key`) are in the conditioning already."""
        return conditioning

    @classmethod
    def with_context_grids(cls, x: Any, conditioning: Conditioning) -> Conditioning:
        """The conditioning with the grids of the context tokens that the variant adds; x is [B, in_dim, T, H, W]."""
        return conditioning

    def check(self, config: WanConfig, x: Any, conditioning: Conditioning) -> None:
        """Check the inputs beyond their shapes, which `conditioning.check` compares.

        Raises:
            ValueError: an input does not fit the latent x [B, in_dim, T, H, W], or another input.
        """


V = TypeVar("V", bound=Variant)

_classes: list[type[Variant]] = []


@functools.cache
def _discover() -> None:
    """Import every module of wanvideo/variants/, which registers the variants. This happens at the first question, not
    at import, because the modules of the variants import this one."""
    package = importlib.import_module("..variants", __package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def registered() -> tuple[type[Variant], ...]:
    """All variants, by their order."""
    _discover()
    return _in_order(tuple(_classes))


@functools.cache
def _in_order(classes: tuple[type[Variant], ...]) -> tuple[type[Variant], ...]:
    return tuple(sorted(classes, key=lambda cls: (cls.order, cls.__name__)))


def by_channels(in_dim: int, out_dim: int) -> Variant:
    """The variant of a model with these numbers of channels whose tensors show no other variant."""
    return next(cls() for cls in registered() if cls.fits(in_dim, out_dim))


def read_variants(tensors: TensorShapes, module: bool = False) -> tuple[Variant, ...]:
    """The variants whose layers are in the file of a whole model, or of a `module` beside it.

    Raises:
        CheckpointError: the file has some layers of a variant and lacks others.
    """
    found = (cls.read(tensors) for cls in registered() if cls.module == module)
    return tuple(variant for variant in found if variant is not None)


def inputs() -> tuple[Input, ...]:
    """The inputs of all variants; an input of several variants occurs as many times."""
    return (*SHARED_INPUTS, *(given for cls in registered() for given in cls.inputs))


def is_rounded(name: str) -> bool:
    """Whether the tensor `name` is in a part of the model that some variant lists as `rounded`."""
    part = name.partition(".")[0]
    return any(part in cls.rounded for cls in registered())


def keys() -> dict[str, Key]:
    """The keyword arguments of ComfyUI's forward that models of any variant take, by their names.

    The `node` of an argument that several variants take names the nodes of all these variants.
    """
    found: dict[str, list[Key]] = {}
    by_class = [(SHARED_INPUTS, ()), *((cls.inputs, cls.settings) for cls in registered())]
    for given, settings in by_class:
        for key in (*(each.key for each in given if each.key is not None), *settings):
            found.setdefault(key.name, []).append(key)
    return {name: _joined(name, carried) for name, carried in found.items()}


def _joined(name: str, carried: list[Key]) -> Key:
    """The keyword argument `name` with the words and the nodes of all variants that take the argument."""
    nodes = list(dict.fromkeys(key.node for key in carried if key.node))
    what = next((key.what for key in carried if key.what), "")
    return Key(name, what, " or ".join(filter(None, (", ".join(nodes[:-1]), *nodes[-1:]))))
