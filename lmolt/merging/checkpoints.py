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
from lmolt.merging.beside import WEIGHTS
from lmolt.merging.safetensors_io import FLOATS, STORAGE, Entry, decode, entry_values, read_bits, read_header

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
        everything: dict[str, Entry] = {}
        for entry in (entry for entries in stored.values() for entry in entries):
            if entry.name in everything:
                self._check_twice(everything[entry.name], entry)
            everything[entry.name] = entry
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
        if (self.folder / "adapter_config.json").is_file():
            self.notes.append(
                f"{folder}: an adapter lies beside the weights, which transformers would load on top; it is left out "
                "(fold it first with --adapter, if the model is meant with it)"
            )
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

    def _check_twice(self, one: Entry, other: Entry) -> None:
        """A note on a tensor that two shards hold; `ValueError` where they differ: loaders take one or the other."""
        what = f"{one.name} is in {one.file.name} and in {other.file.name}"
        same = one.shape == other.shape and one.dtype == other.dtype
        if not (
            same and all(np.array_equal(x, y) for x, y in zip(entry_values(one), entry_values(other), strict=True))
        ):
            raise ValueError(f"{self.folder}: {what}, with other values; download or save the model again")
        self.notes.append(f"{self.folder}: {what}; it is read once")

    def _remedy(self) -> str:
        if (self.folder / "adapter_config.json").is_file():
            return f"that is an adapter, so fold it into its base first: merge.py --models BASE --adapter {self.folder}"
        if pickled := sorted(file.name for file in self.folder.glob("pytorch_model*.bin")):
            return (
                f"{pickled[0]} is a pickle, and isn't read: load the model with transformers and save_pretrained it, "
                "which writes safetensors, and name that folder"
            )
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

    def bits(self, name: str) -> Iterator[np.ndarray]:
        """The same as they are stored."""
        entry = self.entries[name]
        return read_bits(entry.file, STORAGE[entry.dtype], entry.offset, entry.size)

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
