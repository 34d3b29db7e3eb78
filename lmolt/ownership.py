"""Whose a folder is: one process writes it at a time, and only what LMolT wrote there is replaced or deleted.

Two files tell, in the folder that a script writes to: `.lmolt.lock` names the process that writes now and goes with it;
`.lmolt.jsonl` has a line for each name that a script wrote, and stays. All else in the folder is the user's.
"""

import atexit
import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from lmolt.files import write_whole

CLAIMS = ".lmolt.jsonl"
ENDING = 2.0  # seconds in which a holder that is being ended may still be there
BEAT, LAPSED = 5.0, 20.0  # seconds between a holder's signs of life; without one for so long, another host's is dead

_held: dict[str, tuple[int, list[Path], dict]] = {}  # lock file -> its descriptor, folders made for it, what it says
_beating = threading.Lock()


def hold(output: Path | str, *, beside: bool = False) -> None:
    """Lock `output`, a folder, until this process ends (`beside`: a file, or a folder that is renamed into place).

    The lock lies in the folder, or beside what isn't one. `ValueError` names the holder: process, host, since when.
    The kernel frees the lock of a process that died, also on a shared disk, if that has locks. Some have none, or only
    within a host; so a holder on another host gives signs of life, and is taken for dead without them. Of a job's
    processes the first alone calls this. A process may lock again what it holds.
    """
    output = Path(output)
    output = output.parent.resolve() / output.name if beside else output.resolve()
    path = output.with_name(f".{output.name}.lock") if beside else output / ".lmolt.lock"
    if str(path) in _held:
        return
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    end = time.monotonic() + ENDING
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; this folder can't be written to", str(path.parent)) from None
        locked, record = _try(descriptor), _read(path) or {}
        if locked and not _same(path, descriptor):  # its last holder removed it meanwhile
            os.close(descriptor)
            continue
        if locked and not _alive(path, record, locked):
            break
        os.close(descriptor)
        if locked or time.monotonic() > end:
            raise ValueError(
                f"{output} is being written by process {record.get('pid', '(unknown)')} on {record.get('host', '?')} "
                f"since {record.get('since', '?')}; wait for it, end it, or choose another place"
            )
        time.sleep(0.1)
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "boot": _boot()}
    _write(descriptor, record, 0)
    with _beating:
        _held[str(path)] = descriptor, made, record
    if len(_held) == 1:
        threading.Thread(target=_beat, daemon=True, name="lock").start()


@atexit.register
def release() -> None:
    """Free what this process holds; a folder that was made for the lock and stayed empty goes too."""
    while _held and next(iter(_held.values()))[2]["pid"] == os.getpid():  # a fork's child holds nothing
        with _beating, contextlib.suppress(OSError):
            path, (descriptor, made, _) = _held.popitem()
            if _same(Path(path), descriptor):
                Path(path).unlink()
            os.close(descriptor)
            for folder in made:
                folder.rmdir()


def _try(descriptor: int) -> str | None:
    """ "kernel" with its lock taken, "none" on a disk without locks, None where another process has it."""
    import fcntl  # here: Windows has none, and reads what others wrote

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "none" if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP) else None
    return "kernel"


