"""The figures to beat: interpolated byte n-grams and lzma, in bits per byte on the same validation text.

Witten and Bell 1991 (method C), interpolated down to the uniform distribution over 256 bytes. With h a context
of n − 1 bytes, h' the same without its first byte, N(h) how often h was seen and T(h) after how many different
bytes it was followed:

    p_n(c | h) = (N(hc) + T(h) p_{n−1}(c | h')) / (N(h) + T(h)),     p_0 = 1/256,     p_n = p_{n−1} where N(h) = 0

The whole table is one sort: an n-gram is an integer of n bytes, the last byte lowest, so equal n-grams are
neighbours after sorting, the n-grams of a context too, and a shorter n-gram is the low bytes of a longer one.

lzma is the size that the validation text adds to the compressed training text, (|lzma(training + validation)| −
|lzma(training)|) · 8 / |validation| bits per byte, with xz's default preset: its 8 MiB window sees the text just
before, as a model would that had read the training text.
"""

from __future__ import annotations

import json
import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.files import replace_file
from tools.training.corpus import Corpus
from tools.training.errors import json_object

ORDERS = (1, 3, 4, 5)
TEXT_LIMIT = 32 << 20  # bytes of training text that the baselines read: sorting takes 16 bytes of memory for each


def ngrams(text: bytes, n: int) -> np.ndarray:
    """The n-gram that ends at each byte, as an integer; before the text stand zero bytes. n ≤ 8."""
    padded = np.frombuffer(bytes(n - 1) + text, np.uint8)
    codes = np.zeros(len(text), np.uint64)
    for i in range(n):
        codes = (codes << np.uint64(8)) | padded[i:i + len(text)]
    return codes


def run_starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values starts in a sorted array."""
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))


def find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each wanted value its place in sorted keys, and whether it is there at all."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def interpolated_bits(training: bytes, validation: bytes, orders: tuple[int, ...] = ORDERS) -> dict[int, float]:
    """Bits per byte of validation under the n-gram model of each order, counted on training."""
    longest = max(orders)
    ordered = np.sort(ngrams(training, longest))
    starts = run_starts(ordered)
    codes, counts = ordered[starts], np.diff(np.append(starts, len(ordered)))
    probability = np.full(len(validation), 1 / 256)
    bits = {}
    for n in range(1, longest + 1):
        probability = interpolate(probability, *suffixes(codes, counts, n), ngrams(validation, n))
        if n in orders:
            bits[n] = float(-np.log2(probability).mean())
    return bits


def suffixes(codes: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The table of n-grams, sorted, and their counts, from the table of longer ones."""
    low = codes & np.uint64((1 << 8 * n) - 1)
    order = np.argsort(low, kind="stable")
    low = low[order]
    starts = run_starts(low)
    return low[starts], np.add.reduceat(counts[order], starts)


def interpolate(lower: np.ndarray, grams: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """One order up: p_n at each wanted n-gram from p_{n−1} and the table of n-grams."""
    contexts = grams >> np.uint64(8)
    starts = run_starts(contexts)
    seen = np.add.reduceat(counts, starts)                       # N(h)
    followers = np.diff(np.append(starts, len(contexts)))        # T(h)
    place, known = find(grams, wanted)
    count = np.where(known, counts[place], 0)                    # N(hc)
    place, known = find(contexts[starts], wanted >> np.uint64(8))
    seen, followers = seen[place], followers[place]
    return np.where(known, (count + followers * lower) / (seen + followers), lower)


def lzma_bits(training: bytes, validation: bytes) -> float:
    """Bits per byte that validation adds behind training; the two compressions run side by side."""
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(lambda text: len(lzma.compress(text)), (training, training + validation))
    return (after - before) * 8 / len(validation)


def baselines(corpus: Corpus, cache_folder: Path) -> dict[str, float]:
    """Bits per byte of every baseline on the corpus's validation split, by name; computed once per corpus."""
    path = cache_folder / f"baselines-{corpus.sha256[:16]}.json"
    try:
        return {name: float(bits) for name, bits in json_object(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, OverflowError):
        pass
    training = corpus.text("training", TEXT_LIMIT)
    validation = corpus.text("validation", TEXT_LIMIT)
    table = {f"{n}-gram": bits for n, bits in interpolated_bits(training, validation).items()}
    table["lzma"] = lzma_bits(training, validation)
    try:
        replace_file(path, json.dumps(table, indent=1).encode())
    except OSError:
        pass  # the figures are right all the same; a full disk is reported where it costs something
    return table
