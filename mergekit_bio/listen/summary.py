"""What an archive's answers add up to: how often each was given, a recording and a day."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from sys import intern
from typing import Any


@dataclass
class Summary:
    """Counts of answers.

    Attributes:
        answers: How often each was given.
        recordings: The same, for each recording.
        days: The same, for each day (``"2018-04-06"``) that is known.
        quiet: Windows that were not asked about, because they are quiet.
        unlikely: Answers that were left out, because they are not likely enough.
    """

    answers: Counter[str] = field(default_factory=Counter)
    recordings: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    days: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    quiet: int = 0
    unlikely: int = 0

    def add(self, recording: str, answer: str, time: str | None = None) -> None:
        """Count an answer about a window of a recording that began at ``time`` (ISO 8601)."""
        answer = intern(answer)  # there are many windows, and few answers
        self.answers[answer] += 1
        self.recordings[recording][answer] += 1
        if time:
            self.days[time[:10]][answer] += 1

    def document(self) -> dict[str, Any]:
        """All of it, as values of JSON; the most frequent answers first, days in order."""
        return {
            "answers": dict(self.answers.most_common()),
            "recordings": {recording: dict(counts.most_common()) for recording, counts in self.recordings.items()},
            "days": {day: dict(self.days[day].most_common()) for day in sorted(self.days)},
            "quiet": self.quiet,
            "unlikely": self.unlikely,
        }

    def recordings_with(self, answer: str) -> int:
        """In how many recordings an answer was given."""
        return sum(answer in counts for counts in self.recordings.values())

    def days_with(self, answer: str) -> int:
        """On how many days."""
        return sum(answer in counts for counts in self.days.values())


def in_words(counts: Counter[str], *, most: int = 3) -> str:
    """``"marsh wren 12, dusk pelin 2, 3 others"``: the most frequent answers, and how many windows had another."""
    words = [f"{shortened(answer)} {count}" for answer, count in counts.most_common(most)]
    others = counts.total() - sum(count for _, count in counts.most_common(most))
    return ", ".join([*words, *([f"{others} others"] if others else [])])


def shortened(text: str, *, length: int = 40) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
