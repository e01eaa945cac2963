"""A text encoder without weights, for the small Wan model that ships with this pack.

Wan reads a prompt as up to 512 vectors of 4096 numbers from umT5-XXL, a network of 11 GB. The small model knows
only sentences about moving shapes ("a red circle moves right over a blue background"), so a fixed mapping does:
each word becomes a sum of vectors of +1 and -1 that stand for the word itself, for its two neighbours and for its
place in the sentence. The signs are the bits of SHAKE-256 of a name, so they are the same on every machine and in
every version of torch. Nothing here is learned, and no other Wan model understands the result.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import torch

from ..base.user_error import InputError, shown

TEXT_LENGTH = 512
"""Slots of a Wan text embedding; those behind the last word are zero."""

TEXT_DIM = 4096

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("right", "left", "up", "down")
VOCABULARY = ("a", "and", "moves", "over", "background", *COLOURS, *SHAPES, *DIRECTIONS)

NEIGHBOUR_WEIGHT = 0.5  # powers of two, so that every sum is exact in 16 bits too
PLACE_WEIGHT = 0.5

_MOST_QUOTED = 5  # words in a sentence

EXAMPLE = "a red circle moves right over a blue background"


def tokenize(prompt: str) -> list[str]:
    """The words of a prompt, lower case, without commas and full stops; none for an empty prompt.

    Raises:
        InputError: a word is not in VOCABULARY, or there are more than TEXT_LENGTH words. The text lists the
            words known.
    """
    words = re.sub(r"[.,;:!?]", " ", prompt.lower()).split()
    unknown = list(dict.fromkeys(word for word in words if word not in VOCABULARY))
    if unknown:
        raise InputError(
            f"The tiny Wan model does not know {_quoted(unknown)}. Write a prompt such as '{EXAMPLE}' with "
            f"these words alone: {', '.join(VOCABULARY)}."
        )
    if len(words) > TEXT_LENGTH:
        raise InputError(
            f"The prompt has {len(words)} words, and the tiny Wan model reads at most {TEXT_LENGTH}. "
            f"Shorten it, for example to '{EXAMPLE}'; the words known are {', '.join(VOCABULARY)}."
        )
    return words


def encode(prompt: str) -> torch.Tensor:
    """The embedding of a prompt, float32 [TEXT_LENGTH, TEXT_DIM] on the CPU; all zeros for an empty prompt.

    Raises:
        InputError: see `tokenize`.
    """
    words = tokenize(prompt)
    embedding = torch.zeros(TEXT_LENGTH, TEXT_DIM)
    if words:
        embedding[: len(words)] = encode_words(words)
    return embedding


def encode_words(words: Sequence[str]) -> torch.Tensor:
    """The vectors of the words of one prompt, float32 [len(words), TEXT_DIM]; "" stands beyond either end."""
    around = ["", *words, ""]
    vectors = []
    for place, (before, word, after) in enumerate(zip(around, words, around[2:], strict=False)):
        neighbours = signs(f"before {before}") + signs(f"after {after}")
        vectors.append(signs(f"word {word}") + NEIGHBOUR_WEIGHT * neighbours + PLACE_WEIGHT * signs(f"place {place}"))
    return torch.stack(vectors)


@functools.lru_cache(maxsize=1024)
def signs(name: str) -> torch.Tensor:
    """TEXT_DIM values of +1 and -1, the bits of SHAKE-256 of a name; float32. Not to be changed in place."""
    digest = hashlib.shake_256(f"tiny wan: {name}".encode()).digest(TEXT_DIM // 8)
    octets = torch.tensor(list(digest), dtype=torch.int64)
    bits = (octets.unsqueeze(1) >> torch.arange(8)) & 1
    return (2 * bits.flatten() - 1).float()


def _quoted(words: Sequence[str]) -> str:
    more = ["..."] if len(words) > _MOST_QUOTED else []
    return ", ".join([shown(word) for word in words[:_MOST_QUOTED]] + more)
