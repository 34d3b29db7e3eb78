"""Adapters that fit: loaded with all of their tensors, on the base that they were made for, or not at all."""

import json
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from lmolt.files import read_json
from lmolt.models.hashes import folder_of, model_hashes


def load_adapter(model, adapter: str, *, is_trainable: bool = False, device: str | None = None) -> PeftModel:
    """`model` with the adapter; `ValueError` where one of its tensors has no place there, or one is absent."""
    try:
        policy = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable, torch_device=device)
        saved = load_peft_weights(str(adapter), device="cpu")
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"adapter {str(adapter)!r} doesn't fit this base: {reason[:300]}; give the base that it was made for"
        ) from None
    held = get_peft_model_state_dict(policy)
    places = held.keys() | get_peft_model_state_dict(policy, save_embedding_layers=True).keys()
    for names, what in ((held.keys() - saved.keys(), "lacks"), (saved.keys() - places, "has, without a place,")):
        if names:
            raise ValueError(
                f"adapter {str(adapter)!r} {what} {len(names)} tensors of this base's {len(held)} (the first: "
                f"{min(names)!r}); it was made for another model"
            )
    return policy


def check_made_for(adapter: str, model: str, revision: str | None = None) -> None:
    """`ValueError` where an adapter names another base than `model`, or was trained by LMolT on other weights."""
    folder = folder_of(adapter, "adapter_config.json")
    named = read_json(folder / "adapter_config.json", plain=True).get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{folder / 'adapter_config.json'}: base_model_name_or_path is {str(named)[:80]}, not a name")
    hashes = _recorded(folder)
    if hashes is not None:
        if hashes != (now := model_hashes(model, revision)["base weights"]):
            raise ValueError(
                f"adapter {adapter!r} was trained on a base with weights {hashes[:80]} ({named}), and {model!r} has "
                f"{now[:80]}; give the base that it was made for"
            )
    elif named and Path(named).is_dir() and Path(model).is_dir():
        if (theirs := model_hashes(named)["base weights"]) != (ours := model_hashes(model)["base weights"]):
            raise ValueError(
                f"adapter {adapter!r} was made for {named!r} with weights {theirs[:80]}, and {model!r} has "
                f"{ours[:80]}; give the base that it was made for"
            )
    elif named and Path(named).name.lower() not in (Path(model).name.lower(), Path(model).resolve().name.lower()):
        raise ValueError(
            f"adapter {adapter!r} was made for {named!r}, and the base is {model!r}; give that one, or, if they are "
            f"the same, correct base_model_name_or_path in {folder / 'adapter_config.json'}"
        )


def _recorded(folder: Path) -> str | None:
    """The hash of the base's weights that LMolT wrote beside an adapter."""
    for name, place in (("run.json", "identity"), ("identity.json", "fixed")):
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))[place]["base weights"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
