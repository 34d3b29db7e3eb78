"""Tiny, sharp, random models of the decoder classes that transformers ships, and why the others are left out."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY, WINDOW = 160, 24
SIZES = {  # whatever of these a configuration has
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "dense_intermediate_size"), 128
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 16),
    **{"num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "shared_intermediate_size": 64},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "vocab_size_per_layer_input": VOCABULARY},
    **{"time_step_rank": 4, "mamba_dt_rank": 4, "intermediate_size_mlp": 128},
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention
SIZED = {"head_dim": 16, "num_key_value_heads": 2}

_PLAIN = (
    "afmoe apertus arcee aria_text biogpt bitnet bloom codegen cwm diffllama doge ernie4_5 ernie4_5_moe exaone4 "
    "exaone_moe falcon falcon_mamba flex_olmo gemma gemma2 glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox "
    "gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoeshared helium hyperclovax jais2 jetmoe lfm3 llama "
    "llama4_text mamba minimax minimax_m2 ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron_h "
    "olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2_moe qwen3 qwen3_5_text "
    "qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm"
)

# model_type: what its tiny configuration wants beside SIZES
DECODERS = {
    **dict.fromkeys(_PLAIN.split(), {}),
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 2},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "deepseek_v3": LATENT,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3_text": MIXED,
    "gemma3n_text": MIXED | {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "nemotron": SIZED,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, **MIXED},
}

_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
)
_HALVES = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper"
_MEDIA = (
    "emu3 fuyu git got_ocr2 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal "
    "gemma4_assistant gemma4_unified gemma4_unified_assistant gemma4_unified_text"
)
_TEXT_IS_HERE = "gemma3 gemma3n llama4 qwen3_5 qwen3_5_moe qwen3_5_moe_text"
_ALIKE = "gpt-sw3 internlm3 iquestcoder"
_LARGE = "blt cpmant ctrl inkling2_text inkling_text kimi_linear"
_ODD = "reformer xlnet hrm_text"
LEFT_OUT = {
    **dict.fromkeys(_ENCODERS.split(), "an encoder: its tokens see later ones; refused (tests/test_trainer.py)"),
    **dict.fromkeys(_HALVES.split(), "the decoder of an encoder-decoder, which no one translates with alone"),
    **dict.fromkeys(_MEDIA.split(), "for images or sound, or helps another model to decode"),
    **dict.fromkeys(_TEXT_IS_HERE.split(), "composite, or the same with experts: its text model is in the matrix"),
    **dict.fromkeys(_ALIKE.split(), "another name of a class that is in the matrix"),
    **dict.fromkeys(_LARGE.split(), "its configuration can't be made tiny"),
    **dict.fromkeys(
        _ODD.split(), "no autoregressive model of plain rows (hashed chunks, permutations, recurrent depth)"
    ),
}
OTHERS = "not tried: of a family that is in the matrix, or wants a configuration of its own; the self-check decides"


def tiny_config(kind: str, layers: int = 4):
    cls = CONFIG_MAPPING[kind]
    default = cls()
    settable = lambda key: not isinstance(getattr(cls, key, None), property)
    known = {k: v for k, v in SIZES.items() if settable(k) and getattr(default, k, None) is not None}
    ends = {key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    own = dict(DECODERS[kind])
    if layers != 4:  # of four kinds, again and again
        known["num_hidden_layers"] = layers
        own |= {"layer_types": own["layer_types"] * (layers // 4)} if "layer_types" in own else {}
    return cls(**known | ends | own)


def save_tiny(kind: str, folder, layers: int = 4):
    """A model whose logits have a standard deviation over 1, and no norm, bias or sink at its neutral value."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "A_log" in name or "dt_bias" in name:
                parameter.add_(0.1 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.3 * noise)
    model.save_pretrained(folder)
    return folder
