"""Checkpoints as byte ranges: safetensors headers, tensors read in pieces, an output folder that appears whole.

A safetensors file is 8 bytes (the header's length, little endian), a JSON header {name: {dtype, shape, data_offsets}},
then the tensors' bytes. No torch here: numpy alone starts in 0.15 s and 25 MB, torch in 1.3 s and 220 MB.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from lmolt import ownership

# glibc returns each freed array of half a MiB to the system and faults its pages in again, a third of a merge's time,
# until a larger one was freed; this one is never touched.
np.empty(1 << 24, np.uint8)

# numpy has no bfloat16: its bits travel as uint16
STORAGE = {"BF16": np.dtype(np.uint16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PIECE = 1 << 16  # values worked on at a time: a quarter of a MiB in float32, so that a few stay in a core's cache

COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


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


def find_folder(name: str, revision: str | None = None) -> Path:
    """The folder `name`, or that of the Hub id `name` after downloading what merging needs (never pickled weights)."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "model.safetensors.index.json", "adapter_config.json", *COPIED]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name}: no such folder here, and not to be had from the Hub: {error}") from error


def read_header(file: Path) -> list[Entry]:
    """The tensors of a safetensors file in the order of their bytes; `ValueError` if it is cut off or no such file."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= total - 8:
            raise ValueError(f"{file}: not a safetensors file, or cut off ({total} bytes); download or save it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: its header is not JSON ({error}); download or save it again") from error
    header.pop("__metadata__", None)
    entries, end = [], 8 + length
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        entry = Entry(name, about["dtype"], tuple(about["shape"]), file, 8 + length + about["data_offsets"][0])
        if entry.dtype not in STORAGE:
            raise ValueError(
                f"{file}: {name} is of type {entry.dtype}; merging takes bf16, fp16 and fp32 weights"
                " (dequantise the model first if these are quantised)"
            )
        stop = entry.offset + entry.size * STORAGE[entry.dtype].itemsize
        if entry.offset != end or stop != 8 + length + about["data_offsets"][1]:
            raise ValueError(f"{file}: {name} of shape {list(entry.shape)} does not fill its bytes; save it again")
        end = stop
        entries.append(entry)
    if not entries:
        raise ValueError(f"{file}: holds no tensor; save the model again")
    if end != total:
        raise ValueError(f"{file}: {total} bytes where its header says {end}: cut off; download or save it again")
    return entries


class Checkpoint:
    """A model folder: `entries` {name: Entry}, `files` {shard's name: its entries in order}, `config` (a dict)."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder (a Hub id looks like org/name)")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            weight_map, paths = None, [folder / "model.safetensors"]
        for path in paths:
            if not path.is_file():
                remedy = "its index names it; download it again" if weight_map else self._remedy()
                raise FileNotFoundError(f"{path}: there is no such file; {remedy}")
        self.files = {path.name: read_header(path) for path in paths}
        self.entries = {entry.name: entry for entries in self.files.values() for entry in entries}
        if weight_map and (odd := set(weight_map) ^ set(self.entries)):
            raise ValueError(f"{index}: does not agree with its shards about {sorted(odd)[:3]} ({len(odd)} tensors)")
        config = folder / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{config}: there is no such file; a model folder has one")
        self.config = json.loads(config.read_text())

    def _remedy(self) -> str:
        if (self.folder / "adapter_config.json").is_file():
            return f"that is an adapter, so fold it into its base first: merge.py --models BASE --adapter {self.folder}"
        return "merging takes safetensors: load the model with transformers and save_pretrained it, which writes them"

    @property
    def dtype(self) -> str:
        """The type of most of its values."""
        counts = Counter()
        for entry in self.entries.values():
            counts[entry.dtype] += entry.size
        return counts.most_common(1)[0][0]

    def read(self, name: str, work: type = np.float32) -> Iterator[np.ndarray]:
        """The tensor's values, flattened, in pieces of `PIECE`, as `work` (np.float32 or np.float64)."""
        return entry_values(self.entries[name], work)

    def sample(self, name: str, work: type = np.float32, runs: int = 256, length: int = 256) -> np.ndarray:
        """`runs` stretches of `length` values, evenly over the tensor; all of it if it is no longer than that."""
        entry = self.entries[name]
        storage = STORAGE[entry.dtype]
        if entry.size <= runs * length:
            return np.concatenate([*self.read(name, work), np.empty(0, work)])
        bits = np.empty((runs, length), storage)
        with entry.file.open("rb", buffering=0) as stream:
            for run, start in zip(bits, np.linspace(0, entry.size - length, runs).astype(int).tolist(), strict=True):
                stream.seek(entry.offset + start * storage.itemsize)
                stream.readinto(memoryview(run).cast("B"))
        return decode(bits.ravel(), entry.dtype, work)


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


def decode(bits: np.ndarray, dtype: str, work: type = np.float32) -> np.ndarray:
    """Stored values as `work`, exactly."""
    if dtype != "BF16":
        return bits.astype(work)
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32).astype(work, copy=False)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 or float64 rounded to the nearest stored value, ties to even."""
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


def all_finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether no stored value is NaN or infinite: those have all bits of the exponent set, more than any other."""
    kind, sign, infinity = {
        "BF16": (np.uint16, 0x8000, 0x7F80),
        "F16": (np.uint16, 0x8000, 0x7C00),
        "F32": (np.uint32, 0x80000000, 0x7F800000),
    }[dtype]
    return bool((bits.view(kind) & kind(sign - 1)).max() < infinity)


