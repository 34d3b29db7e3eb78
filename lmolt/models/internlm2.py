"""InternLM2 (ChemLLM) as the Llama that it is: its layers, but query, key and value weights fused in one tensor.

The code that comes with its checkpoints is for transformers 4 and fails under 5; only its tokenizer's is run here.
"""

import json
import re

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lmolt.merging.checkpoints import find_folder
from lmolt.models.attention import TREE

NAMES = {  # InternLM2's: Llama's
    r"model\.tok_embeddings\.": "model.embed_tokens.",
    r"output\.": "lm_head.",
    r"(.*)\.attention_norm\.": r"\1.input_layernorm.",
    r"(.*)\.ffn_norm\.": r"\1.post_attention_layernorm.",
    r"(.*)\.attention\.wo\.": r"\1.self_attn.o_proj.",
    r"(.*)\.feed_forward\.w1\.": r"\1.mlp.gate_proj.",
    r"(.*)\.feed_forward\.w3\.": r"\1.mlp.up_proj.",
    r"(.*)\.feed_forward\.w2\.": r"\1.mlp.down_proj.",
}


def load_internlm2(name: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The checkpoint `name` (folder or Hub id) as a Llama; `ValueError` if it isn't an InternLM2 in safetensors.

    Dynamic rotary scaling, which begins beyond `max_position_embeddings`, is left out: translation ends there.
    """
    folder = find_folder(name)
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not str(theirs.get("model_type")).startswith("internlm"):
        raise ValueError(f"{name} is a {theirs.get('model_type')!r}, not an InternLM2")
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    shared += ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    config = LlamaConfig(
        **{key: theirs[key] for key in shared if key in theirs},
        num_key_value_heads=theirs.get("num_key_value_heads", theirs["num_attention_heads"]),
        rope_parameters={"rope_type": "default", "rope_theta": theirs.get("rope_theta", 10000)},
        attention_bias=theirs.get("bias", False),
    )
    groups = config.num_attention_heads // config.num_key_value_heads
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            tensor = tensor.to(dtype)
            if ".attention.wqkv." not in key:
                weights[_renamed(key)] = tensor
                continue
            # (key-value heads, their queries + key + value, head size, ...)
            fused = tensor.view(config.num_key_value_heads, groups + 2, config.head_dim, *tensor.shape[1:])
            for part, piece in {"q": fused[:, :groups], "k": fused[:, -2], "v": fused[:, -1]}.items():
                ours = key.replace(".attention.wqkv.", f".self_attn.{part}_proj.")
                weights[ours] = piece.reshape(-1, *tensor.shape[1:])
    model, report = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation=TREE, output_loading_info=True
    )
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ValueError(
            f"{name}: {len(wrong)} weights are not as InternLM2 has them, such as {sorted(map(str, wrong))[0]}"
        )
    return model.eval()


def _renamed(key: str) -> str:
    for pattern, ours in NAMES.items():
        if match := re.match(pattern, key):
            return match.expand(ours) + key[match.end() :]
    return key
