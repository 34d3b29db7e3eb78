"""The systems that recipes/systems.yaml names: which model each direction asks, how, and what is kept of its output."""

import difflib
from pathlib import Path
from typing import NamedTuple

from lmolt.files import SHIPPED, shipped
from lmolt.prompts import CAP2MOL, DIRECTIONS, STYLES
from lmolt.recipes import read_recipe

SYSTEMS = SHIPPED / "recipes" / "systems.yaml"
ARCHITECTURES, KEEP = ("t5", "llama", "internlm2"), ("all", "smiles")


class System(NamedTuple):
    name: str
    architecture: str  # of ARCHITECTURES
    parameters: float
    download: float  # GB
    licence: str
    prompt: str  # of prompts.STYLES
    models: dict[str, str]  # direction: folder or Hub id
    adapters: dict[str, str | None]
    stop: tuple[str, ...] = ()
    keep: str = "all"
    unk: str = ""  # what a token without a text is read as
    trust_remote_code: bool = False
    recipe: str | None = None
    server: dict | None = None  # what generation/server.py's Server takes; models are then names there

    @property
    def needs(self) -> str:
        if self.server:
            return f"{self.name} is served at {self.server['url']}; its weights are unknown here"
        memory = f"about {2 * self.parameters / 1e9:.1f} GB of memory in bfloat16"
        flag = ", the flag --trust_remote_code" if self.trust_remote_code else ""
        disk = self.download * len(set(self.models.values()))
        return f"{self.name} needs {disk:g} GB of disk, {memory}{flag}; licence: {self.licence}"


def read_system(name: str, path: Path = SYSTEMS) -> System:
    """The system `name` of a file like recipes/systems.yaml.

    `ValueError` on an unknown name, listing the known ones, or on an entry that is not as that file's head describes.
    """
    path = shipped(path)
    entries = {str(key): entry for key, entry in read_recipe(path, anchors=True).items()}
    if name not in entries:
        near = [f" (did you mean {one!r}?)" for one in difflib.get_close_matches(name, entries, n=1)]
        raise ValueError(f"{path} has no system {name!r}{''.join(near)}: {', '.join(entries)}")
    if not isinstance(entries[name], dict):
        raise ValueError(f"{path}, {name}: {str(entries[name])[:80]!r} is no system; the file's head has its keys")
    entry, where = dict(entries[name]), f"{path}, {name}"
    parts = {direction: entry.pop(direction, entry.get("both")) for direction in DIRECTIONS}
    entry.pop("both", None)
    for direction, part in parts.items():
        if not isinstance(part, dict) or "model" not in part or part.keys() - {"model", "adapter"}:
            raise ValueError(
                f"{where}: {direction} (or both) is {part}; write {{model: FOLDER_OR_ID, adapter: FOLDER}}"
            )
    wanted = {"architecture", "parameters", "download", "licence", "prompt"}
    if "server" in entry:
        from lmolt.generation.server import check_entry

        check_entry(entry["server"], parts, where)
        entry = {"architecture": "served", "parameters": 0, "download": 0, "licence": "that of the server"} | entry
    if wrong := (wanted - entry.keys()) | (entry.keys() - wanted - set(System._field_defaults)):
        raise ValueError(f"{where}: missing or unknown: {', '.join(sorted(wrong))}; the file's head has the keys")
    for key, known in {"architecture": ARCHITECTURES, "prompt": STYLES, "keep": KEEP}.items():
        known_one = isinstance(entry.get(key, ""), str) and entry.get(key) in known
        if key in entry and not known_one and not (key == "architecture" and "server" in entry):
            raise ValueError(f"{where}: {key} is {entry[key]!r}; use one of {', '.join(known)}")
    stop = entry.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"{where}: stop is {str(stop)[:80]!r}; write a list of texts")
    if not isinstance(entry.get("unk", ""), str):
        raise ValueError(f'{where}: unk is {str(entry["unk"])[:80]!r}; write a text, such as "\\\\"')
    for part in parts.values():
        if not isinstance(part["model"], str) or not isinstance(part.get("adapter"), str | None):
            raise ValueError(f"{where}: model and adapter are names, not {str(part)[:80]}")
    entry["stop"] = tuple(stop)
    models = {direction: part["model"] for direction, part in parts.items()}
    adapters = {direction: part.get("adapter") for direction, part in parts.items()}
    return System(name, models=models, adapters=adapters, **entry)


def load(
    system: System,
    direction: str,
    *,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple:
    """The model and tokenizer of one direction, as `translate.load_translator` loads them.

    An output ends at each of `stop` that is one token. `ValueError` with what the system needs if it can't be loaded.
    """
    if system.server:
        from lmolt.generation.server import Server

        if load_in_4bit:
            raise ValueError(f"{system.name} is served: its precision is the server's")
        return Server(**system.server, model=system.models[direction]), None
    import torch

    from lmolt.generation.translate import load_translator, process_state
    from lmolt.models.internlm2 import load_internlm2
    from lmolt.models.loading import load_tokenizer

    name, adapter = system.models[direction], system.adapters[direction]
    if system.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"{system.name} runs code that comes with {name}; read that code, and if you trust it, say "
            f"--trust_remote_code ({system.needs})"
        )
    for folder in (name, adapter) if system.recipe else ():
        if folder and folder.count("/") > 1 and not Path(folder).exists():
            raise FileNotFoundError(
                f"{folder} is not there: {system.name} is trained with {system.recipe}; `./launch.sh paper` says how"
            )
    try:
        if system.architecture == "internlm2":
            if load_in_4bit or adapter:
                raise ValueError(f"{name} is read as a Llama here, neither in 4 bit nor with an adapter")
            device = process_state().device
            dtype = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
            model = load_internlm2(name, dtype).to(device)
        else:
            options = {"dtype": dtype, "load_in_4bit": load_in_4bit, "trust_remote_code": trust_remote_code}
            model, tokenizer = load_translator(name, adapter, **options)
    except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
        raise ValueError(f"{error}\n{system.needs}") from error
    known, ends = tokenizer.get_vocab(), model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    model.generation_config.eos_token_id = ends + [known[stop] for stop in system.stop if stop in known]
    return model, tokenizer


def finish(system: System, direction: str, output: str) -> str:
    """What is kept of an output: up to `stop`; with `keep: smiles`, its longest word that RDKit reads as a molecule.

    An output without such a word stays as it is, and counts as what it is, an invalid molecule.
    """
    for stop in system.stop:
        output = output.split(stop)[0]
    output = output.strip()
    if system.keep == "all" or direction != CAP2MOL:
        return output
    from lmolt.metrics.smiles import is_molecule, oddity
    from lmolt.metrics.workers import in_processes

    words = [word.strip("`'\".,;:") for word in output.split()]
    words = [word for word in dict.fromkeys(words) if word and not oddity(word)]
    readable = in_processes(is_molecule, words)
    return max((word for word, ok in zip(words, readable, strict=True) if ok is True), key=len, default=output)
