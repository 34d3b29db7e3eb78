"""Model folders as a loader sees them: which file, which tensors, what is tied; whether two fit each other.

No torch and no transformers here: merge.py starts in 0.2 s. What transformers' classes would say stands in tables,
which tests hold against the installed ones.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmolt.files import read_json
from lmolt.merging.safetensors_io import FLOATS, STORAGE, Entry, decode, entry_values, read_header

TIED = """
bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere
cohere2 cohere2_moe cohere_compass_text cpmant ctrl data2vec-text electra ernie ernie4_5 ernie4_5_moe falcon
falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
gemma4_unified_assistant gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese
granite_speech granite_speech_plus granite_swa jetmoe led lfm2 lfm2_moe lfm3 longt5 m2m_100 mamba marian mbart
megatron-bert minicpm3 modernbert-decoder moss_transcribe_diarize mpt mt5 mvp nllb-moe openai-gpt opt pegasus
pegasus_x plbart prophetnet qwen3_asr recurrent_gemma roberta roberta-prelayernorm roc_bert roformer seamless_m4t
seamless_m4t_v2 smollm3 starcoder2 switch_transformers t5 t5gemma t5gemma2 trocr umt5 vaultgemma voxtral_realtime
whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya
"""
TIED_BY_DEFAULT = frozenset(TIED.split())  # model types whose configs tie where config.json doesn't say
UNLOADED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|(^|\.)position_ids$")  # buffers that nothing loads
MASK = re.compile(r"attn(ention)?\.bias$|attention\.bias$")  # causal masks of four dimensions: GPT-2's, GPT-NeoX's
PACKED = re.compile(
    r"(weight|qzeros|scales?|absmax|quant_map|quant_state\w*|SCB|packed|blocks)$"
)  # of quantised layers
EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")
EMBEDDINGS += ("model.decoder.embed_tokens.weight", "language_model.model.embed_tokens.weight")
COPIES = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # where tied, the embedding's
COPIES += ("language_model.lm_head.weight", "model.encoder.embed_tokens.weight")


def find_folders(names: list[str], revision: str | None = None) -> list[Path]:
    """The folders of these names; Hub ids are downloaded, all of them asked first whether they hold safetensors."""
    online = [name for name in names if not Path(name).is_dir() and is_hub_id(name)]
    for name in online:
        _check_listing(name, revision)
    return [find_folder(name, revision) for name in names]


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))


def _check_listing(name: str, revision: str | None) -> None:
    """`ValueError` where the Hub says that a repository holds pickled weights only; offline nothing is said."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return
    if not any(file.endswith(".safetensors") for file in files) and any(file.endswith(".bin") for file in files):
        raise ValueError(
            f"{name} holds pickled weights only (pytorch_model.bin), which aren't read; nothing was downloaded. Load "
            "it with transformers and save_pretrained it, which writes safetensors, and name that folder"
        )


