"""A base as its class in transformers names it: where each stored tensor goes, what kind of layer it is, what is tied.

Folding needs it: an adapter names modules, a file may name its tensors otherwise (GPT-2 without `transformer.`, a
mixture's experts one by one), and only the class tells whether a square weight is stored transposed.
"""

import re
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from lmolt.merging.checkpoints import Checkpoint


@dataclass(frozen=True)
class Home:
    """Where a stored tensor goes: into `parameter`, all of it or one expert's rows from `row` on."""

    parameter: str
    expert: int | None = None
    row: int = 0
    converted: bool = False  # by some other operation, which isn't followed


class Architecture:
    """`model` on the meta device (None: no class of transformers); `homes` {stored tensor: Home} of what it loads.

    `unlike` {stored tensor: its shape, the model's} are those that config.json gives another shape.
    """

    def __init__(self, base: Checkpoint, model: nn.Module | None):
        self.model, self.homes, self.unlike = model, {}, {}
        self.vocabulary = {base.config.get(key) for key in ("vocab_size", "padded_vocab_size")}
        if model is None:
            self.homes = {name: Home(name) for name in base.entries}
            self.ties, self.quantised = {}, None
            return
        state = model.state_dict()
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._rename = lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        for name, entry in base.entries.items():
            parameter, pattern = self._rename(name)
            if parameter in state:
                self.homes[name] = self._home(
                    parameter, pattern, apply_renamings(name, renamings), entry.shape, converters
                )
                if pattern is None and tuple(entry.shape) != tuple(state[parameter].shape):
                    self.unlike[name] = (list(entry.shape), list(state[parameter].shape))
        kinds = {"Conv1D": Conv1D, "Embedding": nn.Embedding, "Linear": nn.Linear}
        self._kinds = {  # now, before PEFT wraps a module
            path: kind
            for path, module in model.named_modules()
            for kind, layer in kinds.items()
            if isinstance(module, layer)
        }
        self.ties = {}  # parameter -> all that share its storage; a loader unties what is stored twice and differs
        for target, source in model.all_tied_weights_keys.items():
            group = self.ties.setdefault(source, [source])
            group.append(target)
            self.ties[target] = group
        kept = {*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())}
        self.quantised = {  # transformers' choice of what bitsandbytes stores in 4 bits
            f"{name}.weight"
            for name, module in model.named_modules()
            if (type(module) is nn.Linear or isinstance(module, Conv1D))
            and not any(name == key or name.endswith(f".{key}") or f"{key}." in f"{name}." for key in kept)
        }

    @staticmethod
    def _home(parameter: str, pattern: str | None, name: str, shape: tuple, converters: list) -> Home:
        if pattern is None:
            return Home(parameter)
        converter = next(rule for rule in converters if pattern in rule.source_patterns)
        steps = [(type(step), step.dim) for step in converter.operations if hasattr(step, "dim")]
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
        if steps[:1] != [(MergeModulelist, 0)] or steps[1:] not in ([], [(Concatenate, 1)]) or not number:
            return Home(parameter, converted=True)
        if len(steps) != len(converter.operations):
            return Home(parameter, converted=True)
        return Home(parameter, int(number[1]), converter.source_patterns.index(pattern) * shape[0])

    def module(self, name: str) -> nn.Module | None:
        """The module of this name, if there is one."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def kind(self, parameter: str) -> str:
        """Of the module that holds `parameter`: Linear, Conv1D, Embedding, or `other`; Linear if there is no class."""
        return self._kinds.get(parameter.rpartition(".")[0], "other") if self.model is not None else "Linear"

    def stored_name(self, parameter: str) -> str:
        """The name under which a parameter that the file lacks can be added to it."""
        if self._rename(parameter) != (parameter, None):
            raise ValueError(f"{parameter} can't be added to the file of a {type(self.model).__name__}")
        return parameter

    def is_quantised(self, name: str, shape: tuple) -> bool:
        """Whether QLoRA held this stored tensor in 4 bits."""
        if self.quantised is not None:
            return name in self.homes and self.homes[name].parameter in self.quantised
        # no class of transformers: a matrix that is no embedding and no head, which have a row for each token
        named = re.search(r"embed|lm_head|wte|wpe|shared|relative_attention_bias", name)
        return len(shape) == 2 and shape[0] not in self.vocabulary and not named


def read_architecture(base: Checkpoint, adapter_modules: set[str]) -> Architecture:
    """The base's class, the first of those that fit which has all of `adapter_modules`.

    transformers builds it without weights. A model that brings its own code isn't run: its tensors' names are taken as
    the modules' and its layers as linear ones.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False)  # nor asked for
    except (ValueError, OSError, KeyError, AttributeError, TypeError):
        return Architecture(base, None)
    names = [getattr(transformers, name, None) for name in config.architectures or []]
    auto = [transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM]
    found = []
    for make in [*(name._from_config if name else None for name in names), *(kind.from_config for kind in auto)]:
        if make is None:
            continue
        try:
            with torch.device("meta"):
                found.append(Architecture(base, make(config)))
        except (ValueError, TypeError, AttributeError):
            continue
        if all(found[-1].module(name) is not None for name in adapter_modules):
            return found[-1]
    return found[0] if found else Architecture(base, None)
