"""Load a policy: base model, 4-bit quantisation, LoRA adapter (new, or one that training continues)."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lmolt.models.attention import TREE

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def nf4(half: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """QLoRA's storage: NF4 with double quantisation, computing in bf16 (the paper's appendix) or another `half`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
        bnb_4bit_quant_storage=half,  # a float's, so that FSDP shards it; the run's, so that DeepSpeed doesn't cast it
    )


def check_model_folder(name: str) -> None:
    """`FileNotFoundError` if `name` looks like a local folder and holds no model; Hub ids pass."""
    folder = Path(name)
    if not folder.exists():
        if _is_path(name):
            raise FileNotFoundError(f"model folder {name!r} doesn't exist; give a folder with a model, or a Hub id")
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{name!r} is an adapter; give its base with --model and this folder with --adapter")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{name!r} holds no config.json; give the folder that save_pretrained wrote")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise FileNotFoundError(f"{name!r} has a config.json but no weights ({' or '.join(WEIGHTS)})")


def _is_path(name: str) -> bool:  # and not OWNER/NAME on the Hub
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_adapter_folder(name: str) -> None:
    """`FileNotFoundError` if `name` looks like a local folder and holds no adapter; Hub ids pass."""
    folder = Path(name)
    if not folder.exists() and _is_path(name):
        raise FileNotFoundError(f"adapter folder {name!r} doesn't exist; give a folder with an adapter, or a Hub id")
    if folder.exists() and not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{name!r} holds no adapter_config.json; give the folder of a PEFT adapter")


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False):
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_base(name: str, *, revision=None, load_in_4bit=False, dtype=torch.bfloat16, trust_remote_code=False):
    """A causal LM, in NF4 or in `dtype`, on this process's device. User's mistakes raise `ValueError`."""
    check_model_folder(name)
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(f"{name!r} is an encoder-decoder ({config.model_type}); preference training takes causal LMs")
    stored = getattr(config, "quantization_config", None)
    if load_in_4bit and stored is not None:
        raise ValueError(
            f"{name!r} is stored quantised ({stored.get('quant_method', 'unknown')}) and can't be quantised to NF4 "
            "again; use --load_in_4bit false, or the unquantised model"
        )
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16  # GPUs before Ampere have no bf16
    kwargs = {"quantization_config": nf4(half)} if load_in_4bit else {}
    if load_in_4bit and torch.cuda.is_available():
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        attn_implementation=TREE,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    if not model._supports_attention_backend or getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # BLOOM's ALiBi, Gemma 2's soft cap: no mask of ours fits
    if load_in_4bit and not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise ValueError(f"{name!r} ({config.model_type}) has no linear layer to quantise; use --load_in_4bit false")
    return model


def add_adapter(
    model, adapter: str | None, *, r: int, alpha: int, dropout: float, target_modules: str, revision: str | None = None
):
    """The trainable policy: a fresh LoRA (B = 0, so the policy starts as its base), or `adapter` continued.

    `revision` is the base's on the Hub: the adapter's config keeps it, and whoever loads the adapter gets that base.
    """
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first forward pass in eval mode, for a
        # kernel without gradient, and never unpacks it: training after an evaluation would silently lose gradients.
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    if adapter is not None:
        device = str(next(model.parameters()).device)  # else each process would fill the first GPU
        return PeftModel.from_pretrained(model, adapter, is_trainable=True, torch_device=device)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        bias="none",
    )
    return get_peft_model(model, config, revision=revision)


def check_saved_adapter(folder: Path, model) -> None:
    """Read a saved adapter back: the same tensors as in `model`, none empty, all finite. `ValueError` otherwise.

    ZeRO-3 is known to save empty tensors in silence; there, what this rank holds is empty too, and not compared. Of
    what FSDP shares out, this is the first rank's part, the first rows.
    """
    saved, held = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    if not saved or saved.keys() != held.keys():
        raise ValueError(f"{folder}: the saved adapter has {len(saved)} tensors instead of {len(held)}")
    for name, tensor in saved.items():
        if tensor.numel() == 0 or not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} was saved {'empty' if tensor.numel() == 0 else 'with NaN or Inf'}")
        own = held[name].to_local() if isinstance(held[name], DTensor) else held[name]
        if own.numel() and not torch.equal(tensor[: len(own)], own.cpu().to(tensor.dtype)):
            raise ValueError(f"{folder}: {name} was saved with other values than the model has")
