"""Load a policy: base model, 4-bit quantisation, LoRA adapter (new, or one that training continues)."""

import functools
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from lmolt.files import read_json
from lmolt.models.adapters import load_adapter
from lmolt.models.attention import TREE
from lmolt.models.excerpt import FAILURES, four_bit
from lmolt.models.precision import bf16_is_slow
from lmolt.models.self_check import takes_attention
from lmolt.models.tokenizers import check_tokenizer

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
UNREADABLE = (  # what transformers says of a file: a value of another type, a class that nobody knows
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, StrictDataclassError),
)
EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}  # as PEFT knows the parts of an expert


def say(line: str) -> None:
    """Print a line, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def nf4(half: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """QLoRA's storage: NF4 with double quantisation, computing in bf16 (the paper's appendix) or another precision."""
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
    """The tokenizer of a folder or Hub id, checked against the model's config; `ValueError` names a damaged file.

    Where it names no EOS (Galactica), the config's ends outputs.
    """
    config = read_config(name, revision, trust_remote_code)
    tokenizer = _read_tokenizer(name, revision, trust_remote_code)
    end = config.get_text_config(decoder=True).eos_token_id
    if tokenizer.eos_token_id is None and end is not None:
        token = tokenizer.convert_ids_to_tokens(end[0] if isinstance(end, list) else end)
        if token is not None:
            tokenizer.eos_token = token
            say(f"{name}: its tokenizer names no EOS; {token!r}, which its config.json names, ends outputs")
    if tokenizer.init_kwargs.get("add_bos_token") and tokenizer.bos_token_id is None:
        say(f"{name}: its tokenizer is to add a BOS and names none (bos_token): prompts begin without one")
    check_tokenizer(tokenizer, config, name)
    return tokenizer


def _read_tokenizer(name: str, revision: str | None, trust_remote_code: bool):
    folder = Path(name)
    files = [file for file in ("tokenizer.json", "tokenizer_config.json") if (folder / file).is_file()]
    for file in files:
        tokens = read_json(folder / file, plain=True).get("added_tokens", [])  # what is no JSON is named with its place
        if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
            raise ValueError(f"{folder / file}: added_tokens is {str(tokens)[:60]!r}, and no list of objects")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except BaseException as error:  # tokenizers' Rust raises Exception itself, and its panics are none
        rust = type(error) is Exception or type(error).__name__ == "PanicException"
        if not files or not (rust or isinstance(error, UNREADABLE)) or "trust_remote_code" in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / files[0]} can't be read: {type(error).__name__} {reason}") from None


def load_base(
    name: str,
    *,
    revision=None,
    load_in_4bit=False,
    dtype=torch.bfloat16,
    trust_remote_code=False,
    use_cpu=False,
):
    """A causal LM, in NF4 or in `dtype`, on this process's GPU if there is one and not `use_cpu`.

    User's mistakes raise `ValueError`.

    Its attention is `TREE` where its class takes an attention function, else the class's own, "eager".
    """
    config = read_config(name, revision, trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(f"{name!r} is an encoder-decoder ({config.model_type}); preference training takes causal LMs")
    stored = getattr(config, "quantization_config", None)
    if load_in_4bit and stored is not None:
        raise ValueError(
            f"{name!r} is stored quantised ({stored.get('quant_method', 'unknown')}) and can't be quantised to NF4 "
            "again; use --load_in_4bit false, or the unquantised model"
        )
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16  # GPUs before Ampere have no bf16
    if dtype == torch.float32 and (use_cpu or not torch.cuda.is_available()) and bf16_is_slow():
        half = torch.float32
    kwargs = {"quantization_config": nf4(half)} if load_in_4bit else {}
    if torch.cuda.is_available() and not is_deepspeed_zero3_enabled() and (load_in_4bit or not is_fsdp_enabled()):
        # else each process fills the machine's memory first, and NF4 goes to a GPU that the run leaves alone
        kwargs["device_map"] = {"": "cpu" if use_cpu else torch.cuda.current_device()}
    kwargs |= {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
    model = _load(AutoModelForCausalLM, name, config, _attention(AutoModelForCausalLM, config), **kwargs)
    quantised = four_bit(model)
    if load_in_4bit and not quantised:
        raise ValueError(f"{name!r} ({config.model_type}) has no linear layer to quantise; use --load_in_4bit false")
    for module in quantised:
        if module.in_features % 64 or module.out_features % 64:
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' kernel for it fails on such sizes
    return model


def load_seq2seq(name: str, *, dtype=torch.float32, trust_remote_code=False):
    """An encoder-decoder in `dtype`, with the attention that its class chooses. User's mistakes raise `ValueError`."""
    config = read_config(name, None, trust_remote_code)
    return _load(AutoModelForSeq2SeqLM, name, config, None, dtype=dtype, trust_remote_code=trust_remote_code)


