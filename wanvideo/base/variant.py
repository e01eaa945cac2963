"""What a Wan variant is: one class for each, in a module of its own in wanvideo/variants/, which says everything that
the rest of the program asks about the variant. See docs/adding-a-variant.md.

A model has the layers of any number of variants: an image-to-video model with the layers of another variant beside
them is a model of both (see `WanConfig.variants`). Needs no torch; neither do the questions that are asked here.
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
"""Patterns of the ends of tensors' names, and how such a tensor is divided. What no pattern names is on every rank."""


def attention_splits(name: str) -> Splits:
    """How an `Attention` is divided whose name matches the pattern `name`: each rank has some of the heads."""
    return (
        (rf"{name}\.(q|k|v|k_img|v_img)\.(weight|bias)", ROWS),
        (rf"{name}\.norm_(q|k|k_img)\.weight", ROWS),
        (rf"{name}\.o\.weight", COLUMNS),
        (rf"{name}\.o\.bias", ONCE),
    )


def paired_attention_splits(queries: str, pairs: str, output: str) -> Splits:
    """How an attention is divided that has keys and values in one matrix; arguments are patterns of its layers."""
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
        name: what ComfyUI calls it.
        what: what it carries, as a refusal says, such as "a pose video"; "" where no variant says it, as for one that
            changes nothing by itself, which is then passed over.
        node: the node that makes it, as a refusal says; "" where a refusal names the nodes of other variants instead.
    """

    name: str
    what: str = ""
    node: str = ""


@dataclass(frozen=True)
class Asked:
    """What the shape of a conditioning input depends on: the model, the sizes of the latent, and what is given.

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
        name: of the attribute of `Conditioning` that holds it.
        shape: the variant and what is asked to the shape that the tensor must have.
        key: ComfyUI's keyword whose value is this tensor as it is; None where `Variant.arrange` makes it.
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
TAIL = Input("tail", lambda _, asked: (asked.batch, asked.given.options.tail_tokens, None))
SHARED_INPUTS = (IMAGE, EXTRA_FRAMES, TAIL)
"""Inputs of models of many variants (see `WanConfig.inputs`)."""


@dataclass(frozen=True)
class Hearing:
    """What a token attends to beside the video, the text and an image: `tokens` of its frame, of `width` numbers each,
    in or behind a `share` of the blocks."""

    share: float = 0.0
    tokens: int = 0
    width: int = 0


