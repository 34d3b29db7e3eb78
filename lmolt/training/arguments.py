"""The arguments of training: those of transformers, with the paper's values as defaults, and ours."""

import dataclasses
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_npu_available, is_torch_xpu_available

from lmolt.distributed.strategy import wait_for_compiler
from lmolt.prompts import STYLES
from lmolt.training import liger
from lmolt.training.flags import FULL_RANK, REFUSED, check_refused
from lmolt.training.losses import LOSSES, PARAMETERS
from lmolt.training.statistics import best_is_greater

logger = logging.getLogger(__name__)
# Least and most (or "below" it) of flags that are numbers; None: no bound. NaN and infinity are never taken.
RANGES = {
    "at least 1": (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length "
        "score_chunk lora_r save_total_limit eval_max_new_tokens "
        "early_stopping_patience dataloader_prefetch_factor",
        lambda v: v >= 1,
    ),
    "more than 0": (
        "learning_rate num_train_epochs adam_epsilon lora_alpha logging_steps save_steps eval_steps ddp_timeout "
        "stalled_after",
        lambda v: v > 0,
    ),
    "0 or more": (
        "weight_decay max_grad_norm warmup_steps eval_translations eval_delay dataloader_num_workers tokens_per_batch",
        lambda v: v >= 0,
    ),
    "0 or more, and less than 1": (
        "eval_fraction lora_dropout adam_beta1 adam_beta2",
        lambda v: 0 <= v < 1,
    ),
    "0 or more, and less than 2**32": ("seed data_seed", lambda v: 0 <= v < 2**32),
}
_settled = None  # the precision that these arguments set last
LORA = {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "lora_target_modules": "all-linear"}


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
    """The arguments of training: the loss, data, adapter and batches, and what is honoured of TrainingArguments.

    Defaults are the paper's values (its appendix). `ValueError` on a value without sense, and on a flag that would have
    no effect.
    """

    loss: str = field(
        default="cpo", metadata={"help": "; ".join(f"{name}: {loss.definition}" for name, loss in LOSSES.items())}
    )
    model: str | None = field(default=None, metadata={"help": "causal LM to align: folder or Hub id"})
    revision: str | None = field(default=None, metadata={"help": "revision of --model on the Hub"})
    adapter: str | None = field(default=None, metadata={"help": "continue this LoRA adapter; it is then the reference"})
    triples: str | None = field(default=None, metadata={"help": "preference triples, .parquet or .jsonl"})
    pairs: str | None = field(
        default=None,
        metadata={"help": "of a loss without dis-preferred outputs (sft), in the place of triples: a table"},
    )
    eval_triples: str | None = field(default=None, metadata={"help": "validation triples; default: --eval_fraction"})
    eval_fraction: float | None = field(
        default=None,
        metadata={"help": "share of each direction's sources held out when no --eval_triples; default 0.05"},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "discard what a run left in --output_dir"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with --model"})

    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 with double quantisation (QLoRA)"})
    lora_r: int | None = field(default=None, metadata={"help": "rank of a fresh adapter; default 64"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of a fresh adapter, alpha / r; default 16"})
    lora_dropout: float | None = field(default=None, metadata={"help": "dropout before a fresh adapter; default 0.1"})
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "what a fresh adapter adapts: all-linear (default), or names with commas"}
    )

    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: a fresh adapter learns magnitudes apart from directions"}
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "rank-stabilised LoRA: a fresh adapter's scale is alpha / sqrt(r)"},
    )

    prompt_style: str = field(
        default="paper", metadata={"help": "how --model is asked, one of lmolt/prompts.py's STYLES: docs/models.md"}
    )
    max_length: int = field(default=1024, metadata={"help": "most tokens of a prompt and one output"})
    max_length_policy: str = field(default="error", metadata={"help": "longer rows: error, or drop (and count)"})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "cut each step into micro-batches of at most so many tokens; sets the accumulation. Default: what "
            "fits a GPU's memory; on a CPU, and with 0, --per_device_train_batch_size triples each"
        },
    )
    packing: str = field(default="tree", metadata={"help": "tree: shared prefixes once; padded: one row an output"})
    tree_attention: str = field(
        default="auto",
        metadata={
            "help": "a tree's attention: tiles, flex (FlexAttention, on a GPU), or auto, the faster at the start"
        },
    )
    score_chunk: int | None = field(
        default=None, metadata={"help": "positions whose logits exist at one time; default 256, on a GPU 1024"}
    )
    eval_translations: int = field(
        default=0,
        metadata={"help": "held-out sources to translate and score per direction at each evaluation"},
    )
    eval_max_new_tokens: int | None = field(
        default=None, metadata={"help": "longest translation of --eval_translations; default 250"}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "stop after so many evaluations without a better --metric_for_best_model, and keep the best"},
    )

    stalled_after: float | None = field(
        default=None,
        metadata={
            "help": "end after so many seconds without a micro-batch (default: ten times the longest, 60 at least)"
        },
    )

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
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "trackers, with spaces or commas: wandb, tensorboard, ..."}
    )

    def __post_init__(self):
        check_refused(self)
        for name, allowed in {
            "loss": LOSSES,
            "packing": ("tree", "padded"),
            "tree_attention": ("auto", "tiles", "flex"),
            "prompt_style": STYLES,
            "max_length_policy": ("error", "drop"),
            "hub_strategy": ("end",),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        self._check_numbers()
        self.report_to = self._trackers()
        self._check_unused()
        self._fill_parameters()
        if self.pairs and self.triples:
            raise ValueError("--pairs and --triples were both given; choose one")
        if self.pairs and "rejected" in LOSSES[self.loss].reads:
            raise ValueError(
                f"--loss {self.loss} reads dis-preferred outputs, which --pairs have not; make triples of them with "
                "scripts/make_triples.py, or take --loss sft"
            )
        if self.hub_token is not None:
            raise ValueError("--hub_token would show in the shell's history; use `hf auth login`, or set HF_TOKEN")
        if not (torch.cuda.is_available() or is_torch_xpu_available() or is_torch_npu_available()):
            self.use_cpu = True  # a laptop needs no flag; Apple's GPUs have neither NF4 nor float64
        if self.use_cpu and self.tree_attention == "flex":
            raise ValueError("--tree_attention flex: FlexAttention has no backward pass on a CPU; leave it out")
        if self.fp16:
            self.bf16 = False  # which is on by default
        if "no" in (self.eval_strategy, self.save_strategy):
            if self.early_stopping_patience is not None:
                raise ValueError("--early_stopping_patience needs --eval_strategy and --save_strategy, and one is no")
            self.load_best_model_at_end = False  # nothing would say which is the best, or keep it
        self._name_the_best()
        self.restore_callback_states_from_checkpoint = True  # else early stopping would count anew
        self._settle_precision()
        self.output_dir = self.output_dir or f"runs/{self.loss}"
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            wait_for_compiler()
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # else Trainer cuts batches for all GPUs that one process sees (DataParallel)
        self.label_names = []  # the loss is computed from trees, not from labels
        self._check_optimizer()
        liger.check_arguments(self)

    def _check_numbers(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{field_.name} is {value}; it is a finite number")
        for words, (names, valid) in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not valid(value):
                    raise ValueError(f"--{name} is {value:g}; it is {words}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"--max_steps is {self.max_steps}; it is 1 or more (or -1: all of --num_train_epochs)")

    def _check_unused(self) -> None:
        """Flags that another flag leaves without effect are errors; what was not given gets its default."""
        unless = lambda condition, names, reason: [
            (name, reason) for name in names.split() if not condition and getattr(self, name) != _default(name)
        ]
        trackers = [name for name in self.report_to if name != "none"]
        wrong = [
            *unless(self.adapter is None, " ".join(LORA) + " use_dora use_rslora", "--adapter brings its own"),
            *unless(self.eval_triples is None, "eval_fraction", "--eval_triples are held out"),
            *unless(self.eval_translations, "eval_max_new_tokens", "there are no --eval_translations"),
            *unless(self.packing == "tree", "score_chunk tree_attention", "--packing padded has no tree"),
            *unless(self.eval_strategy == "steps", "eval_steps", "--eval_strategy isn't steps"),
            *unless(self.save_strategy == "steps", "save_steps", "--save_strategy isn't steps"),
            *unless(self.logging_strategy == "steps", "logging_steps", "--logging_strategy isn't steps"),
            *unless(self.eval_strategy != "no", "eval_translations eval_delay", "--eval_strategy is no"),
            *unless(self.push_to_hub, "hub_model_id hub_private_repo hub_revision", "there is no --push_to_hub"),
            *unless(trackers, "run_name project", "there is no tracker in --report_to"),
            *unless(
                "trackio" in trackers,
                "trackio_space_id trackio_bucket_id trackio_static_space_id",
                "trackio isn't in --report_to",
            ),
            *unless(
                self.dataloader_num_workers,
                "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context",
                "there are no --dataloader_num_workers",
            ),
            *unless(
                self.gradient_checkpointing or self.activation_checkpointing,
                "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
                "there is no --gradient_checkpointing",
            ),
            *unless(self.use_liger_kernel, "liger_kernel_config", "there is no --use_liger_kernel"),
            *unless(
                self.lr_scheduler_type != "constant", "warmup_steps", "constant has no warm-up (constant_with_warmup)"
            ),
            *unless(self.model is None or not Path(self.model).is_dir(), "revision", "--model is a folder"),
        ]
        if wrong:
            raise ValueError(
                "; ".join(f"--{name} has no effect: {reason}" for name, reason in wrong) + "; leave it out"
            )
        fresh = LORA if self.adapter is None else {}
        for name, value in {
            **fresh,
            "eval_fraction": 0.0 if self.eval_triples else 0.05,
            "eval_max_new_tokens": 250,
        }.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _trackers(self) -> list[str]:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        names = [part.strip() for name in names for part in name.split(",") if part.strip()]
        if names in (["none"], ["all"]):
            return names
        available = get_available_reporting_integrations()
        for name in names:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise ValueError(f"--report_to {name!r} is no tracker; they are {known}, none, or all")
            if name not in available:
                raise ValueError(f"--report_to {name}: its package isn't installed here; install it, or leave it out")
        return names or ["none"]

    def _name_the_best(self) -> None:
        if self.load_best_model_at_end or self.metric_for_best_model is not None:
            self.metric_for_best_model = (self.metric_for_best_model or "loss").removeprefix("eval_")
            greater = best_is_greater(self.metric_for_best_model, LOSSES[self.loss], bool(self.eval_translations))
            if self.greater_is_better is None:
                self.greater_is_better = greater
        elif self.early_stopping_patience is not None:
            raise ValueError("--early_stopping_patience needs --load_best_model_at_end true")

    def _settle_precision(self) -> None:
        """--bf16 and --fp16 alone say it: transformers would take over what a left-over accelerate config set."""
        asked = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        left = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if left not in ("no", asked, _settled):
            logger.warning(
                "mixed precision is %s, as --bf16 and --fp16 say, and not accelerate's %s (its configuration, or "
                "ACCELERATE_MIXED_PRECISION)",
                asked,
                left,
            )
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND") or "no"
        if backend.lower() != "no":
            raise ValueError(
                f"accelerate's configuration (or ACCELERATE_DYNAMO_BACKEND) asks for compilation by {backend}: "
                f"{REFUSED['torch_compile']}; set dynamo_backend to 'NO'"
            )
        globals()["_settled"] = os.environ["ACCELERATE_MIXED_PRECISION"] = asked

    def _check_optimizer(self) -> None:
        if self.optim.value.startswith(FULL_RANK):
            raise ValueError(
                f"--optim {self.optim.value} is for all of a model's weights, and only an adapter is trained"
            )
        try:
            _, options = Trainer.get_optimizer_cls_and_kwargs(self)
        except (ImportError, RuntimeError, ValueError) as error:
            what = f"--optim {self.optim.value}" + (f" --optim_args {self.optim_args}" if self.optim_args else "")
            raise ValueError(f"{what} can't run here: {' '.join(str(error).split())}") from None
        given, self.optim_args = self.optim_args, None
        if given and Trainer.get_optimizer_cls_and_kwargs(self)[1] == options:
            raise ValueError(f"--optim_args {given} has no effect with --optim {self.optim.value}; leave it out")
        self.optim_args = given
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--lr_scheduler_type {self.lr_scheduler_type.value} doesn't take --lr_scheduler_kwargs "
                f"{self.lr_scheduler_kwargs}: {' '.join(str(error).split())}"
            ) from None

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


def _default(name: str):
    return next(f.default for f in dataclasses.fields(PreferenceArguments) if f.name == name)
