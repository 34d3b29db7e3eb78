"""Files as all of LMolT reads and writes them: whole or not at all, hashed, cached, as tables; how a command ends."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from lmolt import __version__

# What holds recipes/ and metrics/: the checkout or, of an installed package, the folder that they were put into.
SHIPPED = next(folder for folder in (Path(__file__).with_name("shipped"), Path(__file__).parents[1]) if folder.is_dir())
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")  # .txt, as ChEBI-20 has them, are .tsv


def run_main(main: Callable[[list[str]], object], kept: str = "the same command goes on from what is finished") -> None:
    """Run a command, `main(argv)`, and end it as all of LMolT's commands end.

    Bad input (`ValueError`, `OSError`) is one line and exit code 2, any other error one line with its place and exit
    code 1; LMOLT_DEBUG=1 shows the traceback of both. Ctrl-C says what is `kept`, exit code 130. A reader of the output
    that went away (`| head`) ends it without a word, exit code 141, as a shell counts SIGPIPE.
    """
    if sys.platform == "win32":  # no signals, locks and figures of memory as POSIX has them; the library imports there
        sys.exit("error: LMolT's commands run on Linux and macOS; on Windows, run them in WSL")
    first = os.environ.get("RANK", "0") == "0"  # as accelerate launch numbers processes
    if _has_launcher():
        end_with_parent()
    for stream in (sys.stdout, sys.stderr):  # a screen that can't show a character is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()  # here a reader that went away can still be told from other errors
    except KeyboardInterrupt:
        if first:
            print(f"\nstopped; {kept}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
            sys.exit(141)
        for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", [])):
            bar.close()  # so that the error stands on a line of its own
        if not first:
            time.sleep(5)  # by then the launcher has ended this process too, unless the first one has no such error
        if os.environ.get("LMOLT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError))
        message = " ".join(str(error).split())  # libraries write paragraphs
        full = type(error).__name__ == "OutOfMemoryError"  # torch's, which isn't imported for that
        if full:
            message = f"{message.split('. ')[0]}; a smaller --tokens_per_batch or batch size takes less, and so do "
            message += "--gradient_checkpointing true and --load_in_4bit"
        elif not expected:
            message = f"{type(error).__name__}: {message}"
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(__file__).parent in Path(file).parents
        if not (expected or full) or ("site-packages" in file and expected and not ours):
            message += f" ({file}, line {line})"
        if isinstance(error, ModuleNotFoundError):
            message += "; pip install 'lmolt[all]' brings what LMolT's commands need"
        if not (expected or full):
            message += "; LMOLT_DEBUG=1 shows the whole traceback"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2 if expected else 1)


def end_with_parent() -> None:
    """From here on this process is killed when the one that started it ends, however that ends (on Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which exec keeps


def _has_launcher() -> bool:
    """Whether accelerate or torchrun started this process: one that a shell started may outlive it (nohup)."""
    if "LOCAL_RANK" in os.environ:
        return True
    try:
        started_by = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    programs = ("accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run")
    return any(Path(word).name in programs for word in started_by[:4])


def _reader_is_gone(stream) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def shipped(path: Path | str) -> Path:
    """The file `path`, such as recipes/demo.yaml, of the working directory or else of what comes with LMolT."""
    for found in (Path(path), SHIPPED / path):
        if found.is_file():
            return found
    raise FileNotFoundError(
        f"{path}: there is no such file, here or in {SHIPPED}, which holds the recipes that come along"
    )


def versions(*packages: str) -> dict[str, str]:
    """What a record of a run says of its software: LMolT's version, Python's, and those of `packages`."""
    found = {"lmolt": __version__, "python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cache_folder() -> Path:
    """Where what can be computed again is kept: LMOLT_CACHE, or ~/.cache/lmolt."""
    if folder := os.environ.get("LMOLT_CACHE"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "lmolt"
    except RuntimeError:  # a container whose user has no home directory
        raise ValueError(
            "this user has no home directory; set LMOLT_CACHE to a folder that may be written to"
        ) from None


def read_json(path: Path | str, *, plain: bool = False) -> dict:
    """The object in a JSON file; `ValueError` names the file, and where in it is what can't be read.

    `plain`: a file that other libraries read too, which know neither UTF-16 nor gzip.
    """
    path = Path(path)
    text = read_text(path)
    if plain and not path.read_bytes().startswith(text[:1].encode()):
        raise ValueError(
            f"{path} byte 0: is packed by gzip, or has a mark of UTF-8, -16 or -32; save it as plain UTF-8"
        )
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path} {where}: not JSON ({error.msg}); the file is damaged, get it again") from None
    except (RecursionError, ValueError):  # nested by the thousand, a number of thousands of digits
        at, what = _beyond(text)
        raise ValueError(
            f"{path} line {text.count(chr(10), 0, at) + 1}: {what}; the file is damaged, get it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {text[:40]!r} is not a JSON object {{name: value}}")
    return content


def _beyond(text: str) -> tuple[int, str]:
    """Where JSON is more than Python's parser takes, and what it is."""
    if number := re.search(r"\d{4300,}", text):
        return number.start(), f"a number of {len(number[0]):,} digits"
    depth = 0
    for bracket in re.finditer(r"[\[{\]}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > 500:
            return bracket.start(), "nested by more than 500 levels"
    return 0, "not JSON that can be read"


def write_whole(path: Path | str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """The file appears with all of `content` in it, on the disk, or not at all; its folder is made.

    `content` is text (written as UTF-8), bytes, or a function that writes to the open file it is given. `OSError`
    names the file, also for a full disk.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk's names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_cache(path: Path | str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """`write_whole` for what can be computed again: where it can't be written, a warning says so, and no more."""
    try:
        write_whole(path, content)
    except OSError as error:
        why = "%s is not kept (%s); LMOLT_CACHE names another folder for what can be computed again"
        logging.getLogger(__name__).warning(why, path, error.strerror)


def content_hash(path: Path | str, *, remember: bool = True) -> str:
    """What tells one file's bytes from another's: its size and XXH3-128, over all of it.

    That of a file of 8 MB or more is remembered in the cache folder by path, size, times and inode: a base model is
    read once a machine. With `remember` off the bytes are read each time, and a disk's damage is found.
    """
    import xxhash  # here: reading tables needs none

    path = Path(path)
    before = path.stat()
    known = None
    if remember and before.st_size >= 8_000_000:
        when = (before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, before.st_dev)
        name = xxhash.xxh3_128_hexdigest(f"{path.resolve()}\0{when}".encode(errors="surrogateescape"))
        with contextlib.suppress(OSError, ValueError):  # ValueError: no home directory
            known = cache_folder() / "hashes" / name
            found, _, check = known.read_text(encoding="ascii").partition(" ")
            if check == xxhash.xxh3_128_hexdigest((name + found).encode()):  # else damaged: read again
                return found
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    found, after = f"{before.st_size}-{digest}", path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path}: was written to while it was read; let that end first")
    if known is not None and time.time_ns() - before.st_mtime_ns > 2e9:  # else the next write may have the same time
        with contextlib.suppress(OSError):  # a cache that can't be written to is none
            write_whole(known, f"{found} {xxhash.xxh3_128_hexdigest((name + found).encode())}")
    return found


def sha256_file(path: Path | str) -> str:
    """SHA-256 in hexadecimal, for what is published or compared with others' sums; `content_hash` is for the rest."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_as(name: Path | str) -> str:
    """What a model or tokenizer is called where numbers rest on it: a Hub id as it is, a folder with a hash of what its
    files hold, since a path may hold another one tomorrow."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    suffixes = (".json", ".txt", ".model", ".safetensors", ".bin")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)
    held = "\n".join(f"{path.name} {content_hash(path)}" for path in files)
    return f"{name} ({hashlib.sha256(held.encode()).hexdigest()[:8]})"


# --- tables


_LARGEST = 2 * 2**30  # bytes of a packed file's content: what is larger is no table of pairs
_CELL = 64  # bytes of a value in Python, beside its own
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"}
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive, or a spreadsheet (.xlsx); unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls); save the sheet as CSV",
    b"PAR1": "a Parquet file; give its name the suffix .parquet",
    **dict.fromkeys(
        (b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"), "packed; unpack it, or pack it with gzip"
    ),
}
_MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # UTF-32's begins with UTF-16's, so they come last


def read_text(path: Path | str, encoding: str = "utf-8") -> str:
    """The text of a file, gzipped or not, in `encoding` or what its byte order mark says (UTF-8, UTF-16, UTF-32).

    `ValueError` names the line and byte that are not in that encoding.
    """
    path = Path(path)
    data = path.read_bytes()
    if what := next((what for mark, what in _NO_TEXT.items() if data.startswith(mark)), None):
        raise ValueError(f"{path}: is no text but {what}")
    if data.startswith(b"\x1f\x8b"):
        unpacked = bytearray()
        try:
            with gzip.open(io.BytesIO(data)) as file:
                while len(unpacked) <= _LARGEST and (piece := file.read(1 << 24)):
                    unpacked += piece
            data = unpacked
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} after byte {len(unpacked):,} of its content: not a whole gzip file ({error}); pack it again"
            ) from None
        if len(data) > _LARGEST:
            raise ValueError(f"{path}: unpacks to over {_LARGEST / 2**30:g} GiB; give a part of it")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), encoding)
    try:
        text = data.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; convert the file "
            f"(iconv -f LATIN1 -t UTF-8 {path.name}, if Latin-1 is what it is in), or name its --encoding where there "
            "is that flag"
        ) from None
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; use a name Python knows, such as utf-8 or latin-1") from None
    if text.count("\0") > len(text) // 8:  # one in an output is the output's matter
        raise ValueError(f"{path}: full of NUL characters, as UTF-16 without its mark is; convert it to UTF-8 (iconv)")
    return text


