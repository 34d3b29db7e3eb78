"""Damaged and foreign files: each reader gives the file's content, or one line that names the file and what is wrong.

Every mutation is read in a child that has a limit of memory and of time; many in one child, for speed.
"""

import gzip
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest

from lmolt.data.pairs import read_pairs
from lmolt.data.predictions import read_predictions
from lmolt.data.triples import read_triples
from lmolt.files import read_json, write_table
from lmolt.generation.systems import read_system
from lmolt.recipes import read_recipe

SECONDS, BYTES = 10, 2 << 30  # of a reading; of memory over what the imports have taken
PAIRS = [
    {"id": "a", "molecule": "CCO", "caption": "The molecule is ethanol."},
    {"id": "b", "molecule": "c1ccccc1O", "caption": "The molecule is a phenol; it smells, \u03b1-like."},
    {"id": "c", "molecule": "CC(=O)O", "caption": "An acid."},
]
TRIPLES = [
    {"id": "a", "direction": "mol2cap", "source": "CCO", "chosen": "Ethanol, \u03b1.", "rejected": "Water."},
    {"id": "b", "direction": "cap2mol", "source": "Ethanol.", "chosen": "CCO", "rejected": "O"},
]
SYSTEM = """a:
  architecture: llama
  parameters: 7B
  download: 13 GB
  licence: MIT  # \u03b1
  prompt: paper
  both: {model: org/model, adapter: org/adapter}
"""
RECIPE = "loss: cpo  # \u03b1\nbeta: 0.1\nlearning_rate: 5e-5\nlora_target_modules: all-linear\n"
DEEP = "[" * 100_000


