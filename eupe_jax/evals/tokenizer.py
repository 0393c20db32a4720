"""Byte-pair token ids of texts, as the text towers of CLIP and of the Perception Encoder were trained with.

The vocabulary of 49,408 entries comes with the package instant-clip-tokenizer; ftfy repairs broken text first. Ids are
those of the reference for all of Unicode 14 but one sequence, an apostrophe before a long s (U+017F).
"""

import functools
import html
from collections.abc import Sequence

import numpy as np

INSTALL = "pip install 'eupe_jax[eval]'"


def clean(text: str) -> str:
    """Text as it is cut into tokens: repaired, HTML entities resolved (twice), single spaces, lower case."""
    text = html.unescape(html.unescape(_module("ftfy").fix_text(text)))
    # The reference drops U+0345: ignoring case, its pattern takes it for neither a letter nor anything else.
    return " ".join(" ".join(text.split()).lower().replace("\u0345", " ").split())


def tokenize(texts: Sequence[str], context_length: int) -> np.ndarray:
    """Token ids int32 [N, context_length]: start of text, the text, end of text, zeros.

    A text that is too long is cut; its end-of-text token stays, as the last id of the row.

    Args:
      texts: any strings, empty ones included.
      context_length: row length; 72 for PE-Core-G, 32 for the smaller towers.

    Raises:
      ValueError: context_length below 3, or `texts` is one string instead of a sequence of them.
      ImportError: the packages are not installed; the message says which.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a sequence of strings, not one string")
    if context_length < 3:
        raise ValueError(f"context_length must be at least 3 (start, one token, end), got {context_length}")
    if not texts:
        return np.zeros((0, context_length), np.int32)
    ids = _tokenizer().tokenize_batch([clean(text) for text in texts], context_length=context_length)
    return ids.astype(np.int32)


@functools.cache
def _tokenizer():
    return _module("instant_clip_tokenizer").Tokenizer()  # reads its vocabulary, 70 ms


def _module(name: str):
    """A package that only this file needs."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"cutting texts into tokens needs the package {name}: {INSTALL}") from error
