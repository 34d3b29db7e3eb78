"""Whether models fit each other: their tensors, what their configs say of equal shapes, their tokens' numbers."""

import re

from lmolt.files import read_json
from lmolt.merging.beside import compare_tokenizers
from lmolt.merging.checkpoints import MASK, UNLOADED, Checkpoint


def check_checkpoints(checkpoints: list[Checkpoint], dtype: str | None) -> tuple[str, list[str]]:
    """The output's type, and notes; `ValueError` where tensors, configs or tokenizers don't fit, with the remedy."""
    first, notes = checkpoints[0], [note for checkpoint in checkpoints for note in checkpoint.notes]
    for other in checkpoints[1:]:
        if first.config.get("model_type") != other.config.get("model_type"):
            kinds = [source.config.get("model_type") or "model of no model_type" for source in (first, other)]
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
    r"^_|dtype|transformers_version|use_cache|tie_word_embeddings|quantization|pretraining_tp|dropout|pdrop"
    r"|initializer|init_std|^id2label|^label2id|problem_type|auto_map|output_(attentions|hidden|router)|return_dict"
    r"|task_specific|gradient_checkpointing|vocab_size|unsloth|is_encoder_decoder|_name$|router_aux|classifier"
)
HARMLESS = re.compile(
    r"architectures|max_position|max_length|n_positions|n_ctx|token_id|model_max|use_flash|attn_impl|chunk_size"
)


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
    if lone := sorted(one.keys() ^ two.keys()):  # where a key is left out, its class's default counts
        said = ", ".join(f"{key} = {str((one | two)[key])[:60]}" for key in lone)
        notes.append(
            f"config.json: only one of {first.folder} and {other.folder} says {said}; see that the "
            "other's default is the same; the output has what the first says"
        )
    loaded = lambda source: {name for name in source.kept if not (UNLOADED.search(name) or MASK.search(name))}
    if lone := sorted(loaded(first) ^ loaded(other)):
        notes.append(
            f"only one of {first.folder} and {other.folder} holds {', '.join(lone[:3])} ({len(lone)} tensors that are "
            "not floats); the output has the first's"
        )
    files = [source.folder / "generation_config.json" for source in (first, other)]
    if all(file.is_file() for file in files):
        one, two = (meaning(read_json(file)) for file in files)
        if odd := sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)):
            notes.append(f"{files[0]} and {files[1]} differ in {', '.join(odd)}; the output has the first's")
    return notes