def of_bytes(valid: bytes) -> dict[str, bytes]:
    """Mutations that any format has; those named = have to give the same content, or be refused."""
    middle, text = len(valid) // 2, valid.decode("utf-8", errors="replace")
    return {
        "empty": b"",
        "one byte": valid[:1],
        "a quarter": valid[: len(valid) // 4],
        "half": valid[:middle],
        "all but one": valid[:-1],
        "zeros": bytes(len(valid)),
        "a byte of zero": valid[:middle] + b"\0" + valid[middle + 1 :],
        "a byte of 255": valid[:middle] + b"\xff" + valid[middle + 1 :],
        "a flipped first bit": bytes([valid[0] ^ 1]) + valid[1:],
        "random": bytes((i * 7919 + i * i * 31) % 256 for i in range(len(valid))),
        "twice": valid + valid,
        "a pickle": pickle.dumps({"a": [1, 2, 3]}),
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "a page": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n",
        "= utf-16": text.encode("utf-16"),
        "= utf-16-be": b"\xfe\xff" + text.encode("utf-16-be"),
        "= utf-32": text.encode("utf-32"),
        "= mark": b"\xef\xbb\xbf" + valid,
        "= gzip": gzip.compress(valid),
        "half a gzip": gzip.compress(valid)[:-20],
        "latin-1": text.replace("\u03b1", "\u00e4").encode("latin-1", errors="replace"),
    }


def of_json(valid: dict) -> dict[str, bytes]:
    """Mutations of an object's values and form."""
    found = {}
    for key in valid:
        for name, value in (
            ("null", None),
            ("a number", 7.5),
            ("a list", [[]]),
            ("an object", {"x": {}}),
            ("text", "\ud800"),
        ):
            found[f"{key} is {name}"] = json.dumps(valid | {key: value}).encode()
        found[f"no {key}"] = json.dumps({k: v for k, v in valid.items() if k != key}).encode()
    whole = json.dumps(valid)
    return found | {
        "deep": DEEP.encode(),
        "deep inside": whole[:-1].encode() + b', "more": ' + DEEP.encode() + b"]" * 100_000 + b"}",
        "a list": b"[1, 2]",
        "a word": b"null",
        "a text": b'"x"',
        "many digits": whole[:-1].encode() + b', "more": ' + b"9" * 6000 + b"}",
        "NaN": whole[:-1].encode() + b', "more": NaN}',
        "a comma more": whole[:-1].encode() + b",}",
        "a comment": b"// by hand\n" + whole.encode(),
        "single quotes": whole.replace('"', "'").encode(),
    }


def of_tables(rows: list[dict], suffix: str, folder: Path) -> dict[str, bytes]:
    """Mutations of rows, as the format writes them."""
    found = {}

    def add(name: str, changed: list[dict]) -> None:
        try:
            write_table(changed, folder / f"made{suffix}")
        except Exception:  # a format that can't hold that
            return
        found[name] = (folder / f"made{suffix}").read_bytes()

    for key in rows[0]:
        for name, value in (("null", None), ("a number", 7.5), ("a list", [1]), ("an object", {"x": 1}), ("empty", "")):
            add(f"{key} is {name}", [rows[0], rows[1] | {key: value}, *rows[2:]])
        add(f"no {key}", [{k: v for k, v in row.items() if k != key} for row in rows])
        add(f"{key} in capitals", [{k.upper() if k == key else k: v for k, v in row.items()} for row in rows])
        add(f"{key} of a tab", [rows[0], rows[1] | {key: "a\tb"}, *rows[2:]])
        add(f"{key} of lines", [rows[0], rows[1] | {key: "a\nb\r\nc"}, *rows[2:]])
        add(f"{key} is long", [rows[0], rows[1] | {key: "C" * 3_000_000}, *rows[2:]])
    return found


def of_text(valid: bytes, suffix: str) -> dict[str, bytes]:
    head, _, rest = valid.partition(b"\n")
    found = {
        "= carriage returns": valid.replace(b"\n", b"\r\n"),
        "= a blank line after": valid + b"\n",
        "a blank line between": head + b"\n\n" + rest,
        "a quote more": valid.replace(b"T", b'"T', 1),
        "a cell more": valid + b"x,y,z,w\n" if suffix == ".csv" else valid + b"x\ty\tz\tw\n",
        "a line of garbage": valid + b"\x01\x02{[\n",
    }
    if suffix == ".jsonl":
        found |= {"a deep row": valid + DEEP.encode() + b"\n", "digits": valid + b'{"id": ' + b"9" * 6000 + b"}\n"}
        found |= {"a surrogate": valid.replace(b'"a"', b'"\\ud800"', 1), "a list row": valid + b"[1]\n"}
    else:
        found |= {"two columns of a name": head.replace(b"caption", b"id", 1) + b"\n" + rest, "no rows": head + b"\n"}
    return found


def of_safetensors(valid: bytes) -> dict[str, bytes]:
    length = int.from_bytes(valid[:8], "little")
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    build = lambda text: struct.pack("<Q", len(text)) + text + body
    found = {
        "a header of 2^63": struct.pack("<Q", 1 << 63) + valid[8:],
        "a header of 3": struct.pack("<Q", 3) + valid[8:],
    }
    name = next(key for key in header if key != "__metadata__")
    for key in header[name]:
        for what, value in (
            ("null", None),
            ("text", "x"),
            ("negative", [-1, -1]),
            ("a list", [[]]),
            ("huge", [1 << 62, 1 << 62]),
        ):
            found[f"{key} is {what}"] = build(json.dumps(header | {name: header[name] | {key: value}}).encode())
        without = {k: v for k, v in header[name].items() if k != key}
        found[f"no {key}"] = build(json.dumps(header | {name: without}).encode())
    found |= {
        f"an entry that is {value!r}": build(json.dumps(header | {name: value}).encode())
        for value in (None, 7, "x", [])
    }
    return found | {
        "a header that is a list": build(b"[1]"),
        "a header that is null": build(b"null"),
        "a deep header": build(DEEP.encode()),
        "a header that isn't UTF-8": build(b'{"\xff": 1}'),
        "metadata of 7": build(json.dumps(header | {"__metadata__": 7}).encode()),
    }


YAML = {
    "a python object": b"!!python/object/apply:os.system ['touch pwned']\n",
    "an open bracket": b"a: [1\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a list": b"- a\n- b\n",
    "a scalar": b"just words\n",
    "a date": b"seed: 2024-13-41\n",
    "a key that is a number": b"7: 1\n",
    "a key that is a list": b"? [a, b]\n: 1\n",
    "aliases": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
    "deep": DEEP.encode(),
    "a tab": b"a:\n\tb: 1\n",
    "a key twice": b"a: 1\na: 2\n",
    "a merge of itself": b"a: &a\n  <<: *a\n",
    "a null": b"null\n",
    "an entry of a text": b"a: text\n",
    "an entry of nothing": b"a:\n",
    "a number": b"a: 7\n",
    "many digits": b"a: " + b"9" * 6000 + b"\n",
}


def cases(folder: Path, policy: Path) -> dict[str, tuple]:
    """Format: (the name of the file in its folder, its valid bytes, mutations, the reader)."""
    from lmolt.merging.checkpoints import Checkpoint
    from lmolt.merging.folding import read_config
    from lmolt.merging.safetensors_io import inspect_file
    from lmolt.models.adapters import check_made_for
    from lmolt.models.loading import load_tokenizer
    from lmolt.models.loading import read_config as read_model_config

    def table(rows: list[dict], suffix: str) -> bytes:
        write_table(rows, folder / f"valid{suffix}")
        return (folder / f"valid{suffix}").read_bytes()

    found = {}
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        valid = table(PAIRS, suffix)
        mutations = of_bytes(valid) | of_tables(PAIRS, suffix, folder)
        mutations |= {} if suffix == ".parquet" else of_text(valid, suffix)
        found[f"pairs{suffix}"] = (f"pairs{suffix}", valid, mutations, lambda path: read_pairs(path))
    for suffix in (".jsonl", ".parquet"):
        valid = table(TRIPLES, suffix)
        mutations = of_bytes(valid) | of_tables(TRIPLES, suffix, folder)
        mutations |= {} if suffix == ".parquet" else of_text(valid, suffix)
        found[f"triples{suffix}"] = (f"triples{suffix}", valid, mutations, read_triples)
    lines = "SMILES\tground truth\toutput\nCCO\tEthanol, \u03b1.\tThe water.\nCCN\tAn amine.\tThe acid.\n".encode()
    read = lambda path: read_predictions(path, "mol2cap")[0]
    found["predictions.txt"] = ("predictions.txt", lines, of_bytes(lines) | of_text(lines, ".txt"), read)
    found["recipe.yaml"] = ("r.yaml", RECIPE.encode(), of_bytes(RECIPE.encode()) | YAML, read_recipe)
    system = SYSTEM.encode()
    typed = {}
    for key in ("architecture", "parameters", "prompt", "both", "licence"):
        for value in ("7", "[]", "{x: 1}", ""):
            typed[f"{key}: {value}"] = SYSTEM.replace(f"{key}:", f"{key}: {value} #", 1).encode()
    found["systems.yaml"] = ("s.yaml", system, of_bytes(system) | YAML | typed, lambda path: read_system("a", path))
    record = {"arguments": {"beta": 0.1}, "outputs": {"\u03b1": "0"}, "n": 3}
    valid = json.dumps(record, ensure_ascii=False).encode()
    found["merge.json"] = ("merge.json", valid, of_bytes(valid) | of_json(record), read_json)

    def in_model(name: str, valid: bytes, mutations: dict, read) -> tuple:
        return name, valid, mutations, lambda path: read(path.parent)

    def weights(model: Path):
        source = Checkpoint(model)
        return {name: inspect_file(entries, (), lambda _: None) for name, entries in source.files.items()}

    valid = (policy / "model.safetensors").read_bytes()
    found["model.safetensors"] = in_model("model.safetensors", valid, of_bytes(valid) | of_safetensors(valid), weights)
    valid = (policy / "config.json").read_bytes()
    config = json.loads(valid)
    few = {
        key: config[key]
        for key in ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "rope_parameters")
    }
    changed = {
        name: json.dumps(config | json.loads(text)).encode() for name, text in of_json(few).items() if " is " in name
    }
    mutations = of_bytes(valid) | {name: text for name, text in of_json(few).items() if " is " not in name} | changed
    found["config.json, merged"] = in_model("config.json", valid, mutations, lambda model: Checkpoint(model).config)
    found["config.json, loaded"] = in_model(
        "config.json", valid, mutations, lambda model: read_model_config(str(model), None, False).to_dict()
    )
    index = {"metadata": {"total_size": 7}, "weight_map": dict.fromkeys(weights_of(policy), "model.safetensors")}
    valid = json.dumps(index).encode()
    paths = {
        f"names {name!r}": json.dumps(index | {"weight_map": {"x": name}}).encode()
        for name in ("../x", "/etc/passwd", "")
    }
    found["model.safetensors.index.json"] = in_model(
        "model.safetensors.index.json",
        valid,
        of_bytes(valid) | of_json(index) | paths,
        lambda model: Checkpoint(model).entries.keys(),
    )
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    adapter |= {"base_model_name_or_path": "policy", "init_lora_weights": True}
    valid = json.dumps(adapter).encode()
    mutations = of_bytes(valid) | of_json(adapter)
    found["adapter_config.json, folded"] = (
        "adapter_config.json",
        valid,
        mutations,
        lambda path: read_config(path.parent),
    )
    found["adapter_config.json, loaded"] = (
        "adapter_config.json", valid, mutations, lambda path: check_made_for(str(path.parent), "policy")
    )  # fmt: skip
    valid = (policy / "tokenizer.json").read_bytes()
    tokenizer = json.loads(valid)
    parts = {key: tokenizer[key] for key in ("version", "model", "added_tokens", "pre_tokenizer")}
    changed = {
        name: json.dumps(tokenizer | json.loads(text)).encode()
        for name, text in of_json(parts).items()
        if " is " in name
    }
    mutations = of_bytes(valid) | {name: text for name, text in of_json(parts).items() if " is " not in name} | changed
    found["tokenizer.json"] = in_model(
        "tokenizer.json", valid, mutations, lambda model: load_tokenizer(str(model))("The molecule CCO").input_ids
    )
    return found