def table_suffix(path: Path | str) -> str:
    """`.csv` of `pairs.csv` and of `pairs.csv.gz`."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_table(path: str | Path, encoding: str = "utf-8") -> list[dict]:
    """Rows of a .csv, .tsv (or .txt), .jsonl or .parquet file, in its order, values as they are stored.

    A .tsv is the field's: tab-separated without quoting, so a quote is data. A .csv may quote, and where its header
    has no comma, semicolons, tabs or bars separate. Text may be gzipped (.csv.gz). Rows are counted from 1, without the
    header; blank lines at the end are none. `FileNotFoundError`, or `ValueError` with file, row, value and
    remedy.
    """
    path, suffix = Path(path), table_suffix(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {suffix!r}; tables are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        text = read_text(path, encoding)
        rows = _read_jsonl(path, text) if suffix == ".jsonl" else _read_separated(path, text)
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def _read_parquet(path: Path) -> list[dict]:
    """Its rows, while they stay under `_LARGEST`: encodings make millions of values out of some bytes."""
    import pyarrow as pa  # here: merging starts in 0.15 s, and hashes with what is above
    import pyarrow.parquet as pq

    rows, size, where = [], 0, " footer"
    try:
        with pq.ParquetFile(path) as file:
            where = " row 1 or later"
            if file.metadata.num_rows * _CELL > _LARGEST:
                raise ValueError(f"{path}: has {file.metadata.num_rows:,} rows; give a part of it")
            for batch in file.iter_batches(batch_size=10_000):
                size += sum(map(_size, batch.columns))
                if size > _LARGEST:
                    raise ValueError(
                        f"{path}: unpacks to over {_LARGEST / 2**30:g} GiB by row {len(rows):,}; give a part of it"
                    )
                rows += batch.to_pylist()
                where = f" row {len(rows) + 1} or later"
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # of its parts, without a name
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}{where}: not a readable parquet file ({reason}); write it again") from None
    return rows


def _size(column) -> int:
    """Bytes of a column's values in Python, those in lists and structs too, each by itself."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type) and hasattr(column, "flatten"):
        parts = column.flatten()
        return _CELL * len(column) + sum(map(_size, parts if isinstance(parts, list) else [parts]))
    return column.nbytes + _CELL * len(column)


