"""Says once where numbers come from that are none (NaN or infinite): the weights, a LoRA, the inputs or the precision.

The result of each forward is looked at, which takes a hundredth of a second. Where it has such numbers, the weights are
read, once for a model and its LoRAs; every later step of the run would have such numbers too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ...distributed.protocol.specs import ModelSpec
from ...distributed.weights.lora_transfer import LoraSet, tensors_of
from ...wanvideo.base.conditioning import Conditioning
from ...wanvideo.base.tensor_info import listed
from ...wanvideo.base.user_error import InputError
from ...wanvideo.checkpoint.weight_source import RANDOM_PREFIX, open_weights
from ...wanvideo.quant.finite import is_finite

log = logging.getLogger(__name__)

Poll = Callable[[], None]

_causes: dict[tuple[ModelSpec, str], str] = {}
"""Why the last result with such numbers of a model with its LoRAs (by uuid) has them."""
_own_causes: dict[tuple[ModelSpec, str], str] = {}
"""Why results have such numbers where the inputs have none, by the same keys: known once the weights are read."""


def refuse_explained(latent: torch.Tensor, spec: ModelSpec, loras: LoraSet | None) -> None:
    """Refuse a latent with such numbers where the model itself has made them in an earlier step.

    Raises:
        InputError: the latent is of this kind. The text is what `explain` has found.
    """
    cause = _causes.get(_key(spec, loras))
    if cause is not None and not is_finite(latent):
        raise InputError(cause)


def explain(
    result: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    conditioning: Conditioning,
    spec: ModelSpec,
    loras: LoraSet | None,
    poll: Poll,
) -> None:
    """Log the cause of numbers in the result of a forward that are NaN or infinite, unless it is the cause that was
    logged last for this model and its LoRAs.

    Args:
        inputs: the latent, the timestep and the text, by the words of a user.
        poll: called now and then while weights are read; raises to give up.
    """
    if is_finite(result):
        return
    key = _key(spec, loras)
    given = {**inputs, **conditioning.tensors()}
    strangers = [name for name, tensor in given.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if strangers:
        cause = (
            f"The model {spec.name} was given numbers that are NaN or infinite ({listed(strangers)}), and so is its "
            "result. Look at the node that they come from."
        )
    else:
        if key not in _own_causes:
            log.warning(
                "The result of %s has numbers that are NaN or infinite. Reading its weights to find why.", spec.name
            )
            _own_causes[key] = " ".join(_found(spec, loras, poll))
        cause = _own_causes[key]
    if _causes.get(key) != cause:
        _causes[key] = cause
        log.warning(cause)


def _key(spec: ModelSpec, loras: LoraSet | None) -> tuple[ModelSpec, str]:
    return spec, loras.uuid if loras is not None else ""


def _found(spec: ModelSpec, loras: LoraSet | None, poll: Poll) -> Iterator[str]:
    weights, changes = _nonfinite_weights(spec, poll), _nonfinite_deltas(loras, poll)
    if weights:
        yield (
            f"{spec.name} has numbers that are NaN or infinite in {len(weights)} tensors: {listed(weights)}. "
            "Download the file again, or choose another."
        )
    if changes:
        yield (
            f"A LoRA has numbers that are NaN or infinite for {len(changes)} weights: {listed(changes)}. "
            "Use another LoRA, or an earlier state of its training."
        )
    if not weights and not changes:
        advice = "Switch use_bf16 on in XDit+USP Config." if spec.compute_dtype == "fp16" else "Look at the sigmas."
        yield f"All its weights are numbers, so a sum went beyond the range of {spec.compute_dtype}. {advice}"


def _nonfinite_weights(spec: ModelSpec, poll: Poll) -> list[str]:
    if spec.path.startswith(RANDOM_PREFIX):
        return []
    source, found = open_weights(spec.path, module=spec.module), []
    for name in source.config.shapes():
        poll()
        if not is_finite(source.tensor(name)):
            found.append(name)
    return found


def _nonfinite_deltas(loras: LoraSet | None, poll: Poll) -> list[str]:
    found = []
    for name, deltas in (loras.build() if loras is not None else {}).items():
        poll()
        if not all(map(is_finite, _all_tensors(deltas))):
            found.append(name)
    return found


def _all_tensors(deltas: Sequence) -> list[torch.Tensor]:
    return [tensor for delta in deltas for tensor in tensors_of(delta)]