# mutations after which nothing of the format is left, so that no place in it can be named
OTHER_KINDS = {"empty", "one byte", "zeros", "random", "a pickle", "a picture", "a page", "git-lfs"}
OTHER_KINDS |= {"a list", "a word", "a text", "a scalar", "a number", "two documents", "no rows"}
PLACE = r"\b(row|line|byte|column) \d|\b(row|column|key|system) ['\"]|\d bytes|\b(header|footer)\b"
PLACE += r"|\w+\.weight\b|yaml, \w+: |: \w+ = "  # a tensor, an entry of systems, a key that nobody knows


def names_the_place(mutation: str, message: str) -> bool:
    """Whether a message says where: the key that the mutation changed, or a row, line, byte, column or tensor."""
    key = re.match(r"no (\w+)$|(\w+) is |(\w+) of |(\w+) in cap|(\w+): ", mutation)
    key = next(filter(None, key.groups()), None) if key else None
    return bool(re.search(PLACE, message) or (key and re.search(rf"\b{key.replace('_', '[_ ]')}\b", message)))


def weights_of(policy: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(policy / "model.safetensors", "np") as file:
        return list(file.keys())


def outcomes(jobs: list[tuple[str, Path]], read) -> dict[str, tuple]:
    """What `read` gave for each file: ("gives", content), ("says", exception's name, message), or ("ended", how)."""
    found, left = {}, list(jobs)
    while left:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _read_all(left, read, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers = [pickle.loads(bytes.fromhex(line)) for line in said.decode().split()]
        for (name, _), answer in zip(left, answers, strict=False):
            found[name] = answer
        left = left[len(answers) :]
        if left:  # it ended in the midst of the next
            found[left.pop(0)[0]] = ("ended", status)
    return found


def _read_all(jobs: list[tuple[str, Path]], read, writing: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    for _, path in jobs:
        signal.alarm(SECONDS)  # ends this process, whatever it does
        try:
            answer = ("gives", repr(read(path)))
        except BaseException as error:
            answer = ("says", type(error).__name__, isinstance(error, (ValueError, OSError)), str(error))
        signal.alarm(0)
        os.write(writing, pickle.dumps(answer).hex().encode() + b"\n")
    os._exit(0)


FORMATS = [*(f"pairs{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".parquet")), "triples.jsonl", "triples.parquet"]
FORMATS += ["predictions.txt", "recipe.yaml", "systems.yaml", "merge.json", "model.safetensors", "config.json, merged"]
FORMATS += ["config.json, loaded", "model.safetensors.index.json", "adapter_config.json, folded"]
FORMATS += ["adapter_config.json, loaded", "tokenizer.json"]


@pytest.fixture(scope="module")
def every_case(tmp_path_factory, tiny_policy):
    return cases(tmp_path_factory.mktemp("valid"), tiny_policy)


@pytest.mark.parametrize("what", FORMATS)
def test_a_damaged_file_is_read_or_named(what, every_case, tmp_path, tiny_policy):
    file, valid, mutations, read = every_case[what]
    assert len(mutations) >= 22  # with 17 formats: 374 at least

    def place(name: str, content: bytes) -> Path:
        folder = tmp_path / "".join(c if c.isalnum() else "_" for c in name)[:60]
        while folder.exists():
            folder = folder.with_name(folder.name + "_")
        folder.mkdir()
        if "config.json" in file or "tokenizer" in file or "safetensors" in file:
            for other in tiny_policy.iterdir():
                if not other.name.startswith("adapter") and other.name != file:
                    (folder / other.name).symlink_to(other)
            if file == "adapter_config.json":
                (folder / "config.json").unlink()
        (folder / file).write_bytes(content)
        return folder / file

    jobs = [(name, place(name, content)) for name, content in {"valid": valid, **mutations}.items()]
    found, wrong = outcomes(jobs, read), []
    assert found["valid"][0] == "gives", found["valid"]
    for name, path in jobs:
        kind, *rest = found[name]
        if kind == "ended":
            wrong.append(f"{name}: ended with {rest[0]}")
        elif kind == "gives" and name.startswith("=") and rest[0] != found["valid"][1]:
            wrong.append(f"{name}: gives something else: {rest[0][:200]}")
        elif kind == "says":
            error, expected, message = rest
            message = message.replace(str(path.parent), "")
            placed = name in OTHER_KINDS or names_the_place(name, message)
            if not expected or file not in message or not placed or len(message) > 1000:
                wrong.append(f"{name}: {error}: {message[:300]!r}")
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {len(jobs)}:\n" + "\n".join(wrong)