def inspect_file(entries: list[Entry], advance: Callable[[int], object]) -> str:
    """The file's SHA-256, in one reading that also finds NaN and infinity: `ValueError` naming file and tensor."""
    file = entries[0].file
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(entries[0].offset))
    for entry in entries:
        for bits in read_bits(file, STORAGE[entry.dtype], entry.offset, entry.size, 4 * PIECE):
            digest.update(bits)
            if not all_finite(bits, entry.dtype):
                raise ValueError(f"{file}: {entry.name} holds NaN or infinity; this model is broken, take another one")
            advance(bits.size)
    return digest.hexdigest()


def check_room(folder: Path, layout: dict[str, list], dtype: str) -> None:
    """`ValueError` if the disk can't take a model of this layout; what an earlier merge left unfinished makes room."""
    needed = sum(prod(shape) for tensors in layout.values() for _, shape in tensors) * STORAGE[dtype].itemsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    left = sum(file.stat().st_size for file in partial_folder(folder).glob("*"))
    free = shutil.disk_usage(folder.parent).free + left
    if needed + (1 << 20) > free:
        raise ValueError(f"{folder}: needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free on that disk")


def partial_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def replaced_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


class OutputFolder:
    """A model folder in the making: `NAME.partial` beside it, renamed when it is whole.

    `layout` {shard's name: [(tensor, shape), ...]}: tensors are written in that order, each followed by a line of
    `journal.jsonl`, so that a merge killed at any moment goes on from its last finished tensor to the same bytes.
    `plan` is what those bytes depend on; another plan's journal is refused.
    """

    def __init__(self, folder: Path, layout: dict[str, list], dtype: str, plan: dict, resume: bool):
        self.folder, self.layout, self.dtype = folder, layout, dtype
        self.partial = partial_folder(folder)
        self.journal = self.partial / "journal.jsonl"
        plan_file = self.partial / "plan.json"
        self.done: list[list] = []  # the finished tensors' records and the shard's SHA-256 up to there, in order
        if resume and plan_file.is_file():
            if json.loads(plan_file.read_text()) != plan:
                raise ValueError(f"{self.partial} was begun with other models or arguments; leave --resume out")
            lines = self.journal.read_text().splitlines(keepends=True) if self.journal.is_file() else []
            self.done = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut off
            self.journal.write_text("".join(json.dumps(record) + "\n" for record in self.done))
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        ownership.claim(self.partial, "merge", ["*"])  # until it is whole: then by name
        temporary = plan_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan))
        temporary.replace(plan_file)

    def write_tensors(self, produce) -> tuple[list[dict], dict[str, str]]:
        """Call `produce(name, write)` for each tensor in order: it hands encoded pieces to `write`, returns a record.

        Returns the records of all tensors and each shard's SHA-256.
        """
        records, digests, left = [], {}, list(self.done)
        with self.journal.open("a") as journal:
            for shard, tensors in self.layout.items():
                header, ends = self._header(tensors)
                finished = left[: len(tensors)]
                left = left[len(tensors) :]
                kept = ends[len(finished) - 1] if finished else 0
                path = self.partial / shard
                path.touch()
                with path.open("r+b") as stream:
                    stream.truncate(kept)
                    digest = hashlib.file_digest(stream, "sha256")  # what an earlier run wrote; leaves us at its end
                    if finished and digest.hexdigest() != finished[-1][1]:
                        raise ValueError(f"{path} is damaged (its SHA-256 differs); leave --resume out to start anew")
                    if not kept:
                        stream.write(header)
                        digest.update(header)

                    def write(piece: np.ndarray, stream=stream, digest=digest) -> None:
                        stream.write(piece)
                        digest.update(piece)

                    records += [record for record, _ in finished]
                    for name, _ in tensors[len(finished) :]:
                        records.append({"tensor": name, **produce(name, write)})
                        stream.flush()
                        journal.write(json.dumps([records[-1], digest.hexdigest()]) + "\n")
                        journal.flush()
                    os.fsync(stream.fileno())
                digests[shard] = digest.hexdigest()
        return records, digests

    def _header(self, tensors: list) -> tuple[bytes, list[int]]:
        """The shard's first bytes, and where each tensor ends in the file."""
        header, at, ends = {"__metadata__": {"format": "pt"}}, 0, []
        for name, shape in tensors:
            end = at + prod(shape) * STORAGE[self.dtype].itemsize
            header[name] = {"dtype": self.dtype, "shape": list(shape), "data_offsets": [at, end]}
            ends.append(end)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
        return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]

    def finish(self, source: Checkpoint, changes: dict) -> None:
        """Index, config and tokenizer beside the shards (`source`'s; `changes` of the config), then the final name."""
        if len(self.layout) > 1:
            weight_map = {name: shard for shard, tensors in self.layout.items() for name, _ in tensors}
            size = sum(prod(shape) for tensors in self.layout.values() for _, shape in tensors)
            index = {"metadata": {"total_size": size * STORAGE[self.dtype].itemsize}, "weight_map": weight_map}
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, self.partial / name)  # not its mode: the umask decides
        config = source.config | changes
        for key in [key for key in config if key.endswith("_config") and isinstance(config[key], dict)]:
            inner = {name: value for name, value in changes.items() if name in config[key]}
            config[key] = config[key] | inner  # text_config of a composite model
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4 reads the first, 5 both
        config[key] = {dtype: name for name, dtype in NAMES.items()}[self.dtype]
        (self.partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
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
