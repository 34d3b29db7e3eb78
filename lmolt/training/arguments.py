"""The arguments of training: those of transformers, with the paper's values as defaults, and ours."""

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_npu_available, is_torch_xpu_available

from lmolt.training.losses import LOSSES, PARAMETERS


def _help(name: str) -> str:
    """Of a parameter's flag: which losses have it, and their defaults."""
    defaults = {loss: entry.parameters[name] for loss, entry in LOSSES.items() if name in entry.parameters}
    same = len(set(defaults.values())) == 1
    of = ", ".join(loss if same else f"{loss} ({default})" for loss, default in defaults.items())
    return f"{PARAMETERS[name].help}, of {of}" + (f"; default {next(iter(defaults.values()))}" if same else "")


# a flag for each parameter of a loss; None where it isn't given, or isn't this loss's
_Parameters = dataclasses.make_dataclass(
    "_Parameters",
    [
        (name, parameter.kind | None, field(default=None, metadata={"help": _help(name)}))
        for name, parameter in PARAMETERS.items()
    ],
    bases=(TrainingArguments,),
)


@dataclass
class PreferenceArguments(_Parameters):
    """Every flag of transformers.TrainingArguments, with the paper's values (its appendix) as defaults, and ours."""

    loss: str = field(
        default="cpo", metadata={"help": "; ".join(f"{name}: {loss.definition}" for name, loss in LOSSES.items())}
    )
    model: str | None = field(default=None, metadata={"help": "causal LM to align: folder or Hub id"})
    revision: str | None = field(default=None, metadata={"help": "revision of --model on the Hub"})
    adapter: str | None = field(default=None, metadata={"help": "continue this LoRA adapter; it is then the reference"})
    triples: str | None = field(default=None, metadata={"help": "preference triples, .parquet or .jsonl"})
    eval_triples: str | None = field(default=None, metadata={"help": "validation triples; default: --eval_fraction"})
    eval_fraction: float = field(default=0.05, metadata={"help": "share of sources held out when no --eval_triples"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "discard what --output_dir holds"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with --model"})

    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 with double quantisation (QLoRA)"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapter, alpha / r"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout before the adapter"})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "all-linear, or names with commas"})

    max_length: int = field(default=1024, metadata={"help": "most tokens of a prompt and one output"})
    max_length_policy: str = field(default="error", metadata={"help": "longer rows: error, or drop (and count)"})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "cut each step into micro-batches of at most so many tokens; sets the accumulation"},
    )
    packing: str = field(default="tree", metadata={"help": "tree: shared prefixes once; padded: one row an output"})
    score_chunk: int | None = field(
        default=None, metadata={"help": "positions whose logits exist at one time; default 256, on a GPU 1024"}
    )
    eval_translations: int = field(
        default=0,
        metadata={"help": "held-out sources to translate and score per direction at each evaluation"},
    )
    eval_max_new_tokens: int = field(default=250, metadata={"help": "longest translation during evaluation"})

    # TrainingArguments' own, with the paper's values
    output_dir: str | None = field(default=None, metadata={"help": "where to write; default runs/LOSS"})
    hub_strategy: str = field(default="end", metadata={"help": "of --push_to_hub: end, the finished adapter once"})
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 64
    optim: str = "adamw_torch_fused"
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1  # a value below 1 is a share of all steps
    max_grad_norm: float = 0.3
    bf16: bool = True
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 2
    load_best_model_at_end: bool = True
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # a NaN must be seen
    ddp_find_unused_parameters: bool = False  # each micro-batch uses every LoRA matrix
    report_to: str = "none"

    def __post_init__(self):
        for name, allowed in {
            "loss": LOSSES,
            "packing": ("tree", "padded"),
            "max_length_policy": ("error", "drop"),
            "hub_strategy": ("end",),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length",
            "tokens_per_batch", "score_chunk", "lora_r",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it is 1 or more")
        self._fill_parameters()
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction is {self.eval_fraction:g}; it is 0 or more, and less than 1")
        if self.hub_token is not None:
            raise ValueError("--hub_token would show in the shell's history; use `hf auth login`, or set HF_TOKEN")
        self.output_dir = self.output_dir or f"runs/{self.loss}"
        if not (torch.cuda.is_available() or is_torch_xpu_available() or is_torch_npu_available()):
            self.use_cpu = True  # a laptop needs no flag; Apple's GPUs have neither NF4 nor float64
        if self.fp16:
            self.bf16 = False  # which is on by default
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False  # nothing would say which is the best, or keep it
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # else Trainer cuts batches for all GPUs that one process sees (DataParallel)
        self.label_names = []  # the loss is computed from trees, not from labels

    def _fill_parameters(self) -> None:
        """The loss's own parameters get its defaults; another's, or a value without sense, is a `ValueError`."""
        own = LOSSES[self.loss].parameters
        for name, parameter in PARAMETERS.items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, own.get(name))
                continue
            if name not in own:
                having = ", ".join(loss for loss, entry in LOSSES.items() if name in entry.parameters)
                raise ValueError(f"--{name} has no effect with --loss {self.loss}, it is of {having}; leave it out")
            if (parameter.kind is float and not math.isfinite(value)) or not parameter.valid(value):
                raise ValueError(f"--{name} is {value!r}; {parameter.values}")

    @property
    def loss_parameters(self) -> dict:
        """The loss's own parameters, as they are in this run."""
        return {name: getattr(self, name) for name in LOSSES[self.loss].parameters}
