"""Spoken words by espeak-ng: a bank of voices saying every word, and clips put together from it.

Only training needs espeak-ng (Debian package ``espeak-ng``); nothing at run time does.
"""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import butter, resample_poly, sosfilt
from tqdm import tqdm

logger = logging.getLogger(__name__)

RATE = 16_000  # samples a second, as the model hears
WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "yes",
    "no",
    "help",
    "stop",
    "refund",
    "broken",
)
DIGITS = WORDS[:10]
MAX_WORDS = 3
MAX_SECONDS = 6.0

_ACCENTS = (
    "en-us",
    "en-us",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbcwmd",
    "en-gb-x-gbclan",
    "en-029",
    "en-us-nyc",
)
# Variants of espeak-ng's voices that sound like people.
TRAINED_VOICES = """
Alex Alicia Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike
Storm adam anika antonio belinda benjamin boris caleb ed edward f1 f2 f4 gustave iven
iven3 john klatt klatt3 linda m1 m2 m4 m5 m7 marcelo max miguel norbert pablo pedro quincy
rob sandro steph steph3 travis zac
"""
HELD_OUT_VOICES = """
Andrea Gene2 Nguyen aunty david edward2 f3 f5 grandpa iven2 klatt2 m3 m6 m8 michel paul
robert shelby steph2 victor
"""


@dataclass(frozen=True, slots=True)
class Bank:
    """Recordings of every word: ``sounds[voice][word]``, float32 in [-1, 1] at :data:`RATE`."""

    sounds: list[list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Clip:
    """A voice note: its samples, its words, and when each is said (start, end in seconds)."""

    samples: np.ndarray
    words: tuple[str, ...]
    times: tuple[tuple[float, float], ...]


def load_bank(file: Path, voices: int, *, held_out: bool, seed: int) -> Bank:
    """The bank in ``file``, rendered there first when it is missing.

    Args:
        file: ``.npz`` file.
        voices: how many voices: an accent, a variant, a speed, a pitch, a length of throat.
        held_out: only variants that training never hears; else only the others.
        seed: of the choices.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
    """
    if not file.is_file():
        if shutil.which("espeak-ng") is None:
            raise FileNotFoundError("espeak-ng is missing (Debian: apt install espeak-ng)")
        rng = random.Random(f"voices {seed} {held_out}")
        variants = (HELD_OUT_VOICES if held_out else TRAINED_VOICES).split()
        sounds = [_speaker(rng, variants) for _ in tqdm(range(voices), desc=file.stem)]
        lengths = np.array([[len(sound) for sound in speaker] for speaker in sounds])
        flat = np.concatenate([sound for speaker in sounds for sound in speaker])
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, lengths=lengths, samples=(flat * 32767).astype(np.int16))
    with np.load(file) as saved:
        lengths, samples = saved["lengths"], saved["samples"].astype(np.float32) / 32768
    parts = np.split(samples, np.cumsum(lengths.reshape(-1))[:-1])
    width = len(WORDS)
    return Bank([parts[start : start + width] for start in range(0, len(parts), width)])


def make_clip(bank: Bank, rng: random.Random, words: tuple[str, ...] | None = None) -> Clip:
    """One to three words by one voice, over a line of chance quality."""
    speaker = rng.choice(bank.sounds)
    if words is None:
        words = tuple(rng.choice(WORDS) for _ in range(rng.randint(1, MAX_WORDS)))
    pieces, times = [_silence(rng, 0.04, 0.4)], []
    at = len(pieces[0])
    for index, word in enumerate(words):
        if index:
            pieces.append(_silence(rng, 0.06, 0.35))
            at += len(pieces[-1])
        sound = speaker[WORDS.index(word)] * rng.uniform(0.7, 1.0)
        pieces.append(sound.astype(np.float32))
        times.append((at / RATE, (at + len(sound)) / RATE))
        at += len(sound)
    pieces.append(_silence(rng, 0.04, 0.4))
    samples = _line(np.concatenate(pieces), rng)[: int(MAX_SECONDS * RATE)]
    return Clip(samples, words, tuple(times))


