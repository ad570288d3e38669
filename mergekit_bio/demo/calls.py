"""Synthesised calls: what the invented species sound like, in a little weather and a little room."""

import numpy as np

SAMPLING_RATE = 16_000
CLIP_SAMPLES = 10 * SAMPLING_RATE

#: Start and length in seconds, and the pitch at both ends as a factor.
_Note = tuple[float, float, float, float]

_PHRASES: dict[str, list[_Note]] = {
    "rising": [(0.0, 0.8, 0.7, 1.5)],
    "falling": [(0.0, 0.8, 1.5, 0.7)],
    "arched": [(0.0, 0.4, 0.7, 1.5), (0.4, 0.4, 1.5, 0.7)],
    "paired": [(0.0, 0.16, 1.0, 1.0), (0.28, 0.16, 1.0, 1.0)],
    "rapid": [(0.11 * number, 0.06, 1.0, 1.0) for number in range(9)],
    "steady": [(0.0, 1.1, 1.0, 1.0)],
}
_PAUSE = 0.5


def call(*, voice: str, phrase: str | None, random: np.random.Generator) -> np.ndarray:
    """One recording: a phrase again and again, at its own pitch, speed and distance.

    Args:
        voice: What its notes are made of.
        phrase: How it is phrased. Without one: in a way of its own, made up for this recording.
        random: Decides everything else.

    Returns:
        float32 [160000]: 10 s at 16 kHz, within [-1, 1].
    """
    notes = _made_up(random) if phrase is None else _PHRASES[phrase]
    pitch = random.uniform(1400, 2600)
    tempo = random.uniform(0.85, 1.15)
    clip = np.zeros(CLIP_SAMPLES)
    at = random.uniform(0, 0.8)
    while True:
        sung = _sung(notes, voice, pitch * random.uniform(0.95, 1.05), tempo, random)
        start = int(at * SAMPLING_RATE)
        if start + len(sung) > CLIP_SAMPLES:
            break
        clip[start : start + len(sung)] += sung * random.uniform(0.7, 1.0)
        at += len(sung) / SAMPLING_RATE + _PAUSE * random.uniform(0.7, 1.6)
    clip = _in_a_room(clip, random)
    noise = _brownish(random)
    level = 10 ** (-random.uniform(12, 26) / 20)
    clip += noise * level * np.sqrt(np.mean(clip**2) / np.mean(noise**2))
    return (clip / np.abs(clip).max() * random.uniform(0.3, 0.9)).astype(np.float32)


def _made_up(random: np.random.Generator) -> list[_Note]:
    """One to nine notes; half of the time the same note again and again."""
    same = random.random() < 0.5
    count = random.integers(1, 10)
    notes: list[_Note] = []
    at = 0.0
    for _ in range(count):
        if not (notes and same):
            length = np.exp(random.uniform(np.log(0.05), np.log(1.1)))
            gap = random.choice([0.0, random.uniform(0.03, 0.15)])
            ends = np.exp(random.uniform(np.log(0.7), np.log(1.5), 2))
        if notes and at + length > 1.2:
            break
        notes.append((at, length, *ends))
        at += length + gap
    return notes


def _sung(notes: list[_Note], voice: str, pitch: float, tempo: float, random: np.random.Generator) -> np.ndarray:
    length = max(start + duration for start, duration, *_ in notes)
    sung = np.zeros(int((length * tempo + 0.02) * SAMPLING_RATE))
    for start, duration, first, last in notes:
        count = int(duration * tempo * SAMPLING_RATE)
        begin = int(start * tempo * SAMPLING_RATE)
        frequency = pitch * np.geomspace(first, last, count)
        ends = min(1.0, 0.015 * SAMPLING_RATE / count)
        sung[begin : begin + count] += _note(voice, frequency, random) * _tapered(count, ends)
    return sung


def _note(voice: str, frequency: np.ndarray, random: np.random.Generator) -> np.ndarray:
    seconds = np.arange(len(frequency)) / SAMPLING_RATE
    if voice == "warble":
        frequency = frequency * (1 + 0.14 * np.sin(2 * np.pi * 24 * seconds + random.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE
    if voice in ("whistle", "warble"):
        return np.sin(phase)
    if voice == "buzz":
        return sum(np.sin(phase * harmonic / 4) for harmonic in range(2, 9)) / 3
    if voice == "clicks":
        since = seconds % (1 / 38)
        return np.sin(phase) * np.exp(-since / 0.003) * 2
    # hiss: noise carried by the pitch
    band = np.convolve(random.standard_normal(len(frequency) + 31), np.hanning(32) / 4, "valid")
    return np.sin(phase) * band


def _tapered(count: int, ends: float) -> np.ndarray:
    ramp = max(1, int(count * ends))
    envelope = np.ones(count)
    envelope[:ramp] = np.linspace(0, 1, ramp)
    envelope[-ramp:] = np.linspace(1, 0, ramp)
    return envelope


def _in_a_room(clip: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Reverberation: noise that dies away, a little of it."""
    taps = int(random.uniform(0.05, 0.2) * SAMPLING_RATE)
    response = random.standard_normal(taps) * np.exp(-5 * np.arange(taps) / taps) * random.uniform(0.01, 0.04)
    response[0] = 1
    size = 1 << (len(clip) + taps).bit_length()  # a transform of any other length takes five times as long
    return np.fft.irfft(np.fft.rfft(clip, size) * np.fft.rfft(response, size), size)[: len(clip)]


def _brownish(random: np.random.Generator) -> np.ndarray:
    """Noise that falls with frequency, as wind and water do."""
    spectrum = np.fft.rfft(random.standard_normal(CLIP_SAMPLES))
    return np.fft.irfft(spectrum / np.sqrt(1 + np.arange(len(spectrum)) / 2000), CLIP_SAMPLES)