def check_sizes(name: str, config, largest_id: int, longest: int) -> None:
    """`ValueError` where a model has no embedding for token `largest_id`, or too few positions for `longest` tokens."""
    text = config.get_text_config()
    if largest_id >= text.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} gives token {largest_id}, and the model has embeddings for {text.vocab_size} "
            "(vocab_size): give the model that it belongs to, or one resized to it (resize_token_embeddings)"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"{name!r} has {positions} positions (max_position_embeddings), and the longest row takes {longest}; "
            f"drop and count such rows with --max_length {positions} --max_length_policy drop"
        )


def read_config(name: str, revision: str | None, trust_remote_code: bool):
    check_model_folder(name)
    folder = Path(name)
    if folder.is_dir():
        kind = read_json(folder / "config.json", plain=True).get("model_type", "")  # no JSON is named with its place
        if not isinstance(kind, str):
            raise ValueError(f"{folder / 'config.json'}: model_type is {str(kind)[:60]}, and no architecture's name")
        if (settings := folder / "generation_config.json").is_file():  # transformers makes one up for a damaged one
            ends = read_json(settings, plain=True).get("eos_token_id")
            if not all(end is None or type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
                raise ValueError(f"{settings}: eos_token_id is {str(ends)[:60]!r}, and neither a number nor numbers")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        if not folder.is_dir() or "trust_remote_code" in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / 'config.json'} can't be read: {type(error).__name__} {reason}") from error


def _attention(auto, config) -> str:
    """What a class can take: `TREE` where its layers call an attention function by name, else "eager", its own.

    Code that comes with a model is not looked into: eager.
    """
    classes = auto._model_mapping.get(type(config), ())
    classes = classes if isinstance(classes, tuple | list) else (classes,)
    return TREE if classes and all(map(takes_attention, classes)) else "eager"


def _load(auto, name: str, config, attention: str | None, **kwargs):
    """The model with all of its weights, and the attention that was asked for: `ValueError` where anything differs."""
    if attention is not None:
        kwargs["attn_implementation"] = attention
    try:
        # a weight of another shape would be an error without a name; the report names it
        model, report = auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"model {name!r}: its pytorch_model.bin holds more than tensors, so it isn't read (torch.load with "
            "weights_only); take a model in safetensors"
        ) from error
    except (SafetensorError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"model {name!r}: its weights are cut off or damaged ({error}); download them again"
        ) from error
    except (RuntimeError, KeyError, TypeError, AttributeError, ImportError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"model {name!r} ({config.model_type}) can't be loaded: {type(error).__name__} {error}"
        ) from error
    check_weights(name, model, report)
    if attention is not None and model.config._attn_implementation != attention:
        raise ValueError(
            f"model {name!r} ({config.model_type}) was asked to load with {attention} attention and has "
            f"{model.config._attn_implementation}; its numbers could not be trusted"
        )
    return model


