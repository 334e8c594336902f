"""How small a tiny model is: one table for the names that configs share, and what single families need besides."""

from __future__ import annotations

from typing import Any

VOCABULARY = 97
LAYERS = 3

# families whose point is to have no biases keep their flags; every other has each bias that a flag offers
BIAS_FREE = ("llama", "mistral", "gemma", "qwen3", "olmo", "phi3")
_BIASES = """
add_bias_linear attention_bias attention_out_bias bias conv_bias lm_head_bias mamba_conv_bias mamba_proj_bias
mlp_bias norm_bias projectors_bias qkv_bias use_bias use_conv_bias use_qkv_bias
"""
BIASES = _BIASES.split()


def _table(text: str) -> dict[str, Any]:
    """Read lines of a size and the names that have it."""
    rows = (line.split() for line in text.strip().splitlines() if not line.startswith("#"))
    return {name: int(size) for size, *names in rows for name in names}


SIZES = _table(f"""
# vocabulary
{VOCABULARY} vocab_size vocab_size_per_layer_input decoder_vocab_size entity_vocab_size
{VOCABULARY} src_vocab_size tgt_vocab_size
# depth
{LAYERS} num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers num_blocks depth
1 encoder_layers num_encoder_layers num_nextn_predict_layers
# width
32 hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size
32 output_embedding_size embedding_rank
40 intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff d_ff dim_ff d_inner ffn_hidden_size
40 feed_forward_size mlp_dim dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size
8 hidden_size_per_layer_input
# heads
4 num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
4 swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads
2 num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads
8 head_dim swa_head_dim dim_head d_head d_kv attention_head_size kv_channels query_pre_attn_scalar global_head_dim
8 attention_head_dim
# latent attention and indexers
16 q_lora_rank kv_lora_rank o_lora_rank
8 qk_nope_head_dim v_head_dim index_head_dim qk_rope_head_dim
4 rotary_dim index_n_heads index_topk
# experts
4 num_experts n_routed_experts num_local_experts moe_num_experts
2 num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts zero_expert_num
1 n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group
1 first_k_dense_replace num_dense_layers
16 moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
16 shared_experts_intermediate_size expert_ffn_hidden_size
# state spaces and linear attention
8 mamba_d_state state_size ssm_state_size linear_head_dim linear_key_head_dim linear_value_head_dim
4 mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads linear_num_value_heads mamba_dt_rank time_step_rank
4 mamba_chunk_size chunk_size block_size
2 linear_num_key_heads mamba_n_groups mamba_ngroups n_groups
64 mamba_d_ssm
16 mamba_d_head mamba_head_dim mamba_headdim
# positions
64 max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions
64 max_source_positions
4 sliding_window_size attention_window_size window_size local_attention attention_chunk_size
# towers
16 image_size
8 patch_size
32 output_channels ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels adapter_in_dim
32 adapter_out_dim adapter_input_size out_hidden_size projector_input_dim projector_output_dim backbone_hidden_size
32 audio_hidden_size
1 num_codebooks
""") | {"use_cache": False, "use_mamba_kernels": False}

# what decides which kinds of layers there are, and so is set before the kinds are asked for
KINDS: dict[str, Any] = {
    "max_window_layers": 1,
    "mlp_only_layers": [0],
    "sliding_window": 4,
    "use_sliding_window": True,
}

# latent attention makes a key for every head
LATENT: dict[str, Any] = {"num_key_value_heads": 4}

_FULL_LAST = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_FULL_AROUND = ["full_attention", "sliding_attention", "full_attention"]
_DENSE_FIRST = ["dense", "sparse", "sparse"]
_CONV_AROUND = ["conv", "full_attention", "conv"]
_SHARED_LAST: dict[str, Any] = {"layer_types": _FULL_LAST, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
_GEMMA4 = _SHARED_LAST | {"global_head_dim": 16}
_QWEN4 = _table("""
8 hc_lowrank indexer_head_dim
4 indexer_n_heads indexer_budget make_ngram_vocab_size_divisible_by
2 indexer_compress_ratio
1 indexer_kv_heads split_ngram_parts
16 ple_embed_dim
100 ngram_vocab_size_base
""")
_DOTS3 = _table("""
4 swa_num_attention_heads swa_num_key_value_heads
16 swa_q_lora_rank swa_kv_lora_rank swa_head_dim
8 swa_qk_nope_head_dim swa_v_head_dim
""")
_BLT = {"hidden_size_global": 32}

# what a family needs besides the tables
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "local_attention_window_len": 4},
    "blt_local_encoder": _BLT,
    "blt_local_decoder": _BLT,
    "cohere2_moe": {"mlp_layer_types": _DENSE_FIRST},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "cpmant": {"prompt_length": 2},
    "distilbert": _table("32 dim\n40 hidden_dim"),
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}, "rope_parameters": {"rope_theta": 10000.0}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
        "head_dim": 16,
        "hc_mult": 2,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
    },
    "dots3_note_vision_encoder": {"mlp_bias": False},
    "dots3_note_text": _DOTS3,
    "esm": {"pad_token_id": 1, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": _SHARED_LAST | {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "laurel_rank": 8},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3},
    "granite_speech_encoder": {"hidden_dim": 32},
    "granite_speech_plus_encoder": {"hidden_dim": 32},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "inkling_text": {"mlp_layer_types": _DENSE_FIRST},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "laguna": {"layer_types": _FULL_AROUND, "num_attention_heads_per_layer": [4, 8, 4]},
    "lfm2": {"layer_types": _CONV_AROUND},
    "lfm2_moe": {"layer_types": _CONV_AROUND},
    "layoutlmv3": _table("4 coordinate_size\n8 shape_size"),
    "led": {"attention_window": 4},
    "lilt": {"hidden_size": 48},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1]},
    "longformer": {"attention_window": 4},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": _FULL_AROUND},
    "minimax_m3_vl_text": {
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": _DENSE_FIRST,
    },
    "ministral": {"layer_types": _FULL_AROUND},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "perceiver": _table("8 num_latents\n32 d_latents\n2 num_self_attends_per_block"),
    "neomme": {"head_dim": 16},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "hash_seed": 0},
    "roc_bert": _table("8 pronunciation_embed_dim shape_embed_dim")
    | _table("97 pronunciation_vocab_size shape_vocab_size"),
    "qwen4_exp_text": _QWEN4,
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "num_experts_per_tok": 1, "router_hidden_size": 16},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
}

# what makes the causal language model of a family of encoders one
CAUSAL: dict[str, dict[str, Any]] = {"xlm": {"causal": True}, "xlnet": {"attn_type": "uni"}}

# families whose causal language model takes a part of the config
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}

# modules that stay in float32: a router that casts its input and never its weights; and all of families whose masks
# cannot be made in float64, so that only their linear path is in float64
SINGLE = {"fsmt": ("",), "inkling2_text": ("mlp.gate",), "xglm": ("",)}

_DRAFTS = (
    "it has no map of its own from tokens, since it reads the hidden states, keys and values of the model that it "
    "drafts for"
)
REFUSED = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}