def find_folder(name: str, revision: str | None = None) -> Path:
    """The folder `name`, or that of the Hub id `name` after downloading all of it but weights in other formats."""
    if Path(name).is_dir() or not is_hub_id(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=[*WEIGHTS[1:], "*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name}: no such folder here, and not to be had from the Hub: {error}") from error


class Checkpoint:
    """A model folder: `entries` {name: Entry} of what is merged, `kept` {name: Entry} of buffers that are copied,
    `files` {shard's name: its entries in order, of both}, `config` (a dict), `tied`, and `notes` for the user.
    """

    def __init__(self, folder: Path):
        self.folder, self.notes = Path(folder), []
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder (a Hub id looks like org/name)")
        paths, weight_map = self._find_files()
        config = self.folder / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{config}: there is no such file; a model folder has one")
        self.config = read_json(config)
        self.text_config = self.config.get("text_config") if isinstance(self.config.get("text_config"), dict) else {}
        stored = {path.name: read_header(path) for path in paths}
        everything = {entry.name: entry for entries in stored.values() for entry in entries}
        if weight_map and (odd := set(weight_map) ^ set(everything)):
            index = self.folder / "model.safetensors.index.json"
            raise ValueError(f"{index}: does not agree with its shards about {sorted(odd)[:3]} ({len(odd)} tensors)")
        self.kept = {name: entry for name, entry in everything.items() if self._is_buffer(entry)}
        said = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        self.tied = bool(said) if said is not None else self.config.get("model_type") in TIED_BY_DEFAULT
        dropped = self._find_copies(everything)
        self.entries = {n: e for n, e in everything.items() if n not in self.kept and n not in dropped}
        if not self.entries:
            raise ValueError(f"{folder}: holds no weights to merge; save the model again")
        self.files = {}
        for file, entries in stored.items():
            left = [e for e in entries if everything[e.name] is e and e.name not in dropped]
            self.files |= {file: left} if left else {}
        if self.config.get("quantization_config"):
            self.notes.append(f"{folder}: config.json has a quantization_config beside plain weights; it is left out")

    def _find_files(self) -> tuple[list[Path], dict | None]:
        """As transformers: model.safetensors, and only without it the index's shards."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.is_file():
            if index.is_file():
                self.notes.append(
                    f"{self.folder}: model.safetensors is read, as transformers does, not the index's shards"
                )
            return [single], None
        if not index.is_file():
            raise FileNotFoundError(f"{single}: there is no such file; {self._remedy()}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: has no weight_map {{tensor: file}}; download or save the model again")
        paths = [self.folder / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            if path.parent != self.folder or not path.is_file():
                raise FileNotFoundError(f"{path}: there is no such file; its index names it; download it again")
        return paths, weight_map

    def _remedy(self) -> str:
        if (self.folder / "adapter_config.json").is_file():
            return f"that is an adapter, so fold it into its base first: merge.py --models BASE --adapter {self.folder}"
        return "merging takes safetensors: load the model with transformers and save_pretrained it, which writes them"

    def _is_buffer(self, entry: Entry) -> bool:
        """Whether a tensor is no weight: nothing loads it, or it isn't a float; `ValueError` for quantised weights."""
        if UNLOADED.search(entry.name) or (MASK.search(entry.name) and len(entry.shape) == 4):
            return True
        if entry.dtype in FLOATS:
            return False
        if entry.dtype in STORAGE and entry.dtype != "F64" and not PACKED.search(entry.name):
            return True
        raise ValueError(
            f"{entry.file}: {entry.name} is of type {entry.dtype}; merging takes bf16, fp16 and fp32 weights"
            " (dequantise the model first if these are quantised)"
        )

    def _find_copies(self, everything: dict[str, Entry]) -> set[str]:
        """Stored copies of a tied embedding; `ValueError` where one differs: then transformers' versions disagree."""
        source = next((name for name in EMBEDDINGS if name in everything), None)
        dropped = set()
        for name in COPIES:
            if source is None or name not in everything or (name.endswith("lm_head.weight") and not self.tied):
                continue
            one, other = everything[name], everything[source]
            if one.shape == other.shape and one.dtype == other.dtype:
                pairs = zip(entry_values(one), entry_values(other), strict=True)
                if all(np.array_equal(x, y) for x, y in pairs):
                    dropped.add(name)
                    self.notes.append(
                        f"{self.folder}: {name} is a copy of {source}, to which it is tied; it is left out"
                    )
                    continue
            if self.tied and name.endswith("lm_head.weight"):
                raise ValueError(
                    f"{one.file}: {name} differs from {source}, though config.json ties them: transformers 4 ignores "
                    "it, 5 loads it. Set tie_word_embeddings in config.json to false, or take the tensor out"
                )
        return dropped

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


# --- do they fit each other?


def check_checkpoints(checkpoints: list[Checkpoint], dtype: str | None) -> tuple[str, list[str]]:
    """The output's type, and notes; `ValueError` where tensors, configs or tokenizers don't fit, with the remedy."""
    first, notes = checkpoints[0], [note for checkpoint in checkpoints for note in checkpoint.notes]
    for other in checkpoints[1:]:
        if first.config.get("model_type") != other.config.get("model_type"):
            kinds = first.config.get("model_type"), other.config.get("model_type")
            raise ValueError(f"{first.folder} is a {kinds[0]}, {other.folder} a {kinds[1]}; merge models of one kind")
        odd = sorted(set(first.entries) ^ set(other.entries))
        if first.tied != other.tied or odd == ["lm_head.weight"]:
            raise ValueError(
                f"{first.folder} and {other.folder}: one ties its head to the embedding, the other does not. Untie the "
                "tied one: model.lm_head.weight = Parameter(model.get_input_embeddings().weight.clone()), "
                "config.tie_word_embeddings = False, save_pretrained"
            )
        if odd:
            where = (first if odd[0] in first.entries else other).folder
            raise ValueError(
                f"{first.folder} and {other.folder}: {len(odd)} tensors in one only, {odd[0]} in {where}; they are not "
                "of one architecture, or saved by other versions: load both with transformers and save_pretrained them"
            )
        for name, entry in first.entries.items():
            here, there = entry.shape, other.entries[name].shape
            if here == there:
                continue
            if here[1:] == there[1:] and re.search(r"embed|lm_head|wte|shared", name):
                raise ValueError(
                    f"{first.folder} has a vocabulary of {here[0]}, {other.folder} one of {there[0]} ({name}). Tokens "
                    f"merge by number: use one tokenizer, and model.resize_token_embeddings({max(here[0], there[0])})"
                )
            raise ValueError(f"{name}: {list(here)} in {first.folder}, {list(there)} in {other.folder}; other models?")
        notes += compare_configs(first, other) + compare_tokenizers(first.folder, other.folder)
    kinds = {entry.dtype for checkpoint in checkpoints for entry in checkpoint.entries.values()}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"the models hold several types ({', '.join(sorted(kinds))}); say --dtype of the output")
    return dtype or kinds.pop(), list(dict.fromkeys(notes))


