"""How commands end, whichever way (run_main), and the hash by which files are told apart."""

import gzip
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import ROOT

from lmolt import files
from lmolt.files import read_table


def run(code: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    """A command whose main is `code`."""
    body = f"import sys\nfrom lmolt.files import run_main\ndef main(argv):\n    {code}\nrun_main(main, kept='all')"
    return subprocess.run(
        [sys.executable, "-c", body, "x"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("assert argv == ['x']", 0, ""),
        (r"raise ValueError('a.csv row 3:\n  bad')", 2, "error: a.csv row 3: bad\n"),
        ("open('no/such')", 2, "error: [Errno 2] No such file or directory: 'no/such'\n"),
        ("{}['simpo']", 1, "error: KeyError: 'simpo' (<string>, line 4); LMOLT_DEBUG=1 shows the whole traceback\n"),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried')",
            1,
            "error: CUDA out of memory; a "
            "smaller --tokens_per_batch or batch size takes less, and so do --gradient_checkpointing true and "
            "--load_in_4bit\n",
        ),
        ("raise KeyboardInterrupt", 130, "\nstopped; all\n"),
        ("sys.exit(75)", 75, ""),
        ("raise BrokenPipeError(32, 'of a socket')", 2, "error: [Errno 32] of a socket\n"),  # not of our output
    ],
)
def test_each_end_has_its_line_and_exit_code(code, status, stderr):
    done = run(code)
    assert (done.returncode, done.stderr) == (status, stderr)


def test_the_traceback_is_shown_on_demand():
    done = run("{}['simpo']", {"LMOLT_DEBUG": "1"})
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):") and "\nerror: KeyError: 'simpo'" in done.stderr