def check_weights(name: str, model, report: dict) -> None:
    """`ValueError` that names what a checkpoint lacks, or holds without a place, or in another shape than the model."""
    wrong = {
        "has no weight for": sorted(report["missing_keys"]),
        "holds weights that the model has no place for": sorted(
            key for key in report["unexpected_keys"] if not _harmless(key, model.config)
        ),
        "holds other shapes for": [
            f"{key} {list(held)} instead of {list(wanted)}" for key, held, wanted in sorted(report["mismatched_keys"])
        ],
    }
    found = [f"{what} {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in wrong.items() if keys]
    found += list(map(str, report.get("error_msgs") or ()))
    if found:
        raise ValueError(
            f"model {name!r} ({model.config.model_type}) {'; it '.join(found)}: config.json and weights don't belong "
            "together, or a file is missing. What lacks would be random numbers"
        )


def _harmless(key: str, config) -> bool:
    """Whether a weight that no module takes changes nothing: a buffer computed from the config, a head that is tied."""
    tied = config.get_text_config(decoder=True).tie_word_embeddings and re.search(
        r"(^|\.)(lm_head|embed_out)\.weight$", key
    )
    return bool(
        tied or re.search(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$", key)
    )


def add_adapter(
    model,
    adapter: str | None,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str,
    use_dora: bool = False,
    use_rslora: bool = False,
    revision: str | None = None,
):
    """The trainable policy: a fresh LoRA (B = 0, so the policy starts as its base), or `adapter` continued.

    `revision` is the base's on the Hub: the adapter's config keeps it, and whoever loads the adapter gets that base.
    """
    for module in four_bit(model):
        # On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first forward pass in eval mode, for a
        # kernel without gradient, and never unpacks it: training after an evaluation would silently lose gradients.
        module.support_avx512bf16_for_cpu = False
    if adapter is not None:
        device = str(next(model.parameters()).device)  # else each process would fill the first GPU
        return load_adapter(model, adapter, is_trainable=True, device=device)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(model, target_modules),
        bias="none",
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    return get_peft_model(model, config, revision=revision)


def _targets(model, target_modules: str) -> str | list[str]:
    """What PEFT is to adapt: names with commas as a list; of all linear layers, those that text passes through.

    Left out, aloud: vision and audio towers, whose adapters would never be trained; and experts that are fused in one
    tensor, with the layers beside them that PEFT takes for experts: PEFT adapts such tensors without dropout only, and
    an adapter on them can't be folded.
    """
    if target_modules.lower() != "all-linear":
        return [part.strip() for part in target_modules.split(",") if part.strip()]
    decoder = model.get_decoder()
    of_text = {id(module) for module in decoder.modules()}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    linear = {name: m for name, m in linear.items() if m is not model.get_output_embeddings()}
    text = [name for name, module in linear.items() if id(module) in of_text]
    fused = any(p.ndim == 3 and re.search(r"experts\b", name) for name, p in decoder.named_parameters())
    own = {name for name in text if not _is_product(type(linear[name]))}
    kept = [name for name in text if name not in own and not (fused and name.rpartition(".")[2] in EXPERTS)]
    if len(text) < len(linear):
        others = len(linear) - len(text)
        say(f"adapter: on the {len(text)} linear layers of the text model; {others} of other towers have none")
    if fused:
        say(
            f"adapter: on {len(kept)} linear layers, none on the experts (fused in one tensor a layer)"
            + f" nor on {len(text) - len(kept)} layers beside them" * (len(kept) < len(text))
        )
    if own and not fused:
        say(f"adapter: none on {len(own)} layers of the model's own kind, such as {min(own)}")
    if not kept:
        raise ValueError(f"{model.config.model_type} has no linear layer that LoRA can be added to")
    return target_modules if kept == list(linear) and not fused else kept


@functools.cache
def _is_product(layer: type) -> bool:
    """Whether a class of linear layers gives W x + b and no more: PEFT can add nothing to Llama 4's router, which gives
    its scores, and its indices."""
    if not layer.__module__.startswith(("transformers.models.", "transformers_modules.")):
        return True  # torch's, transformers' Conv1D, bitsandbytes'
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            one, x = layer(4, 3), torch.randn(2, 4)
            return torch.allclose(one(x), torch.nn.functional.linear(x, one.weight, one.bias), atol=1e-4)
    except FAILURES:
        return False


def check_saved_adapter(folder: Path, model) -> None:
    """Read a saved adapter back: the same tensors as in `model`, none empty, all finite. `ValueError` otherwise.

    ZeRO-3 is known to save empty tensors in silence; there, what this rank holds is empty too, and not compared. Of
    what FSDP shares out, this is the first rank's part, the first rows.
    """
    with warnings.catch_warnings():  # of a model in parts, whose adapter was saved whole
        warnings.filterwarnings("ignore", message=".* have invalid shape")
        held = get_peft_model_state_dict(model)
    saved = load_file(folder / "adapter_model.safetensors")
    if not saved or saved.keys() != held.keys():
        raise ValueError(f"{folder}: the saved adapter has {len(saved)} tensors instead of {len(held)}")
    for name, tensor in saved.items():
        if tensor.numel() == 0 or not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} was saved {'empty' if tensor.numel() == 0 else 'with NaN or Inf'}")
        own = held[name].to_local() if isinstance(held[name], DTensor) else held[name]
        if own.numel() and not torch.equal(tensor[: len(own)], own.cpu().to(tensor.dtype)):
            raise ValueError(f"{folder}: {name} was saved with other values than the model has")
