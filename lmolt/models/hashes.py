"""What tells one model, tokenizer or adapter from another: hashes of all bytes of their files, in any format."""

from pathlib import Path

import xxhash
from huggingface_hub import hf_hub_download

from lmolt.files import content_hash, read_json

TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def folder_of(name: str, config: str, revision: str | None = None) -> Path:
    """The folder that `name` is, or where the Hub's cache has it: the one in which `config` lies."""
    return Path(name) if Path(name).is_dir() else Path(hf_hub_download(name, config, revision=revision)).parent


def model_hashes(name: str, revision: str | None = None) -> dict[str, str]:
    """Hashes of a base's weights (any format), configuration (with its code) and tokenizer, by file name."""
    folder = folder_of(name, "config.json", revision)
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    for index in [file for file in files.values() if file.name.endswith(".index.json")]:
        shards = read_json(index).get("weight_map", {}).values()
        files |= {shard: folder / shard for shard in shards}  # which may lie in folders of their own
    kinds = {"base weights": {}, "base config": {}, "tokenizer": {}}
    for name, file in sorted(files.items()):
        if name.startswith(TOKENIZER) or file.suffix in (".model", ".tiktoken"):
            kinds["tokenizer"][name] = file
        elif (file.suffix in WEIGHTS and name != "training_args.bin") or name.endswith(".index.json"):
            kinds["base weights"][name] = file
        elif name == "config.json" or file.suffix == ".py":
            kinds["base config"][name] = file
    return {kind: _of_files(named) for kind, named in kinds.items()}


def adapter_hash(name: str, revision: str | None = None) -> str:
    """Hash of an adapter's weights, in any format, and its configuration."""
    folder = folder_of(name, "adapter_config.json", revision)
    files = [*folder.glob("adapter_model*"), folder / "adapter_config.json"]
    return _of_files({file.name: file for file in sorted(files)})


def _of_files(files: dict[str, Path]) -> str:
    """Of one file, its own; of several, that of their names with their hashes."""
    hashes = {name: content_hash(file) for name, file in files.items()}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    return f"{len(hashes)} files {xxhash.xxh3_128_hexdigest(lines.encode())}"
