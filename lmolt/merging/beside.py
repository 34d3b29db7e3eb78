"""What lies beside a model's weights: its tokenizer, which must number tokens as the other models' do, and the rest.

Tokenizers are compared by their files, not run: one that brings its own code would have to be, and a library's reading
of a vocabulary can fail in ways of its own.
"""

from pathlib import Path

from lmolt.files import read_json

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
VOCABULARIES += ("sentencepiece.bpe.model",)


def read_vocabulary(folder: Path) -> tuple[str, dict[str, int] | bytes] | None:
    """(file's name, {token: id}, or the bytes of a SentencePiece model) of a tokenizer; None without one."""
    for name in VOCABULARIES:
        file = folder / name
        if not file.is_file():
            continue
        if name.endswith(".model"):
            return name, file.read_bytes()
        if name == "vocab.txt":
            return name, {token: i for i, token in enumerate(file.read_text(encoding="utf-8").splitlines())}
        content = read_json(file)
        if name == "vocab.json":
            return name, content
        model, added = content.get("model"), content.get("added_tokens") or []
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
            vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary)}
        if not isinstance(vocabulary, dict) or not isinstance(added, list):
            raise ValueError(f"{file}: holds no vocabulary; save the tokenizer again")
        return name, vocabulary | {token["content"]: token["id"] for token in added}
    return None


def compare_tokenizers(first: Path, other: Path) -> list[str]:
    """Notes; `ValueError` where a token has another number: tokens merge by number."""
    notes = []
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        files = [folder / name for folder in (first, other)]
        if not all(file.is_file() for file in files):
            continue
        templates = [read_json(f).get("chat_template") if name.endswith("json") else f.read_bytes() for f in files]
        if templates[0] != templates[1] and None not in templates:
            notes.append(f"{first} and {other} have different chat templates; the output has the first's")
    both = [name for name in VOCABULARIES if (first / name).is_file() and (other / name).is_file()]
    if both and (first / both[0]).read_bytes() == (other / both[0]).read_bytes():  # what a loader takes first
        return notes
    if both[:1] == ["tokenizer.json"]:
        parts = [read_json(folder / "tokenizer.json") for folder in (first, other)]
        parts = [part | (part["model"] if isinstance(part.get("model"), dict) else {}) for part in parts]
        steps = ("normalizer", "pre_tokenizer", "post_processor", "merges")
        if odd := [key for key in steps if parts[0].get(key) != parts[1].get(key)]:
            notes.append(
                f"{first} and {other}: their tokenizers differ in {', '.join(odd)}; the output has the first's"
            )
    one, two = read_vocabulary(first), read_vocabulary(other)
    if one is None or two is None:
        return notes + ([f"{first if two else other} has no tokenizer; nobody compared them"] if one or two else [])
    if one[0] != two[0] or isinstance(one[1], bytes):
        return [*notes, f"the tokenizers of {first} ({one[0]}) and {other} ({two[0]}) differ and can't be compared"]
    odd = sorted((i, token) for token, i in one[1].items() if two[1].get(token, i) != i)
    numbers = {i: token for token, i in two[1].items()}
    odd = odd or sorted((i, token) for token, i in one[1].items() if numbers.get(i, token) != token)
    if odd:
        number, token = odd[0]
        raise ValueError(
            f"{first} and {other}: {len(odd)} tokens have other numbers: {token!r} is {number} in the first, "
            f"{two[1].get(token, 'absent')} in the second, where {number} is {numbers.get(number)!r}. Tokens merge by "
            "number: give both models one tokenizer"
        )
    if lone := one[1].keys() ^ two[1].keys():
        notes.append(f"{len(lone)} tokens are in one of {first} and {other} only, such as {sorted(lone)[0]!r}")
    return notes


# --- what the output takes over from the first model's folder

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx*")
WEIGHTS += ("*.ot", "*.npz", "*.tflite", "*.mlmodel", "*.pkl", "*.pickle", "*.index.json")
OTHER = (
    "config.json",
    "README.md",
    "merge.json",
    "trainer_state.json",
    "run.json",
    "adapter_config.json",
    "all_results.json",
)
OTHER += ("*.csv", "*.tsv", "*.parquet", "*.jsonl", "*.log", "*.png", "*.pem", "*.key", "id_*", ".*", "*.lock")
FOLDERS = (
    "checkpoint-*",
    "global_step*",
    "runs",
    "onnx",
    "original",
    "optimizer*",
    ".*",
    "__pycache__",
    "wandb",
    "logs",
)


def files_to_copy(folder: Path) -> tuple[list[Path], list[str]]:
    """All but weights and records, relative to `folder`, and notes on links that lead out of it, which are left.

    In the Hub's cache a snapshot's files are links into the repository's `blobs`; those are its own.
    """
    root = folder.resolve()
    own = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    found, notes = [], []

    def walk(place: Path) -> None:
        for path in sorted(place.iterdir()):
            if any(path.match(pattern) for pattern in (FOLDERS if path.is_dir() else (*WEIGHTS, *OTHER))):
                continue
            if not any(parent in path.resolve().parents for parent in own):
                notes.append(f"{path} is a link out of its folder; it isn't copied")
            elif path.is_dir():
                walk(path) if not path.is_symlink() else None
            elif path.is_file():
                found.append(path.relative_to(folder))

    walk(folder)
    return found, notes


def check_beside(source: Path, files: list[Path]) -> str | None:
    """A note where the model has no vocabulary; `ValueError` where its vocabulary isn't among the `files` to copy."""
    vocabulary = read_vocabulary(source)
    if vocabulary is None:
        missing = (source / "tokenizer_config.json").is_file()
        return f"{source} has a tokenizer_config.json and no vocabulary; nor has the output" if missing else None
    if Path(vocabulary[0]) not in files:
        raise ValueError(
            f"{source / vocabulary[0]} is a link out of its folder, which isn't copied, and the output would have no "
            "tokenizer; put the file itself there"
        )
    return None


def read_back(folder: Path, source: Path, files: list[Path]) -> None:
    """`ValueError` where one of the `files` copied from `source` isn't the same in `folder`."""
    for file in files:
        if (folder / file).read_bytes() != (source / file).read_bytes():
            raise ValueError(f"{folder / file} is not what {source / file} holds; merge again")
