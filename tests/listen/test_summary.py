"""What the answers about an archive add up to, counted by pandas."""

import random

import pandas
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.listen.summary import Summary, in_words, shortened

TIMES = [None, "2018-04-06T23:59:59", "2018-04-07T00:00:00+02:00"]


@given(st.integers(0, 10**6), st.integers(1, 200))
def test_answers_are_counted_by_recording_and_by_day(seed: int, windows: int) -> None:
    draw = random.Random(seed)
    rows = [
        (
            draw.choice("ab") + ".wav",
            draw.choice(["wren", "sora", "rail"]),
            draw.choice(TIMES),
        )
        for _ in range(windows)
    ]
    summary = Summary()
    for row in rows:
        summary.add(*row)

    table = pandas.DataFrame(rows, columns=["recording", "answer", "time"])
    document = summary.document()
    assert document["answers"] == table["answer"].value_counts().to_dict()
    for key, column in (("recordings", table["recording"]), ("days", table["time"].str[:10])):
        counted = {(name, answer): n for name, counts in document[key].items() for answer, n in counts.items()}
        assert counted == table.groupby([column, "answer"]).size().to_dict()
    assert list(document["days"]) == sorted(document["days"])
    assert summary.recordings_with("wren") == table[table["answer"] == "wren"]["recording"].nunique()
    assert summary.days_with("wren") == table[table["answer"] == "wren"]["time"].str[:10].nunique()


def test_counts_in_words_name_the_most_frequent() -> None:
    summary = Summary()
    for answer, count in {"wren": 5, "sora": 4, "rail": 3, "owl": 2, "crow": 1}.items():
        for _ in range(count):
            summary.add("a.wav", answer)

    assert in_words(summary.answers) == "wren 5, sora 4, rail 3, 3 others"
    assert shortened("a\nlong " + "answer " * 20) == "a long answer answer answer answer an..."
