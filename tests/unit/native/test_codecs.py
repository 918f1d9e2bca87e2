"""Compressed records: what h5py and hdf5plugin write is read back, and what nobody wrote does no harm."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

_native = pytest.importorskip("mpi_kernels._native", reason="the extension is not built: pip install -e . (needs cc)")

CODECS = {"bitshuffle-lz4": 1, "lz4": 2, "bitshuffle": 3}  # and their numbers in native.h
SETS: list[str] = _native.codec_instruction_sets()
DTYPES = ("u1", "u2", "u4", "u8")
KINDS = ("zeros", "counts", "sparse", "ramp", "random", "ones", "late")


def pixels(kind: str, dtype: str, n: int, seed: int = 0) -> np.ndarray:
    """(n,) pixels: from what compresses to nothing to what does not compress at all."""
    rng = np.random.default_rng(seed)
    most = np.iinfo(dtype).max
    made = {
        "zeros": lambda: np.zeros(n),
        "counts": lambda: rng.poisson(0.8, n),
        "sparse": lambda: rng.poisson(0.01, n),
        "ramp": lambda: np.arange(n) // 3 % 251,
        "random": lambda: rng.integers(0, most, n, dtype, endpoint=True),
        "ones": lambda: np.where(rng.random(n) < 0.9, np.array(most, dtype), np.array(0, dtype)),
        "late": lambda: np.r_[np.zeros(n - n // 9), rng.integers(0, 99, n // 9)],
    }
    return made[kind]().astype(dtype)


def encode(codec: str, values: np.ndarray, block: int = 0) -> bytes:
    """The one chunk that HDF5 makes of them; `block` in elements (bitshuffle) or bytes (LZ4), 0: the default."""
    made = {
        "bitshuffle-lz4": lambda: hdf5plugin.Bitshuffle(nelems=block, cname="lz4"),
        "bitshuffle": lambda: hdf5plugin.Bitshuffle(nelems=block, cname="none"),
        "lz4": lambda: hdf5plugin.LZ4(nbytes=block),
    }
    with h5py.File("unnamed", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("d", data=values, chunks=values.shape, **made[codec]())
        skipped, data = dataset.id.read_direct_chunk((0,) * values.ndim)
    assert not skipped
    return bytes(data)


def decode(codec: str, element: int, data: bytes, out_bytes: int, instructions: str | None = None) -> bytes:
    """What the decoder makes of them, in a buffer whose neighbours must not change."""
    whole = bytearray(b"\xa5" * (out_bytes + 128))
    try:
        _native.decode(codec, element, data, memoryview(whole)[64 : 64 + out_bytes], instructions)
    finally:
        assert whole[:64] == whole[64 + out_bytes :] == b"\xa5" * 64
    return bytes(whole[64 : 64 + out_bytes])


def masks_of(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, list[bytes]]:
    """(k, n) bool, the first all true, and the same as bits."""
    masks = np.random.default_rng(seed).random((k, n)) < np.linspace(1, 0.1, k)[:, None]
    return masks, [np.packbits(mask, bitorder="little").tobytes() for mask in masks]


def dense_sums(values: np.ndarray, masks: np.ndarray) -> tuple[list[int], int]:
    full = int((values == np.iinfo(values.dtype).max).sum())
    return [sum(map(int, values[mask])) for mask in masks], full


# --- what is written is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_records_of_hdf5plugin_are_read(codec: str, dtype: str, instructions: str) -> None:
    element = np.dtype(dtype).itemsize
    for n in (1, 7, 8, 9, 63, 64, 65, 519, 4096, 4099, 8192 * 2 + 8, 128 * 128, 130 * 131):
        for kind in KINDS:
            values = pixels(kind, dtype, n)
            assert decode(codec, element, encode(codec, values), values.nbytes, instructions) == values.tobytes(), (
                n,
                kind,
            )


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(["bitshuffle-lz4", "lz4"]),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 6000),
    kind=st.sampled_from(KINDS),
    block=st.integers(0, 600),
    seed=st.integers(0, 99),
)
@example(codec="bitshuffle-lz4", dtype="u2", n=200_000, kind="counts", block=8000, seed=1)
@example(codec="lz4", dtype="u2", n=200_000, kind="counts", block=99_999, seed=1)
def test_any_block_size(codec: str, dtype: str, n: int, kind: str, block: int, seed: int) -> None:
    values = pixels(kind, dtype, n, seed)
    data = encode(codec, values, block * 8 if codec == "bitshuffle-lz4" else block)
    for instructions in SETS:
        assert decode(codec, values.itemsize, data, values.nbytes, instructions) == values.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(["u1", "u2", "u4"]),
    n=st.integers(1, 6000),
    kind=st.sampled_from(KINDS),
    block=st.integers(0, 200),
    k=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@example(dtype="u2", n=128 * 128, kind="ones", block=0, k=4, seed=0)
@example(dtype="u4", n=5 * 2048 + 7, kind="random", block=0, k=3, seed=0)
def test_sums_over_masks_are_those_of_the_pixels(dtype: str, n: int, kind: str, block: int, k: int, seed: int) -> None:
    values = pixels(kind, dtype, n, seed)
    masks, bits = masks_of(n, k, seed)
    data = encode("bitshuffle-lz4", values, 8 * block)
    for instructions in SETS:
        assert _native.decode_masks(values.itemsize, data, values.nbytes, bits, instructions) == dense_sums(
            values, masks
        )


def test_the_largest_sums_are_exact() -> None:
    values = np.full(100_003, 2**32 - 1, "u4")
    masks, bits = masks_of(values.size, 2)
    data = encode("bitshuffle-lz4", values)
    sums, full = _native.decode_masks(4, data, values.nbytes, bits)
    assert sums == [values.size * (2**32 - 1), int(masks[1].sum()) * (2**32 - 1)]
    assert full == values.size


@pytest.mark.needs_data
@pytest.mark.parametrize("file", ["arina_layout_9x256x256_data_000001.h5", "arina_layout_9x256x256_data_000002.h5"])
def test_chunks_of_a_detector_file(file: str, real_data: Path) -> None:
    with h5py.File(real_data / "transcoded" / file) as stored:
        dataset = stored["entry/data/data"]
        for i in range(len(dataset)):
            frame = dataset[i]
            data = dataset.id.read_direct_chunk((i, 0, 0))[1]
            masks, bits = masks_of(frame.size, 3)
            assert frame.any()
            assert decode("bitshuffle-lz4", 4, data, frame.nbytes) == frame.tobytes()
            assert _native.decode_masks(4, data, frame.nbytes, bits) == dense_sums(frame.ravel(), masks)


def test_threads_do_not_meet() -> None:
    records = [(v, encode("bitshuffle-lz4", v)) for v in (pixels("counts", "u2", 1 << 17, seed) for seed in range(4))]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            made = pool.map(lambda r: decode("bitshuffle-lz4", 2, r[1], r[0].nbytes) == r[0].tobytes(), records)
            assert all(made)


# --- LZ4 blocks that no encoder happens to write ----------------------------------------------------------------------


class Sequence(NamedTuple):
    """Literals, then a match; no match (0) in the last one."""

    literals: bytes
    distance: int = 0
    length: int = 0


def block_of(sequences: list[Sequence]) -> tuple[bytes, bytes]:
    """An LZ4 block and what it means, byte by byte.  Source: LZ4 block format."""

    def more(n: int) -> bytes:
        return b"" if n < 15 else b"\xff" * ((n - 15) // 255) + bytes([(n - 15) % 255])

    block, plain = bytearray(), bytearray()
    for literals, distance, length in sequences:
        match = length - 4 if distance else 0
        block += bytes([min(len(literals), 15) << 4 | min(match, 15)]) + more(len(literals)) + literals
        plain += literals
        if distance:
            block += struct.pack("<H", distance) + more(match)
            for _ in range(length):
                plain.append(plain[-distance])
    return bytes(block), bytes(plain)


def record_of(block: bytes, size: int) -> bytes:
    return struct.pack(">QII", size, size, len(block)) + block


@pytest.mark.parametrize("distance", [*range(1, 36), 63, 64, 65])
def test_matches_of_every_distance_and_length(distance: int) -> None:
    first = bytes(range(1, 1 + distance))
    for length in (*range(4, 70), 300, 1000):
        for last in (b"", b"12345", bytes(range(60))):  # how near the end of the buffer is
            block, plain = block_of([Sequence(first, distance, length), Sequence(last)])
            if len(block) != len(plain):
                assert decode("lz4", 1, record_of(block, len(plain)), len(plain)) == plain, (length, last)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_any_sequences(rng: random.Random, n: int) -> None:
    sequences, size = [], 0
    for _ in range(n):
        literals = rng.randbytes(rng.choice([0, 0, 1, 3, 14, 15, 16, 40, 269, 270, 271, 600]) or not size)
        size += len(literals)
        distance = min(size, rng.choice([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 200, 65535]))
        length = rng.choice([4, 5, 8, 17, 18, 19, 33, 272, 273, 274, 1500])
        size += length
        sequences.append(Sequence(literals, distance, length))
    sequences.append(Sequence(rng.randbytes(rng.choice([0, 1, 5, 20]))))
    block, plain = block_of(sequences)
    assume(len(block) != len(plain))
    assert decode("lz4", 1, record_of(block, len(plain)), len(plain)) == plain


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (b"", 1),
        (b"\x20a", 3),  # a literal that is not there
        (b"\x18a\x00\x00\x10b", 14),  # distance 0
        (b"\x18a\x02\x00\x10b", 14),  # before the start
        (b"\x18a\xff\xff\x10b", 14),
        (b"\x10a\x01\x00", 5),  # no last sequence
        (b"\x10a\x01", 5),  # half a distance
        (b"\x18a\x01\x00\x10b", 15),  # 14 bytes, not 15
        (b"\x18a\x01\x00\x10b", 13),
        (b"\xf0" + b"\xff" * 5000, 100),  # a length without end
        (b"\x1fa\x01\x00" + b"\xff" * 5000 + b"\x00\x00", 100),
    ],
)
def test_damaged_blocks_are_refused(block: bytes, size: int) -> None:
    with pytest.raises(ValueError, match=rf"can't be decoded into {size} bytes"):
        decode("lz4", 1, record_of(block, size), size)


# --- hostile records --------------------------------------------------------------------------------------------------

SIZES = (0, 1, 4095, 8191, 8193, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8)
BLOCKS = {"bitshuffle-lz4": (2, 8, 18, 4096, 2**31, 2**32 - 1), "lz4": (0, 1, 4096, 8191)}


@pytest.mark.parametrize("codec", BLOCKS)
def test_headers_that_lie_are_refused(codec: str) -> None:
    values = pixels("counts", "u2", 3 * 4096)
    good = encode(codec, values, 4096 if codec == "bitshuffle-lz4" else 8192)
    assert decode(codec, 2, good, values.nbytes) == values.tobytes()
    liars = [struct.pack(">Q", size) + good[8:] for size in SIZES]
    liars += [good[:8] + struct.pack(">I", block) + good[12:] for block in BLOCKS[codec]]
    liars += [good[:12] + struct.pack(">I", length) + good[16:] for length in (0, 1, 2**31, 2**32 - 1)]
    liars += [good[:n] for n in (0, 1, 11, 12, 15, 16, len(good) // 2, len(good) - 1)]
    for liar in liars:
        with pytest.raises(ValueError, match="can't be decoded"):
            decode(codec, 2, liar, values.nbytes)
        if codec == "bitshuffle-lz4":
            with pytest.raises(ValueError, match="can't be decoded"):
                _native.decode_masks(2, liar, values.nbytes, [])


def test_a_block_size_of_0_is_the_default_and_bytes_after_the_end_are_ignored() -> None:
    values = pixels("counts", "u2", 3 * 4096 + 3)
    good = encode("bitshuffle-lz4", values)
    assert decode("bitshuffle-lz4", 2, good[:8] + bytes(4) + good[12:] + b"more", values.nbytes) == values.tobytes()


def test_blocks_and_records_of_broken_elements_are_refused() -> None:
    twelve, _ = block_of([Sequence(bytes(12))])  # as a block of 12 elements, which can't be shuffled by eights
    part = struct.pack(">I", len(twelve)) + twelve
    with pytest.raises(ValueError, match="can't be decoded into 24 bytes"):
        decode("bitshuffle-lz4", 1, struct.pack(">QI", 24, 12) + 2 * part, 24)
    planes, _ = block_of([Sequence(bytes(16))])
    part = struct.pack(">I", len(planes)) + planes
    assert decode("bitshuffle-lz4", 2, struct.pack(">QI", 18, 16) + part + b"ab", 18) == bytes(16) + b"ab"
    with pytest.raises(ValueError, match="can't be decoded into 17 bytes"):
        decode("bitshuffle-lz4", 2, struct.pack(">QI", 17, 16) + part + b"a", 17)


def test_what_the_caller_may_ask() -> None:
    data = encode("bitshuffle-lz4", pixels("counts", "u2", 64))
    for element in (-1, 0, 3, 16):
        with pytest.raises(ValueError, match="elements of"):
            decode("bitshuffle-lz4", element, data, 128)
    with pytest.raises(ValueError, match="elements of 8 bytes"):
        _native.decode_masks(8, data, 128, [])
    with pytest.raises(ValueError, match="mask 1 has 7 bytes, but the pixels need 8"):
        _native.decode_masks(2, data, 128, [bytes(8), bytes(7)])
    with pytest.raises(ValueError, match="no codec is called gzip"):
        decode("gzip", 2, data, 128)
    with pytest.raises(ValueError, match="instruction set mmx"):
        decode("bitshuffle-lz4", 2, data, 128, "mmx")
    with pytest.raises(ValueError, match="-2 bytes"):
        _native.decode_masks(2, data, -2, [])
    with pytest.raises(TypeError):
        _native.decode("bitshuffle-lz4", 2, data, np.zeros(128, "u2")[::2])
    with pytest.raises(TypeError):
        _native.decode_masks(2, data, 128, [None])


@pytest.mark.parametrize("codec", CODECS)
def test_mutants_decode_whole_or_are_refused(codec: str) -> None:
    rng = random.Random(7)
    refused = 0
    for round_ in range(3000):
        values = pixels(rng.choice(KINDS), "u2", rng.choice([5, 64, 500, 5000]), round_ % 5)
        mutant = bytearray(encode(codec, values, 512 if codec == "lz4" else 0))
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(mutant))
            mutant[at] = rng.choice([0, 255, 0xF0, 0x0F, 1, mutant[at] ^ 1 << rng.randrange(8)])
        mutant = mutant[: rng.choice([len(mutant), len(mutant), rng.randrange(len(mutant))])] + bytes(rng.randrange(3))
        try:
            decode(codec, 2, bytes(mutant), values.nbytes, rng.choice(SETS))
        except ValueError:
            refused += 1
    assert 100 < refused < 3000


# --- the same under the sanitizers ------------------------------------------------------------------------------------


def seeds() -> bytes:
    """Records for the fuzzer: small enough to be many, of all codecs, elements and shapes of blocks."""
    made = b""
    for codec, number in CODECS.items():
        for dtype in DTYPES:
            for n, block in ((3, 0), (8, 0), (77, 8), (640, 64), (1003, 128), (1003, 0), (9000, 0)):
                for kind in KINDS[: 2 if n > 5000 else None]:
                    values = pixels(kind, dtype, n)
                    data = encode(codec, values, 0 if codec == "bitshuffle" else block)
                    made += struct.pack("<IIII", number, values.itemsize, values.nbytes, len(data)) + data
    return made


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_mutant_touches_memory_of_others(sanitized: Callable[[str, str, str], Path], tmp_path: Path) -> None:
    fuzz = sanitized("fuzz_codecs.c", "codecs*.c", "-O3")
    (tmp_path / "seeds").write_bytes(seeds())
    environment: dict[str, Any] = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=0"}
    done = subprocess.run(
        [fuzz, tmp_path / "seeds", "1000000", "20240607"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[:4000]
    good, bad = map(int, done.stdout.split())
    assert good + bad == 1_000_000
    assert min(good, bad) > 100_000  # neither refuses all, nor believes all