def test_a_screen_that_lacks_a_character_does_not_end_a_run():
    done = run("print('\u2264 5')", {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "? 5\n")


@pytest.mark.parametrize("lines", [1, 100_000])  # the reader is gone when the output is flushed, or in its midst
def test_a_reader_that_goes_away_ends_a_run_quietly(lines):
    code = f"sys.stdin.read()\n    for i in range({lines}): print(i)"
    body = f"import sys\nfrom lmolt.files import run_main\ndef main(argv):\n    {code}\nrun_main(main)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, **pipes)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""


def test_a_full_screen_is_an_error():
    with open("/dev/full", "w") as full:  # noqa: PTH123  no path of a file
        body = "from lmolt.files import run_main\nrun_main(lambda argv: print(1))"
        done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2 and done.stderr == b"error: [Errno 28] No space left on device\n"


def test_content_hash_is_size_and_all_bytes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 100)
    assert files.content_hash(file) == f"100-{xxhash.xxh3_128_hexdigest(b'a' * 100)}"
    big = b"0123456789abcdef" * 600_000
    file.write_bytes(big)
    os.utime(file, ns=(10**18, 10**18))
    first = files.content_hash(file)
    assert first == f"9600000-{xxhash.xxh3_128_hexdigest(big)}"
    (known,) = (tmp_path / "cache" / "hashes").iterdir()
    kept, other = known.read_text(), "9600000-" + "0" * 32
    known.write_text(
        f"{other} {xxhash.xxh3_128_hexdigest((known.name + other).encode())}"
    )  # which shows that it is taken from there
    assert files.content_hash(file) == other
    assert files.content_hash(file, remember=False) == first
    damaged = [kept[:i] + ("0" if kept[i] != "0" else "1") + kept[i + 1 :] for i in (0, 8, 39, len(kept) - 1)]
    for text in ("", "cut", first, *damaged):
        known.write_text(text)
        assert files.content_hash(file) == first and known.read_text() == kept
    with file.open("r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(10**18, 10**18))  # same size, same time: the inode's own time tells
    assert files.content_hash(file) == f"9600000-{xxhash.xxh3_128_hexdigest(b'x' + big[1:])}"


def test_a_hash_needs_no_cache(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(bytes(9_000_000))
    os.utime(file, ns=(10**18, 10**18))
    monkeypatch.setenv("LMOLT_CACHE", "/dev/null/none")
    assert files.content_hash(file) == f"9000000-{xxhash.xxh3_128_hexdigest(bytes(9_000_000))}"
    with pytest.raises(FileNotFoundError):
        files.content_hash(tmp_path / "none")


BOMBS = {
    "one text, 10,000 times": lambda: {"a": pa.DictionaryArray.from_arrays([0] * 10_000, ["C" * 1000])},
    "one text in structs": lambda: {
        "a": pa.StructArray.from_arrays([pa.DictionaryArray.from_arrays([0] * 10_000, ["C" * 1000])], ["x"])
    },
    "nothing, 100,000 times": lambda: {"a": pa.nulls(100_000, pa.string())},
    "a long text": lambda: {"a": ["C" * 3_000_000]},
    "a list": lambda: {"a": [[[None] * 100_000]]},
    "in a struct": lambda: {"a": [{"x": {"y": [0] * 100_000}}]},
}


@pytest.mark.parametrize("kind", [*BOMBS, "gzip"])
def test_what_unpacks_to_more_than_a_table_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGEST", 2_000_000)
    path = tmp_path / ("bomb.csv.gz" if kind == "gzip" else "bomb.parquet")
    if kind == "gzip":
        path.write_bytes(gzip.compress(b"a,b\n" + b"C" * 3_000_000))
    else:
        pq.write_table(pa.table(BOMBS[kind]()), path)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"bomb\.\S+: (unpacks to over .* GiB|has 100,000 rows).*; give a part of it"):
        read_table(path)


def test_a_user_without_a_home_directory(tmp_path):
    """As in a container that runs with any user id."""
    code = (
        "from types import SimpleNamespace; from pathlib import Path; import sys\n"
        "from lmolt import files; from lmolt.metrics import meteor; from lmolt.merging import provenance\n"
        "meteor._nltk_folders(), provenance.known_base([SimpleNamespace(folder=Path(sys.argv[1]))])\n"
        "print(files.cache_folder())"
    )
    homeless = ["unshare", "--map-user=54321", "env", "-u", "HOME"]
    if subprocess.run([*homeless, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    run = lambda *more: subprocess.run(
        [*homeless, *more, sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True
    )
    (tmp_path / "README.md").write_text("---\nbase_model: owner/name\n---\n")
    tmp_path.chmod(0o755)
    assert run("LMOLT_CACHE=/c").stdout == b"/c\n"
    assert b"this user has no home directory; set LMOLT_CACHE" in run("-u", "LMOLT_CACHE").stderr


def test_what_numbers_rest_on_is_known_by_its_content(tmp_path):
    names = []
    for text in ("one", "two", "one"):
        (tmp_path / "vocab.txt").write_text(text)
        names.append(files.known_as(tmp_path))
    assert names[0] == names[2] != names[1] and names[0].startswith(f"{tmp_path} (")
    assert files.known_as("owner/tok") == "owner/tok"


def test_windows_is_told_in_one_line():
    """Simulated: without what Windows lacks, all of lmolt but the supervisor is imported, and a command says it."""
    code = """
import builtins, pkgutil, signal, sys
import lmolt, torch.distributed.elastic.multiprocessing
from accelerate.utils import reduce
from transformers import Trainer
found = builtins.__import__
def windows(name, globals=None, *rest):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("lmolt"):
        raise ModuleNotFoundError(name)
    return found(name, globals, *rest)
builtins.__import__ = windows
del signal.SIGUSR1
for module in pkgutil.walk_packages(lmolt.__path__, "lmolt."):
    if module.name != "lmolt.distributed.supervisor":
        __import__(module.name)
from lmolt.files import run_main
sys.platform = "win32"
run_main(print)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: LMolT's commands run on Linux and macOS; on Windows, run them in WSL\n"


@pytest.mark.parametrize("first", ["import lmolt", "import kernels, lmolt"])
def test_bitsandbytes_downloads_nothing(first, tmp_path):
    """With a package `kernels` there, and a processor for which bitsandbytes would ask it for a kernel."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('downloaded')\n    raise OSError\n")
    code = f"{first}\nimport bitsandbytes.functional as f\nimport lmolt, sys, importlib, kernels\n"
    code += "f.has_avx512bf16 = lambda: True\n"
    code += "del sys.modules['bitsandbytes.backends.cpu.ops']\n"
    code += "import torch\ntorch.library.register_kernel = lambda *_: lambda function: function\n"
    code += "try:\n    importlib.import_module('bitsandbytes.backends.cpu.ops')\nexcept RuntimeError as error:\n"
    code += "    assert 'already' in str(error), error\n"
    code += "print(kernels.get_kernel.__name__)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout == "get_kernel\n", done.stderr
