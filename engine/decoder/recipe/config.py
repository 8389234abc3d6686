"""The shape of the bundled model, under the field names of the published configuration."""

CONTEXT, TRAINED_CONTEXT = 32768, 1024  # with YaRN, and before it

PLAIN = dict(rope_type="default", rope_theta=10000.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=CONTEXT / TRAINED_CONTEXT,
            original_max_position_embeddings=TRAINED_CONTEXT, beta_fast=32, beta_slow=1,
            attention_factor=1.0)  # V4 does not scale cosines; nested parameters that leave it out mean YaRN's own scale

# Per layer: the window alone, sparse attention over rows of 4 tokens (CSA), attention over all rows of 128 (HCA).
# The entry behind the layers is that of the draft block.
RATIOS = [0, 4, 128, 4, 128, 4]
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
HASH_LAYERS = 1

CONFIG = dict(
    architectures=["DeepseekV4ForCausalLM"], model_type="deepseek_v4", dtype="bfloat16",
    vocab_size=4096, hidden_size=256, num_hidden_layers=len(RATIOS),
    num_attention_heads=4, num_key_value_heads=1, head_dim=80, qk_rope_head_dim=16, partial_rotary_factor=0.2,
    q_lora_rank=128, o_groups=2, o_lora_rank=128, sliding_window=128,
    compress_ratios=RATIOS + [0], layer_types=[KINDS[ratio] for ratio in RATIOS],
    compress_rates={kind: ratio for ratio, kind in KINDS.items() if ratio},
    index_n_heads=4, index_head_dim=32, index_topk=128,
    hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=80,
    num_hash_layers=HASH_LAYERS, mlp_layer_types=["hash_moe"] * HASH_LAYERS + ["moe"] * (len(RATIOS) - HASH_LAYERS),
    routed_scaling_factor=2.0, norm_topk_prob=True, scoring_func="sqrtsoftplus", topk_method="noaux_tc", swiglu_limit=10.0,
    hidden_act="silu", rms_norm_eps=1e-6, initializer_range=0.02, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
    max_position_embeddings=CONTEXT, rope_theta=PLAIN["rope_theta"], compress_rope_theta=YARN["rope_theta"],
    rope_parameters=dict(main=PLAIN, compress=YARN), num_nextn_predict_layers=1,
    tie_word_embeddings=False, use_cache=True, bos_token_id=0, eos_token_id=1, pad_token_id=None)
