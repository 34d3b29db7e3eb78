"""Checkpoints as byte ranges: safetensors headers, tensors read in pieces, an output folder that appears whole.

A safetensors file is 8 bytes (the header's length, little endian), a JSON header {name: {dtype, shape, data_offsets}},
then the tensors' bytes. No torch here: numpy alone starts in 0.15 s and 25 MB, torch in 1.3 s and 220 MB.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from lmolt import ownership
from lmolt.files import read_json, write_whole

# glibc returns each freed array of half a MiB to the system and faults its pages in again, a third of a merge's time,
# until a larger one was freed; this one is never touched.
np.empty(1 << 24, np.uint8)

# numpy has no bfloat16: its bits travel as uint16
FLOATS = {"BF16": np.dtype(np.uint16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
STORAGE = FLOATS | {  # the others are buffers, which are copied
    **{"BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F64": np.dtype(np.float64)},
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (16, 32, 64)},
}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PIECE = 1 << 16  # values worked on at a time: a quarter of a MiB in float32, so that a few stay in a core's cache


@dataclass(frozen=True)
class Entry:
    """One tensor: its type (safetensors' name), its shape, and where its first byte lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the file's start

    @property
    def size(self) -> int:  # values
        return prod(self.shape)


def read_header(file: Path) -> list[Entry]:
    """The tensors of a safetensors file in the order of their bytes; `ValueError` if it is cut off or no such file."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(total - 8, 100_000_000):
            raise ValueError(f"{file}: not a safetensors file, or cut off ({total} bytes); download or save it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: its header is not JSON ({error}); download or save it again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: its header is a {type(header).__name__}, not {{tensor: about}}; save it again")
    header.pop("__metadata__", None)
    entries = []
    for name, about in header.items():
        match about:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if all(
                type(size) is int and size >= 0 for size in shape
            ):
                pass
            case _:
                raise ValueError(f"{file}: the header's entry of {name[:80]!r} is malformed; download or save it again")
        if dtype not in STORAGE:
            raise ValueError(
                f"{file}: {name} is of type {dtype}; merging takes bf16, fp16 and fp32 weights"
                " (dequantise the model first if these are quantised)"
            )
        entry = Entry(name, dtype, tuple(shape), file, 8 + length + start)
        if stop - start != entry.size * STORAGE[dtype].itemsize:
            raise ValueError(f"{file}: {name} of shape {shape} does not fill its bytes; save it again")
        entries.append(entry)
    entries.sort(key=lambda entry: (entry.offset, entry.size))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise ValueError(f"{file}: {entry.name} does not begin where the tensor before it ends; save it again")
        end += entry.size * STORAGE[entry.dtype].itemsize
    if not entries:
        raise ValueError(f"{file}: holds no tensor; save the model again")
    if end != total:
        raise ValueError(f"{file}: {total} bytes where its header says {end}: cut off; download or save it again")
    return entries


def entry_values(entry: Entry, work: type = np.float32) -> Iterator[np.ndarray]:
    """The values of a stored tensor, flattened, in pieces of `PIECE`."""
    for bits in read_bits(entry.file, STORAGE[entry.dtype], entry.offset, entry.size):
        yield decode(bits, entry.dtype, work)


def read_bits(file: Path, storage: np.dtype, offset: int, size: int, piece_size: int = PIECE) -> Iterator[np.ndarray]:
    """`size` values from byte `offset` on, in pieces: read(), not mmap, whose pages would count as resident memory."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        for start in range(0, size, piece_size):
            piece = np.empty(min(piece_size, size - start), storage)
            if stream.readinto(memoryview(piece).cast("B")) != piece.nbytes:
                raise ValueError(f"{file}: ended while it was being read")
            yield piece


def decode_pairs(bits: np.ndarray) -> np.ndarray:
    """bf16 as float32, first the values at even places, then those at odd ones: half the work of taking them in order.

    An odd number of values gets a 0 at its end. For sums over values, and for what `encode_pairs` puts in order again.
    """
    if bits.size % 2:
        bits = np.append(bits, np.uint16(0))
    pairs, values = bits.view(np.uint32), np.empty(bits.size, np.uint32)
    np.left_shift(pairs, 16, out=values[: pairs.size])
    np.bitwise_and(pairs, 0xFFFF0000, out=values[pairs.size :])
    return values.view(np.float32)


def encode_pairs(values: np.ndarray, size: int) -> np.ndarray:
    """The first `size` values of what `decode_pairs` gives, rounded to bf16 as `encode` does."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    even, odd = rounded[: bits.size // 2], rounded[bits.size // 2 :]
    odd &= 0xFFFF0000
    even >>= 16
    even |= odd
    return even.view(np.uint16)[:size]


def decode(bits: np.ndarray, dtype: str, work: type = np.float32) -> np.ndarray:
    """Stored values as `work`, exactly; a new array, which the caller may overwrite."""
    if dtype != "BF16":
        return bits.astype(work)
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32).astype(work, copy=False)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 or float64 rounded to the nearest stored value, ties to even; flat."""
    values = values.reshape(-1)
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # infinity, which the caller looks for
            return values.astype(STORAGE[dtype])
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype(np.uint16)


def encode_at_random(values: np.ndarray, dtype: str, random: np.random.Generator) -> np.ndarray:
    """Rounded up or down with the probabilities that make the expected stored value the exact one.

    bf16: to 2^-16 of the distance between two stored values; fp16 and fp32: to a float64's precision. Flat.
    """
    values = values.reshape(-1)
    if dtype == "BF16":
        bits = values.astype(np.float32, copy=False).view(np.uint32) + random.integers(
            0, 1 << 16, values.size, np.uint32
        )
        return bits.view(np.uint16)[1::2].copy()
    nearest = encode(values, dtype)
    exact = values.astype(np.float64)
    missed = exact - nearest
    other = np.nextafter(nearest, np.where(missed > 0, np.inf, -np.inf).astype(nearest.dtype))
    with np.errstate(invalid="ignore"):
        share = np.abs(missed) / np.abs(other.astype(np.float64) - nearest)
    return np.where(random.random(values.size) < share, other, nearest)


def all_finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether no stored value is NaN or infinite: those have all bits of the exponent set, more than any other.

    The largest as signed integers is of the positive ones, and the largest as unsigned ones of the negative, if any.
    """
    signed, unsigned, sign, infinity = {
        "BF16": (np.int16, np.uint16, 0x8000, 0x7F80),
        "F16": (np.int16, np.uint16, 0x8000, 0x7C00),
        "F32": (np.int32, np.uint32, 0x80000000, 0x7F800000),
    }[dtype]
    return bool(bits.view(signed).max() < infinity and bits.view(unsigned).max() < sign + infinity)


class FirstReading:
    """A file read once from its first byte to its last: hashed, its weights looked at, handed out on the way."""

    def __init__(self, file: Path, advance: Callable[[int], object]):
        import xxhash

        self.file, self.advance, self.place = file, advance, 0
        self.stream, self.digest = file.open("rb", buffering=0), xxhash.xxh3_128()

    def pieces(self, entry: Entry, check: bool = True, size: int = PIECE) -> Iterator[np.ndarray]:
        """The stored values of a tensor that lies further on than the last one; `ValueError` at NaN and infinity."""
        self._skip(entry.offset)
        for start in range(0, entry.size, size):
            bits = np.empty(min(size, entry.size - start), STORAGE[entry.dtype])
            if self.stream.readinto(memoryview(bits).cast("B")) != bits.nbytes:
                raise ValueError(f"{self.file}: ended while it was being read")
            self.digest.update(bits)
            if check and not all_finite(bits, entry.dtype):
                raise not_finite(entry)
            self.place += bits.nbytes
            self.advance(bits.size)
            yield bits

    def _skip(self, until: int) -> None:  # the header, buffers, copies
        while self.place < until:
            piece = self.stream.read(min(until - self.place, 1 << 19))
            if not piece:
                raise ValueError(f"{self.file}: ended while it was being read")
            self.digest.update(piece)
            self.place += len(piece)

    def finish(self) -> str:
        """The file's size and XXH3-128, as files.content_hash has them."""
        self._skip(os.fstat(self.stream.fileno()).st_size)
        self.stream.close()
        return f"{self.place}-{self.digest.hexdigest()}"


def not_finite(entry: Entry) -> ValueError:
    return ValueError(f"{entry.file}: {entry.name} holds NaN or infinity; this model is broken, take another one")


def inspect_file(entries: list[Entry], kept: Container[str], advance: Callable[[int], object]) -> str:
    """The file's size and XXH3-128, in one reading that also finds NaN and infinity; `kept` are buffers: not looked at.

    `ValueError` names file and tensor.
    """
    reading = FirstReading(entries[0].file, advance)
    for entry in entries:
        for _ in reading.pieces(entry, check=entry.name not in kept, size=4 * PIECE):
            pass
    return reading.finish()


def check_room(folder: Path, layout: dict[str, list], beside: int) -> None:
    """`ValueError` if the disk can't take a model of this layout and `beside` bytes of other files.

    What an earlier merge left unfinished makes room.
    """
    needed = sum(prod(shape) * STORAGE[dtype].itemsize for tensors in layout.values() for _, dtype, shape in tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    left = sum(file.stat().st_size for file in partial_folder(folder).glob("*"))
    free = shutil.disk_usage(folder.parent).free + left
    if needed + beside + (1 << 20) > free:
        raise ValueError(f"{folder}: needs {(needed + beside) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there")


def partial_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def replaced_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


class OutputFolder:
    """A model folder in the making: `NAME.partial` beside it, renamed when it is whole.

    `layout` {shard's name: [(tensor, type, shape), ...]}: tensors are written in that order, each followed by a line of
    `journal.jsonl`, so that a merge killed at any moment goes on from its last finished tensor to the same bytes.
    `plan` is what those bytes depend on; another plan's journal is refused.
    """

    def __init__(self, folder: Path, layout: dict[str, list], plan: dict, resume: bool):
        self.folder, self.layout = folder, layout
        self.partial = partial_folder(folder)
        self.journal = self.partial / "journal.jsonl"
        plan_file = self.partial / "plan.json"
        self.done: list[list] = []  # the finished tensors' records and the shard's hash up to there, in order
        if resume and plan_file.is_file():
            if read_json(plan_file) != plan:
                raise ValueError(f"{self.partial} was begun with other models or arguments; leave --resume out")
            lines = self.journal.read_text().splitlines(keepends=True) if self.journal.is_file() else []
            try:
                self.done = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut off
            except ValueError:
                raise ValueError(f"{self.journal} is damaged; leave --resume out to start anew") from None
            self.journal.write_text("".join(json.dumps(record) + "\n" for record in self.done))
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        ownership.claim(self.partial, "merge", ["*"])  # until it is whole: then by name
        write_whole(plan_file, json.dumps(plan))

    def write_tensors(self, produce) -> tuple[list[dict], dict[str, str]]:
        """Call `produce(name, write)` for each tensor in order: it hands encoded pieces to `write`, returns a record.

        Returns the records of all tensors and each shard's size and XXH3-128, as files.content_hash has them.
        """
        import xxhash

        records, digests, left = [], {}, list(self.done)
        with self.journal.open("a") as journal:
            for shard, tensors in self.layout.items():
                header, ends = self._header(tensors)
                finished = left[: len(tensors)]
                left = left[len(tensors) :]
                kept = ends[len(finished) - 1] if finished else 0
                path = self.partial / shard
                path.touch()
                with path.open("r+b", buffering=0) as stream:
                    stream.truncate(kept)
                    digest = hashlib.file_digest(stream, xxhash.xxh3_128)  # what an earlier run wrote; then at its end
                    if finished and digest.hexdigest() != finished[-1][1]:
                        raise ValueError(f"{path} is damaged (its XXH3-128 differs); leave --resume out to start anew")

                    def write(piece, stream=stream, digest=digest, path=path) -> None:
                        view = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
                        digest.update(view)
                        try:
                            while len(view):  # without a buffer a disk may take a part
                                view = view[stream.write(view) :]
                        except OSError as error:
                            raise OSError(error.errno, f"{error.strerror}; --resume goes on", str(path)) from None

                    if not kept:
                        write(header)
                    records += [record for record, _ in finished]
                    for name, *_ in tensors[len(finished) :]:
                        records.append({"tensor": name, **produce(name, write)})
                        journal.write(json.dumps([records[-1], digest.hexdigest()]) + "\n")
                        journal.flush()
                    os.fsync(stream.fileno())
                    digests[shard] = f"{stream.tell()}-{digest.hexdigest()}"
        return records, digests

    def _header(self, tensors: list) -> tuple[bytes, list[int]]:
        """The shard's first bytes, and where each tensor ends in the file."""
        header, at, ends = {"__metadata__": {"format": "pt"}}, 0, []
        for name, dtype, shape in tensors:
            end = at + prod(shape) * STORAGE[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            ends.append(end)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
        return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]

    def finish(self, source: Path, files: list[Path], config: dict, check: Callable[[], object] = lambda: None) -> None:
        """Index, `config` and `files` of the folder `source` beside the shards; `check()`; then the final name."""
        if len(self.layout) > 1:
            weight_map = {name: shard for shard, tensors in self.layout.items() for name, *_ in tensors}
            size = sum(prod(shape) * STORAGE[dtype].itemsize for ts in self.layout.values() for _, dtype, shape in ts)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name in files:
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, self.partial / name)  # not its mode: the umask decides
        (self.partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        check()
        self.journal.unlink()
        (self.partial / "plan.json").unlink()
        names = sorted(file.name for file in self.partial.iterdir() if file.name != ownership.CLAIMS)
        ownership.settle(self.partial, "merge", names)
        replaced = replaced_folder(self.folder)  # --overwrite: the old one stays until now
        _delete_ours(replaced)
        if self.folder.exists():
            self.folder.replace(replaced)
        self.partial.replace(self.folder)
        _delete_ours(replaced)


def _delete_ours(folder: Path) -> None:
    ownership.delete_claimed(folder, "merge")
    with contextlib.suppress(OSError):  # not there, or it holds what others put in meanwhile
        folder.rmdir()
