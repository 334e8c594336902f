"""How small a tiny model is: one table for the names that configs share, and what single families need besides."""

from __future__ import annotations

from typing import Any

VOCABULARY = 97
LAYERS = 3

# families whose point is to have no biases keep their flags; every other has each bias that a flag offers
BIAS_FREE = ("llama", "mistral", "gemma", "qwen3", "olmo", "phi3")
BIASES = (
    "add_bias_linear",
    "attention_bias",
    "attention_out_bias",
    "bias",
    "conv_bias",
    "lm_head_bias",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "mlp_bias",
    "norm_bias",
    "projectors_bias",
    "qkv_bias",
    "use_bias",
    "use_conv_bias",
    "use_qkv_bias",
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_blocks", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_nextn_predict_layers"), 1),
    # width
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dff"), 40),
    **dict.fromkeys(("d_ff", "dim_ff", "d_inner", "ffn_hidden_size", "feed_forward_size", "mlp_dim"), 40),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), 40),
    **dict.fromkeys(("hidden_size_per_layer_input", "embedding_multiplier_dim"), 8),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("kv_channels", "query_pre_attn_scalar", "global_head_dim", "attention_head_dim"), 8),
    # latent attention and indexers
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    "index_n_heads": 4,
    "index_topk": 4,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts",), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size",), 16),
    # state spaces and linear attention
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 4),
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("model_max_length", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 4),
    **dict.fromkeys(("local_attention", "attention_chunk_size"), 4),
    # towers
    "image_size": 16,
    "patch_size": 8,
    # switches
    "is_decoder": True,
    "use_cache": False,
    "use_mamba_kernels": False,
    "use_sliding_window": True,
}

FAMILIES: dict[str, dict[str, Any]] = {}
