"""Checks of the tokenizer: ids of whole texts at several context lengths."""

from pathlib import Path

import pytest

from tests.golden_kinds.common import Fixture


def check_tokenizer(path: Path) -> None:
    """Exact ids, padding and truncation."""
    pytest.importorskip("instant_clip_tokenizer")
    pytest.importorskip("ftfy")
    from eupe_jax.evals.tokenizer import tokenize

    fixture = Fixture(path)
    for length in fixture.meta["context_lengths"]:
        fixture.check(f"ids_ctx{length}", tokenize(fixture.meta["texts"], length), 0)
    fixture.assert_all_checked()


KINDS = {"tokenizer": check_tokenizer}