def _speaker(rng: random.Random, variants: list[str]) -> list[np.ndarray]:
    """All words by one voice of chance; a voice whose words cannot be told apart is drawn again."""
    while True:
        voice = f"{rng.choice(_ACCENTS)}+{rng.choice(variants)}"
        speed, pitch = rng.randint(110, 190), rng.randint(25, 75)
        throat = rng.randint(88, 114)  # per cent: resampling shortens or lengthens it
        words = _split(_say(voice, speed, pitch, throat))
        if len(words) == len(WORDS):
            return words
        logger.info("%s says %d words in place of %d", voice, len(words), len(WORDS))


def _say(voice: str, speed: int, pitch: int, throat: int) -> np.ndarray:
    """All words with pauses between; starting espeak-ng takes longer than speaking."""
    text = '<break time="900ms"/>'.join(WORDS)
    command = ["espeak-ng", "-m", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout"]
    wav = subprocess.run([*command, text], check=True, capture_output=True).stdout
    # 22,050 Hz behind a header of 44 bytes whose length field is not filled in
    samples = np.frombuffer(wav[44 : len(wav) // 2 * 2], dtype="<i2").astype(np.float32) / 32768
    return np.asarray(resample_poly(samples, 320 * 100, 441 * throat), dtype=np.float32)


def _split(samples: np.ndarray, pause: float = 0.4) -> list[np.ndarray]:
    """What is between pauses."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    cuts = np.flatnonzero(np.diff(loud) > pause * RATE)
    starts, ends = np.concatenate([[0], cuts + 1]), np.concatenate([cuts, [len(loud) - 1]])
    return [trim(samples[loud[a] : loud[b] + 1]) for a, b in zip(starts, ends, strict=True)]


def trim(samples: np.ndarray, floor: float = 0.02) -> np.ndarray:
    """Without the quiet at both ends, as loud as 0.9 at its loudest."""
    loud = np.flatnonzero(np.abs(samples) > floor * np.abs(samples).max())
    part = samples[max(0, loud[0] - 160) : loud[-1] + 320]
    return np.asarray(0.9 * part / np.abs(part).max(), dtype=np.float32)


def _silence(rng: random.Random, low: float, high: float) -> np.ndarray:
    return np.zeros(int(rng.uniform(low, high) * RATE), dtype=np.float32)


def _line(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """A telephone, a room, a noise, a volume; each of chance."""
    noise = np.random.default_rng(rng.getrandbits(32))
    if rng.random() < 0.4:
        low_pass = butter(4, rng.uniform(3000, 3900), "lowpass", fs=RATE, output="sos")
        samples = sosfilt(low_pass, samples).astype(np.float32)
    if rng.random() < 0.3:
        tilt = rng.uniform(-0.6, 0.6)
        samples = (samples + tilt * np.concatenate([[0], samples[:-1]])).astype(np.float32)
    if rng.random() < 0.3:
        delay, gain = int(rng.uniform(0.01, 0.06) * RATE), rng.uniform(0.1, 0.35)
        echo = np.concatenate([np.zeros(delay, np.float32), samples])[: len(samples)]
        samples = samples + gain * echo
    level = float(np.sqrt(np.mean(samples**2)) + 1e-6)
    hiss = noise.standard_normal(len(samples), dtype=np.float32)
    if rng.random() < 0.5:  # a duller noise
        hiss = (hiss + np.concatenate([[0], hiss[:-1]])) / 1.4
    samples = samples + hiss * level * 10 ** (-rng.uniform(12, 50) / 20)
    loudest = float(np.abs(samples).max()) + 1e-6
    return np.asarray(samples * rng.uniform(0.2, 0.98) / loudest, dtype=np.float32)