class TensorShapes:
    """The shapes of the tensors of one file, by which variants recognise themselves.

    Args:
        file: name of the file, for errors.
        tensors: by their original names.
    """

    def __init__(self, file: str, tensors: Mapping[str, TensorInfo]):
        self.file, self.tensors = file, tensors

    def needed(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there and have so many dimensions.

        Raises:
            CheckpointError: it has not.
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
        """How many tensors there are whose names are `name` with 0, 1, 2 and so on in the place of {}."""
        number = 0
        while name.format(number) in self.tensors:
            number += 1
        return number

    def blocks(self, part: str) -> int:
        """How many different blocks tensors are of whose names begin with `part`, a dot and the block's number."""
        return len({name.split(".")[1] for name in self.tensors if name.startswith(f"{part}.")})


@dataclass(frozen=True)
class Variant:
    """What one Wan variant is. A subclass is registered where it is defined; its fields are dimensions of its layers.

    Attributes:
        name: what a user calls a model of this variant, such as image-to-video; "" for layers that come beside those of
            a variant with a name.
        order: where the variant stands among others in lists, and its tensors in the list of a model's tensors; smaller
            numbers come first. Of two variants with names in one model, the latter names it.
        comfyui_names: ComfyUI's names (model_type) for models of this variant.
        module: whether the layers come in a file of their own, never in that of a whole model.
        node: the node of ComfyUI that makes latent and conditioning for this variant.
        inputs: tensors that the model takes.
        settings: further keywords of ComfyUI that `arrange` reads.
        ignored: keywords that ComfyUI's own model of this variant takes without any use.
        start_image: whether channels beside those of the latent are for a start image or a control video.
        splits: how tensor-parallel ranks divide the variant's tensors, beside those that every model has.
        rounded: parts of the model (first words of tensors' names) outside the blocks whose matrices are large, so that
            they are rounded to fp8 as those of the blocks are where a model is held in fp8.
        first_stage, last_stage: parts of the model that act in front of the first block alone, or behind the last
            alone: other pipeline stages need not hold them.
        carried: streams of tokens that go from one pipeline stage to the next beside the video's.
        why_exact: why displaced patches (DistriFusion) cannot run this variant, which is then computed exactly; ""
            where they can.
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
            CheckpointError: some of its layers are there and others are not.
        """
        return None

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether the numbers of channels alone make a model of this variant, where no tensor tells another one."""
        return False

    def shapes(self, config: WanConfig) -> Shapes:
        """The names and shapes of the tensors that a model has for this variant."""
        return {}

    def layers(self) -> type[Any] | None:
        """The subclass of `WanModel` that adds this variant's layers; None where there are none. It calls `super()` in
        what it overrides, as those of other variants may stand behind it."""
        return None

    def divides(self, config: WanConfig) -> bool:
        """Whether the variant's layers can be spread over the blocks of a model of this size."""
        return True

    def is_constant(self, name: str) -> bool:
        """Whether a tensor has the same numbers in every file, which the code knows, so that none is read."""
        return False

    # Where its tensors act, and what they cost.

    def block_number(self, config: WanConfig, name: str) -> int | None:
        """The number (see `WanConfig.in_turn`) of the block that a tensor of this variant belongs to, or acts behind
        before another block comes; None for a tensor of no block, or of another variant."""
        return None

    def place_of(self, config: WanConfig, name: str) -> int | None:
        """The block of the video that a tensor of this variant belongs to or acts at alone; None as in
        `block_number`."""
        return self.block_number(config, name)

    def side_blocks(self, config: WanConfig, blocks: range) -> range:
        """Those of the variant's own blocks that run behind `blocks` of the video, counted from 0."""
        return range(0)

    def hearing(self, config: WanConfig) -> Hearing:
        """What the tokens attend to of their frame."""
        return Hearing()

    def token_bytes(self, contexts: int) -> int:
        """Bytes of activations for each token and channel beside those of every model; `contexts` is how many control
        videos there are."""
        return 0

    def own_heads(self) -> tuple[int, str] | None:
        """Heads of an attention of this variant that has another number of them than the model, and what a refusal
        calls the layers; None without such an attention."""
        return None

    # What it is given.

    def latent_node(self, config: WanConfig) -> str:
        """The node whose latent and conditioning a model of this variant takes."""
        return self.node

    def tail_channels(self, config: WanConfig) -> tuple[int, ...]:
        """Channels that videos in the tail of the sequence may have, with those of what is embedded beside them."""
        return ()

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with what this variant makes of ComfyUI's keywords `given`, beside the inputs that are
        `given` as they are."""
        return conditioning

    @classmethod
    def placed(cls, x: Any, conditioning: Conditioning) -> Conditioning:
        """The conditioning for a latent x [B, in_dim, T, H, W], with the places of inputs that lie behind its video."""
        return conditioning

    def check(self, config: WanConfig, x: Any, conditioning: Conditioning) -> None:
        """Check what shapes do not tell (see `conditioning.check`).

        Raises:
            ValueError: an input does not fit the latent x [B, in_dim, T, H, W], or the others.
        """


V = TypeVar("V", bound=Variant)

_classes: list[type[Variant]] = []


@functools.cache
def _discover() -> None:
    """Import every module of wanvideo/variants/, which registers the classes there. Those modules build upon this
    package, so that they cannot be imported before they are asked for."""
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
    """The variant that the numbers of channels make, where no tensor tells another one."""
    return next(cls() for cls in registered() if cls.fits(in_dim, out_dim))


def read_variants(tensors: TensorShapes, module: bool = False) -> tuple[Variant, ...]:
    """The variants whose layers are in the file of a whole model, or of a `module` beside it.

    Raises:
        CheckpointError: a variant's layers are there in part.
    """
    found = (cls.read(tensors) for cls in registered() if cls.module == module)
    return tuple(variant for variant in found if variant is not None)


def inputs() -> tuple[Input, ...]:
    """What models of any variant take, those of several variants as often."""
    return (*SHARED_INPUTS, *(given for cls in registered() for given in cls.inputs))


def is_rounded(name: str) -> bool:
    """Whether a tensor of this name is in a part that some variant says to be `rounded`."""
    part = name.partition(".")[0]
    return any(part in cls.rounded for cls in registered())


def keys() -> dict[str, Key]:
    """What the keywords of ComfyUI's forward carry that models of some variants take, by their names.

    Where several variants take one, `node` names the nodes of all of them.
    """
    found: dict[str, list[Key]] = {}
    by_class = [(SHARED_INPUTS, ()), *((cls.inputs, cls.settings) for cls in registered())]
    for given, settings in by_class:
        for key in (*(each.key for each in given if each.key is not None), *settings):
            found.setdefault(key.name, []).append(key)
    return {name: _joined(name, carried) for name, carried in found.items()}


def _joined(name: str, carried: list[Key]) -> Key:
    """One keyword of those of several variants."""
    nodes = list(dict.fromkeys(key.node for key in carried if key.node))
    what = next((key.what for key in carried if key.what), "")
    return Key(name, what, " or ".join(filter(None, (", ".join(nodes[:-1]), *nodes[-1:]))))