def _same(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _boot() -> str:
    """What two processes under one kernel have in common: there a free lock is proof enough that its holder died."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _read(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _alive(path: Path, record: dict, locked: str) -> bool:
    """Whether the holder that `record` names lives, though its lock could be taken."""
    if not record or (locked == "kernel" and record.get("boot") == _boot()):
        return False
    if record.get("boot") == _boot():
        return Path(f"/proc/{record.get('pid')}").exists()
    end = time.monotonic() + LAPSED
    while time.monotonic() < end:
        time.sleep(0.5)
        if _read(path) != record:
            return True
    return False


def _write(descriptor: int, record: dict, beat: int) -> None:
    text = json.dumps(record | {"beat": beat}).encode() + b"\n"
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)


def _beat() -> None:
    beat = 0
    while _held:
        time.sleep(BEAT)
        beat += 1
        with _beating:
            for descriptor, _, record in _held.values():
                with contextlib.suppress(OSError):  # the disk is full
                    _write(descriptor, record, beat)


# --- what LMolT wrote


def claim(folder: Path, script: str, names: Iterable[str]) -> None:
    """Record, before `script` writes them, that `names` in `folder` are its own."""
    folder.mkdir(parents=True, exist_ok=True)
    known = claimed(folder, script)
    lines = [json.dumps({"name": name, "by": script}) + "\n" for name in names if name not in known]
    if lines:
        with (folder / CLAIMS).open("a") as file:  # one write: several processes may share a folder of files
            file.write("\n" * _torn(folder / CLAIMS) + "".join(lines))


def claimed(folder: Path, script: str) -> list[str]:
    """Names, or patterns, that `script` has written in `folder`; a damaged line claims nothing."""
    names = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for line in (folder / CLAIMS).read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(line)
                if record["by"] == script and isinstance(name := record["name"], str) and Path(name).name == name:
                    names.append(name)
    return list(dict.fromkeys(names))


def _torn(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")


def foreign(folder: Path, script: str, patterns: Iterable[str] = ("*",)) -> list[str]:
    """What lies in `folder` under one of `patterns` and isn't `script`'s: sorted names."""
    if not folder.is_dir():
        return []
    mine = claimed(folder, script)
    fits = lambda name, patterns: any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
    own = ("." + folder.name + ".lock", ".lmolt.lock", CLAIMS)
    found = [entry.name for entry in folder.iterdir() if entry.name not in own]
    return sorted(name for name in found if fits(name, patterns) and not fits(name, mine))


def check_free(folder: Path, script: str, patterns: Iterable[str]) -> None:
    """`ValueError` where something that `script` would write is there and isn't its own."""
    if found := foreign(folder, script, patterns):
        raise ValueError(
            f"{folder / found[0]} is there, and {script}.py didn't write it"
            + f" (nor {len(found) - 1} more)" * (len(found) > 1)
            + "; move it away, or choose another place"
        )


def delete_claimed(folder: Path, script: str) -> None:
    """Delete what `script` wrote in `folder`, and nothing else; of a sealed checkpoint, the files of its manifest."""
    for name in claimed(folder, script):
        entry = folder / name
        if entry.is_symlink() or not entry.is_dir():
            entry.unlink(missing_ok=True)
        else:
            _delete_folder(entry)
    settle(folder, script, [])


def settle(folder: Path, script: str, names: Iterable[str]) -> None:
    """`claim` of these names alone: what `script` claimed before is forgotten. At once or not at all."""
    old = (folder / CLAIMS).read_text(errors="replace").splitlines() if (folder / CLAIMS).exists() else []
    lines = [line for line in old if f'"by": {json.dumps(script)}' not in line]
    lines += [json.dumps({"name": name, "by": script}) for name in names]
    if lines:
        write_whole(folder / CLAIMS, "\n".join(lines) + "\n")
    else:
        (folder / CLAIMS).unlink(missing_ok=True)


def _delete_folder(folder: Path) -> None:
    """A folder of ours; where it is sealed by a manifest.json, what was put in later stays, and so does the folder."""
    try:
        names = list(json.loads((folder / "manifest.json").read_text()))
    except FileNotFoundError:
        return shutil.rmtree(folder)
    except (OSError, ValueError, TypeError):
        names = []
    for name in [*names, "manifest.json"]:
        if folder.resolve() in (folder / name).resolve().parents:
            (folder / name).unlink(missing_ok=True)
    for parent, _, _ in sorted(os.walk(folder), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            Path(parent).rmdir()
    return None


def check_inputs(flag: str, output: Path | str, inputs: Mapping[str, object]) -> None:
    """`ValueError` where `output` is one of the `inputs`, or a folder that holds one; Hub ids are none, nor is None."""
    place = Path(output).resolve()
    for name, given in inputs.items():
        path = Path(str(given)) if given is not None else None
        if path is None or not path.exists():
            continue
        same = path.resolve() == place or (place.exists() and path.samefile(place))
        if same or place in path.resolve().parents:
            raise ValueError(f"{flag} {output} {'is' if same else 'holds'} {name} {given}; choose another place")


def check_deletable(flag: str, folder: Path) -> None:
    """`ValueError` where `folder` is where the user works or lives: nobody means to have that overwritten."""
    place, homes = folder.resolve(), [Path.cwd()]
    with contextlib.suppress(RuntimeError):
        homes.append(Path.home().resolve())
    for home in homes:
        if place == home or place in home.parents:
            raise ValueError(f"{flag} {folder} is {home} or a folder above it; name a run's own folder")
