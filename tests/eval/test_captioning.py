import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bio.eval.scoring.captioning import cider, plain_words
from mergekit_bio.eval.scoring.scorers import SCORERS


def test_an_equal_caption_has_ten_and_a_foreign_one_none():
    references = [text.split() for text in ("a low grunt of a toad", "the song of one wren far away")]
    assert cider(references=references, captions=references) == pytest.approx([10, 10])
    assert cider(references=references, captions=references[::-1])[0] == pytest.approx(0)


def test_a_figure_worked_out_by_hand():
    # Two references without a common word: every idf is log 2. "a b" against "a b c d": 2 of 4 unigrams, 1 of 3
    # bigrams; the lengths differ by two bigrams.
    ours = cider(references=[list("abcd"), list("wxyz")], captions=[list("ab"), list("wxyz")])
    unigrams, bigrams = 2 / (math.sqrt(2) * 2), 1 / math.sqrt(3)
    assert ours[0] == pytest.approx(10 / 4 * (unigrams + bigrams) * math.exp(-4 / 72))


def test_plain_words_have_no_case_and_no_punctuation():
    assert plain_words("A wren's song, far-off.") == ["a", "wren's", "song", "far-off"]
    assert SCORERS["paper"].caption_words("A wren, far.") == ["A", "wren,", "far."]


CAPTION = st.lists(st.sampled_from("abcdef"), max_size=9)


@settings(max_examples=50)
@given(st.lists(st.tuples(CAPTION.filter(bool), CAPTION), min_size=2, max_size=6))
def test_it_is_the_authors_program(pairs):
    official = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")
    references, captions = ([" ".join(pair[side]) for pair in pairs] for side in (0, 1))
    _, expected = official.Cider().compute_score(
        {i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(captions)}
    )
    assert cider(references=[r.split() for r in references], captions=[c.split() for c in captions]) == pytest.approx(
        list(expected)
    )
