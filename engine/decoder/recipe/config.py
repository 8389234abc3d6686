"""The shape of the bundled model, under the field names of the published configuration."""

CONTEXT, TRAINED_CONTEXT = 16384, 1024  # with YaRN, and before it

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=CONTEXT / TRAINED_CONTEXT,
            original_max_position_embeddings=TRAINED_CONTEXT, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
PLAIN = dict(rope_type="default", rope_theta=YARN["rope_theta"])

LAYERS, DENSE_LAYERS = 6, 1

CONFIG = dict(
    architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", dtype="bfloat16",
    vocab_size=4096, hidden_size=256, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=64,
    qk_nope_head_dim=48, qk_rope_head_dim=16, qk_head_dim=64, head_dim=16, v_head_dim=64,
    index_n_heads=4, index_head_dim=32, index_topk=256, layer_types=["indexed_attention"] * LAYERS,
    first_k_dense_replace=DENSE_LAYERS, intermediate_size=768,
    mlp_layer_types=["dense"] * DENSE_LAYERS + ["sparse"] * (LAYERS - DENSE_LAYERS),
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=80,
    n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.0, scoring_func="sigmoid", topk_method="noaux_tc",
    hidden_act="silu", rms_norm_eps=1e-6, initializer_range=0.02, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
    max_position_embeddings=CONTEXT, rope_parameters=YARN, tie_word_embeddings=False, use_cache=True,
    bos_token_id=0, eos_token_id=1, pad_token_id=None)
