"""What quantised weights stand for, written down once more from the formats' definition: an oracle for the engine's.

One block after the other and one weight after the other, in float32 where ggml's reference computes in float32.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "bf16": 64}


def _float16(x: np.float32) -> bytes:
    return np.float16(x).tobytes()


def _inverse(d: np.float32) -> np.float32:
    return np.float32(1) / d if d else np.float32(0)


def _nibbles(q: list[int]) -> bytes:
    return bytes(q[i] + 16 * q[i + 16] for i in range(16))


def _bfloat16(x: np.float32) -> bytes:
    """The nearer of the two numbers around x that have no more than eight digits, or the even one."""
    bits = int(np.float32(x).view(np.uint32))
    below, above = bits >> 16, (bits >> 16) + 1
    down, up = (abs(_widened(upper) - float(x)) for upper in (below, above))
    return (below if down < up or (down == up and below % 2 == 0) else above).to_bytes(2, "little")


def _widened(upper: int) -> float:
    return float(np.uint32(upper << 16).view(np.float32))


def encoded_block(x: np.ndarray, scheme: str) -> bytes:
    """The bytes of a block of 32 float32 numbers."""
    if scheme == "bf16":
        return b"".join(map(_bfloat16, x))
    if scheme == "q8_0":
        d = np.float32(max(abs(v) for v in x)) / np.float32(127)
        scaled = [float(v * _inverse(d)) for v in x]
        whole = [int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in scaled]  # exact: in double
        return _float16(d) + np.array(whole, np.int8).tobytes()
    if scheme == "q4_0":
        largest = np.float32(0)
        for v in x:  # the first of the largest
            largest = v if abs(v) > abs(largest) else largest
        d = largest / np.float32(-8)
        return _float16(d) + _nibbles([min(15, int(v * _inverse(d) + np.float32(8.5))) for v in x])
    least, d = min(x), (max(x) - min(x)) / np.float32(15)
    q = [min(15, int((v - least) * _inverse(d) + np.float32(0.5))) for v in x]
    return _float16(d) + _float16(least) + _nibbles(q)


def decoded_block(block: bytes, scheme: str) -> list[float]:
    """The 32 numbers that a block stands for, exactly."""
    if scheme == "bf16":
        return [_widened(int(upper)) for upper in np.frombuffer(block, np.uint16)]
    d = float(np.frombuffer(block[:2], np.float16)[0])
    if scheme == "q8_0":
        return [d * (byte - 256 if byte > 127 else byte) for byte in block[2:]]
    m = float(np.frombuffer(block[2:4], np.float16)[0]) if scheme == "q4_1" else -8 * d
    data = block[4 if scheme == "q4_1" else 2:]
    return [d * q + m for q in [*(byte % 16 for byte in data), *(byte // 16 for byte in data)]]


def encoded(weight: np.ndarray, scheme: str) -> np.ndarray:
    """The blocks of a matrix (n, k): uint8 (n, k/32 · bytes of a block)."""
    n, k = weight.shape
    rows = [b"".join(encoded_block(row[at:at + 32], scheme) for at in range(0, k, 32))
            for row in weight.astype(np.float32)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(n, k // 32 * BLOCK_BYTES[scheme])


def decoded(blocks: np.ndarray, scheme: str) -> np.ndarray:
    """The matrix that blocks stand for, in float64, exactly."""
    size = BLOCK_BYTES[scheme]
    n, steps = blocks.shape[0], blocks.shape[1] // size
    numbers = [decoded_block(row[at * size:(at + 1) * size].tobytes(), scheme) for row in blocks for at in range(steps)]
    return np.array(numbers, np.float64).reshape(n, steps * 32)
