"""Token ids: published examples, cleaning, padding, truncation, and text that comes back."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("instant_clip_tokenizer")
pytest.importorskip("ftfy")

from eupe_jax.evals import tokenizer  # noqa: E402
from eupe_jax.evals.tokenizer import clean, tokenize  # noqa: E402

START, END = 49406, 49407


def ids(text: str, length: int = 77) -> list[int]:
    """The ids of one text, without the padding."""
    row = tokenize([text], length)[0].tolist()
    return row[: row.index(END) + 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [START, END]),
        ("a photo of a cat", [START, 320, 1125, 539, 320, 2368, END]),
        ("hello world!", [START, 3306, 1002, 256, END]),
        ("It's 99", [START, 585, 568, 280, 280, END]),
    ],
)
def test_published_ids(text, expected):
    assert ids(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A  Photo\n of\ta CAT ", "a photo of a cat"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("it&#39;s", "it's"),
        ("â€œquotedâ€\x9d", '"quoted"'),  # UTF-8 that was once read as something else
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01sh", "fish"),
        ("a\u0345b", "a b"),
    ],
)
def test_cleaning(one, other):
    assert ids(one) == ids(other)


def test_words_that_differ_stay_apart():
    assert len({tuple(ids(text)) for text in ("photo", "photos", "pho to", "photo.", "phot\u00f6", "\U0001f4f7")}) == 6


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40), st.integers(3, 40))
def test_rows_are_well_formed_and_cut_consistently(text, length):
    row = tokenize([text], length)[0]
    assert row.dtype == np.int32 and row.shape == (length,) and row[0] == START
    # The text tower reads a text out at the largest id, so one has to be there however long the text is.
    assert row.max() == END
    whole = ids(text, 400)
    if END not in whole[:-1] and START not in whole[1:]:  # the text spells no special token out
        end = int(np.argmax(row))
        assert row[:end].tolist() == whole[: min(len(whole), length) - 1]
        assert not row[end + 1 :].any()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="<>|\u0345"), max_size=30))
def test_nothing_but_spaces_is_lost(text):
    back = tokenizer._tokenizer().decode(ids(text, 400)[1:-1])
    assert "".join(back.split()) == "".join(clean(text).split())


def test_many_texts_are_one_array():
    texts = ["one", "two words", "three words here"]
    together = tokenize(texts, 16)
    np.testing.assert_array_equal(together, np.concatenate([tokenize([t], 16) for t in texts]))
    assert tokenize([], 16).shape == (0, 16)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="context_length"):
        tokenize(["a"], 2)
    with pytest.raises(ValueError, match="sequence"):
        tokenize("a photo", 77)


@pytest.mark.parametrize("package", ["instant_clip_tokenizer", "ftfy"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    tokenizer._tokenizer.cache_clear()
    with pytest.raises(ImportError, match=f"{package}: pip install"):
        tokenize(["a"], 77)