def _lines(text: str) -> list[str]:
    # Not str.splitlines, which also breaks at U+2028 and form feeds inside a caption.
    text = text if "\n" in text else text.replace("\r", "\n")  # old Macs' ends of lines
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _each_once(members: list[tuple]) -> dict:
    """A JSON object, of which `json` would keep the last of two members with one name."""
    row = dict(members)
    if len(row) < len(members):
        raise ValueError(f"{max(row, key=[name for name, _ in members].count)!r} is in it twice")
    return row


def _read_jsonl(path: Path, text: str) -> list[dict]:
    rows = []
    for number, line in enumerate(_lines(text.rstrip("\r\n")), 1):
        if not line.strip():
            raise ValueError(f"{path} row {number} is blank; remove the line")
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:  # the latter: nested by the thousand
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"{path} row {number}: {line[:80]!r} is not JSON ({reason}); one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {number}: {line[:80]!r} is not a JSON object; write {{column: value}}")
        if r"\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise ValueError(f"{path} row {number}: holds half a character (a lone surrogate); write the file as UTF-8")
        rows.append(row)
    return rows


def _read_separated(path: Path, text: str) -> list[dict]:
    if table_suffix(path) in (".tsv", ".txt"):
        records = [line.split("\t") for line in _lines(text)]
    else:
        csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
        header = re.split("[\r\n]", text, maxsplit=1)[0]
        # As spreadsheets write it in half of Europe, and as "text" that was given the suffix.
        separator = next((mark for mark in ",;\t|" if mark in header), ",")
        records = []
        try:
            for record in csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator):
                records.append(record)
        except csv.Error as error:
            where = f"row {len(records)}" if records else "header"
            raise ValueError(f"{path} {where}: broken quoting ({error}); double each quote in a quoted cell") from None
    if not records:
        raise ValueError(f"{path}: the file is empty")
    header, *records = records
    if repeated := [name for name, n in Counter(header).items() if n > 1]:
        raise ValueError(f"{path}: column {repeated[0]!r} appears twice in the header {header}; rename one")
    blank = lambda record: len(header) > 1 and record in ([], [""])
    while records and blank(records[-1]):
        records.pop()
    for number, record in enumerate(records, 1):
        if blank(record):
            raise ValueError(f"{path} row {number} is blank; remove the line")
        if len(record) != len(header):
            raise ValueError(
                f"{path} row {number}: {len(record)} cells but the header has {len(header)} ({', '.join(header)}); it "
                f"starts {' | '.join(record)[:80]!r}: look for a stray separator or a line break in a cell"
            )
    return [dict(zip(header, record, strict=True)) for record in records]


def write_table(rows: list[dict], path: str | Path) -> None:
    """Write rows to a .parquet, .jsonl, .csv or .tsv file, whole or not at all; its folder is made.

    Columns are those of any row, in order of appearance; what a row lacks is null (empty in text).
    `ValueError` on no rows, an unknown suffix, or a .tsv cell with a tab or line break.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; tables are {', '.join(SUFFIXES)}")
    if not rows:
        raise ValueError(f"{path}: there are no rows to write")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        write_whole(path, lambda file: pq.write_table(table, file))
    else:
        write_whole(path, _as_text(rows, columns, path))


def _as_text(rows: list[dict], columns: list[str], path: Path) -> str:
    if path.suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    records = [columns] + [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(records)
        return text.getvalue()
    for number, record in enumerate(records):
        if bad := [cell for cell in record if "\t" in cell or "\n" in cell or "\r" in cell]:
            raise ValueError(
                f"{path} row {number}: {bad[0][:80]!r} has a tab or line break; write .csv or .jsonl instead"
            )
    return "".join("\t".join(record) + "\n" for record in records)