# config.json's keys that change nothing about what equal tensors mean, and those that change it a little
SILENT = re.compile(
    r"^_|architectures|dtype|transformers_version|use_cache|tie_word_embeddings|quantization|pretraining_tp|dropout|pdrop"
    r"|initializer|init_std|^id2label|^label2id|problem_type|auto_map|output_(attentions|hidden|router)|return_dict"
    r"|task_specific|gradient_checkpointing|vocab_size|unsloth|is_encoder_decoder|_name$|router_aux|classifier"
)
HARMLESS = re.compile(r"max_position|max_length|n_positions|n_ctx|token_id|model_max|use_flash|attn_impl|chunk_size")


def meaning(config: dict) -> dict:
    """The config's keys that say how tensors are used, nested ones too, rope in one form for transformers 4 and 5."""
    flat: dict = {}

    def walk(prefix: str, values: dict) -> None:
        for key, value in values.items():
            if SILENT.search(key) or value is None:
                continue
            if isinstance(value, dict):
                walk("" if key in ("rope_parameters", "rope_scaling", "text_config") else f"{key}.", value)
            elif not (key in ("rope_type", "type") and value == "default"):
                flat[prefix + {"type": "rope_type"}.get(key, key)] = value

    walk("", config)
    return flat


def compare_configs(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Notes on harmless differences; `ValueError` where equal shapes mean different things."""
    one, two, notes = meaning(first.config), meaning(other.config), []
    for key in sorted(one.keys() & two.keys()):
        if one[key] == two[key]:
            continue
        what = f"{key} is {one[key]!r} in {first.folder}, {two[key]!r} in {other.folder}"
        if not HARMLESS.search(key):
            raise ValueError(
                f"config.json: {what}: their tensors mean other things. Merge models of one kind, or correct the file"
            )
        notes.append(f"config.json: {what}; the output has the first's")
    lone = sorted(
        key for key in one.keys() ^ two.keys() if re.search(r"rope|head|norm|_act|activation|window|scal", key)
    )
    if lone:
        notes.append(f"config.json: only one of {first.folder} and {other.folder} says {', '.join(lone)}")
    return notes


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
VOCABULARIES += ("sentencepiece.bpe.model",)


def read_vocabulary(folder: Path) -> tuple[str, dict[str, int] | bytes] | None:
    """(file's name, {token: id}, or the bytes of a SentencePiece model) of a tokenizer; None without one."""
    for name in (
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
    ):
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
    for name in VOCABULARIES:
        files = [folder / name for folder in (first, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
            return notes
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


def check_tokenizer(folder: Path, source: Path) -> str | None:
    """Read the tokenizer in `folder` back and compare its numbers with `source`'s; a note where that can't be done.

    `ValueError` where it reads otherwise than the first model's own.
    """
    probe = "The molecule is CC(=O)Nc1ccc(O)cc1, 4-acetamidophenol."
    if (source / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        ids = [Tokenizer.from_file(str(place / "tokenizer.json")).encode(probe).ids for place in (folder, source)]
    elif read_vocabulary(source) is None:
        if (source / "tokenizer_config.json").is_file():
            return f"{source} has a tokenizer_config.json and no vocabulary; nor has the output"
        return None
    else:
        from transformers import AutoTokenizer  # seconds: SentencePiece models and old vocabularies only

        try:
            ids = [AutoTokenizer.from_pretrained(str(place))(probe).input_ids for place in (folder, source)]
        except Exception as error:  # a tokenizer that brings its own code isn't run
            return f"the tokenizer could not be read back: {str(error).splitlines()[0][:120]}"
    if ids[0] != ids[1]:
        raise ValueError(f"{folder}: its tokenizer reads otherwise than that of {source}; copy the tokenizer's files")
    return None
