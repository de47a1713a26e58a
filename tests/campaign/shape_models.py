"""Configurations with the structure of published models, their sizes cut down: what is odd in each is kept.

`SHAPES`: name -> `Shape`, whose `raw` is what the model's own config.json says, in the words of that file
(`rope_scaling`, `rope_theta`, `n_embd`, `torch_dtype` ...), so that it is read as the published one is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

POSITIONS = 48  # tokens that most take; texts of the campaign are shorter
BERT = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")  # a tokenizer's first ids
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True)
class Shape:
    """`kind`: decoder, encoder or encoder-decoder; `raw`: of config.json, but for sizes that are drawn;
    `dtype` and `sharded`: how it is saved; `tokens`: the first of its tokenizer."""

    kind: str
    model_type: str
    architecture: str
    raw: dict[str, Any]
    dtype: str = "float32"
    sharded: bool = False
    tokens: tuple[str, ...] = BERT


SHAPES: dict[str, Shape] = {}


def _add(kind: str, name: str, model_type: str, architecture: str, raw: dict[str, Any], **more: Any) -> None:
    SHAPES[name] = Shape(kind, model_type, architecture, raw, **more)


def _decoder(
    name: str, model_type: str, architecture: str, *, save: dict[str, Any] | None = None, **raw: Any
) -> None:
    own = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS, "tie_word_embeddings": False,
    }  # fmt: skip
    own = {name: value for name, value in {**own, **raw}.items() if value is not None}
    whole = architecture if architecture.endswith("Model") else f"{architecture}ForCausalLM"
    _add("decoder", name, model_type, whole, own, **(save or {}))


_LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}  # fmt: skip
_BF16, _F16 = {"dtype": "bfloat16"}, {"dtype": "float16"}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
_GPT: dict[str, Any] = {
    "hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None, "num_key_value_heads": None,
    "max_position_embeddings": None, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": POSITIONS,
    "tie_word_embeddings": True,
}  # fmt: skip
_MULTI = {"num_key_value_heads": None}  # as many as there are queries
_STATE: dict[str, Any] = {
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "max_position_embeddings": None,
}

# Llama and those that are read as it is
_decoder("llama-2-7b", "llama", "Llama", num_key_value_heads=4, rope_theta=10000.0, save=_F16)
_decoder("llama-3.1-8b", "llama", "Llama", num_attention_heads=4, num_key_value_heads=1, rope_theta=500000.0,
         rope_scaling=_LLAMA3, save={**_BF16, "sharded": True})  # fmt: skip
_decoder("llama-3.2-1b", "llama", "Llama", head_dim=16, rope_theta=500000.0, rope_scaling=_LLAMA3,
         tie_word_embeddings=True, save=_BF16)  # fmt: skip
_decoder("smollm-135m", "llama", "Llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
         tie_word_embeddings=True, save=_BF16)  # fmt: skip
_decoder("llama-head-of-80", "llama", "Llama", hidden_size=40, num_attention_heads=2, num_key_value_heads=1)
_decoder("deepseek-llm-linear", "llama", "Llama", rope_scaling={"type": "linear", "factor": 4.0})
_decoder("yarn-llama", "llama", "Llama", rope_scaling={
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "finetuned": True})  # fmt: skip
_decoder("llama-dynamic", "llama", "Llama", rope_scaling={"type": "dynamic", "factor": 2.0})
_decoder("llama-biased", "llama", "Llama", attention_bias=True, mlp_bias=True)
_decoder("llama-window-unheeded", "llama", "Llama", sliding_window=5)
_decoder("mistral-7b-v0.1", "mistral", "Mistral", sliding_window=9, save=_BF16)
_decoder("mistral-nemo", "mistral", "Mistral", hidden_size=80, head_dim=32, num_attention_heads=2,
         num_key_value_heads=1)  # fmt: skip
_decoder("ministral-8b", "ministral", "Ministral", head_dim=16, sliding_window=9,
         layer_types=["sliding_attention", "full_attention"])  # fmt: skip
_decoder("ministral3", "ministral3", "Ministral3", head_dim=16, tie_word_embeddings=True)
_decoder("qwen1.5", "qwen2", "Qwen2", num_key_value_heads=4, use_sliding_window=False, sliding_window=9)
_decoder("qwen2.5-0.5b", "qwen2", "Qwen2", hidden_size=112, num_attention_heads=7, num_key_value_heads=1,
         tie_word_embeddings=True, rope_theta=1000000.0, max_window_layers=1, save=_BF16)  # fmt: skip
_decoder("qwen2-windowed", "qwen2", "Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)
_decoder("qwen2.5-yarn", "qwen2", "Qwen2", rope_scaling={
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12})  # fmt: skip
_decoder("qwen3-0.6b", "qwen3", "Qwen3", hidden_size=48, head_dim=32, tie_word_embeddings=True, save=_BF16)
_decoder("smollm3", "smollm3", "SmolLM3", no_rope_layers=[1, 0], tie_word_embeddings=True)
_decoder("olmo-1b", "olmo", "Olmo", num_key_value_heads=4, tie_word_embeddings=True)
_decoder("olmo-7b-clipped", "olmo", "Olmo", num_key_value_heads=4, clip_qkv=0.5)
_decoder("olmo2", "olmo2", "Olmo2", num_key_value_heads=4)
_decoder("olmo3", "olmo3", "Olmo3", num_key_value_heads=4, sliding_window=9,
         layer_types=["sliding_attention", "full_attention"])  # fmt: skip
_decoder("granite-3", "granite", "Granite", embedding_multiplier=12.0, residual_multiplier=0.22,
         attention_multiplier=0.0625, logits_scaling=8.0, tie_word_embeddings=True)  # fmt: skip
_decoder("arcee", "arcee", "Arcee")
_decoder("nemotron", "nemotron", "Nemotron", partial_rotary_factor=0.5, hidden_act="relu2")
_decoder("seed-oss", "seed_oss", "SeedOss", head_dim=32, attention_bias=True)
_decoder("helium", "helium", "Helium", head_dim=16)
_decoder("ernie-4.5", "ernie4_5", "Ernie4_5", head_dim=32, use_bias=False, tie_word_embeddings=True)
_decoder("hunyuan", "hunyuan_v1_dense", "HunYuanDenseV1", head_dim=16, tie_word_embeddings=True)
_decoder("exaone4", "exaone4", "Exaone4", sliding_window=9,
         layer_types=["sliding_attention", "full_attention"])  # fmt: skip
_decoder("glm4", "glm4", "Glm4", head_dim=16, partial_rotary_factor=0.5, attention_bias=True)
_decoder("glm", "glm", "Glm", head_dim=32, partial_rotary_factor=0.5, attention_bias=True)
_decoder("stablelm-2", "stablelm", "StableLm", partial_rotary_factor=0.25, use_qkv_bias=True)
_decoder("starcoder2", "starcoder2", "Starcoder2", sliding_window=9, use_bias=True, tie_word_embeddings=True)
_decoder("command-r", "cohere", "Cohere", logit_scale=0.0625, tie_word_embeddings=True)
_decoder("command-r-plus", "cohere", "Cohere", logit_scale=0.83, use_qk_norm=True, tie_word_embeddings=True)
_decoder("command-r7b", "cohere2", "Cohere2", logit_scale=0.25, sliding_window=9, sliding_window_pattern=2,
         tie_word_embeddings=True, head_dim=16)  # fmt: skip
# Gemma
_decoder("gemma-2b", "gemma", "Gemma", num_key_value_heads=1, head_dim=32, hidden_act="gelu",
         tie_word_embeddings=True, save=_BF16)  # fmt: skip
_decoder("gemma-2", "gemma2", "Gemma2", head_dim=32, query_pre_attn_scalar=24, attn_logit_softcapping=50.0,
         final_logit_softcapping=3.0, sliding_window=9, tie_word_embeddings=True)  # fmt: skip
_decoder("gemma-3-1b", "gemma3_text", "Gemma3", hidden_size=72, num_key_value_heads=1, head_dim=32,
         query_pre_attn_scalar=32, sliding_window=9, sliding_window_pattern=2, rope_local_base_freq=10000.0,
         rope_theta=1000000.0, tie_word_embeddings=True, save=_BF16)  # fmt: skip
# Phi
_decoder("phi-2", "phi", "Phi", num_key_value_heads=4, partial_rotary_factor=0.4, hidden_act="gelu_new",
         hidden_size=128, save=_F16)  # fmt: skip
_decoder(
    "phi-1.5-narrow", "phi", "Phi", num_key_value_heads=None, partial_rotary_factor=0.5, qk_layernorm=True
)
_decoder("phi-3-mini-4k", "phi3", "Phi3", num_key_value_heads=4, sliding_window=9, save=_BF16)
_decoder("phi-3-mini-128k", "phi3", "Phi3", num_key_value_heads=4, original_max_position_embeddings=16,
         rope_scaling=_LONG)  # fmt: skip
_decoder("phi-4-mini", "phi3", "Phi3", hidden_size=64, partial_rotary_factor=0.75, tie_word_embeddings=True,
         original_max_position_embeddings=16,
         rope_scaling={**_LONG, "short_factor": [1.0] * 6,
                       "long_factor": [2.0 + i for i in range(6)]})  # fmt: skip
_decoder("phi-4", "phi3", "Phi3", num_key_value_heads=1, partial_rotary_factor=1.0, rope_theta=250000)
# GPT and others of its time
_decoder("gpt2", "gpt2", "GPT2LMHeadModel", **_GPT)
_decoder("cerebras-gpt", "gpt2", "GPT2LMHeadModel", **{**_GPT, "activation_function": "gelu", "n_inner": 77})
_decoder("gpt2-by-layer", "gpt2", "GPT2LMHeadModel", **_GPT, scale_attn_by_inverse_layer_idx=True)
_decoder("starcoder-1", "gpt_bigcode", "GPTBigCode", **_GPT, multi_query=True)
_decoder("gpt-neo-125m", "gpt_neo", "GPTNeo", num_attention_heads=None, num_key_value_heads=None,
         num_hidden_layers=None, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
         window_size=9, tie_word_embeddings=True)  # fmt: skip
_decoder("gpt-j-6b", "gptj", "GPTJ", **{**_GPT, "rotary_dim": 8, "tie_word_embeddings": False})
_decoder("codegen", "codegen", "CodeGen", **{
    **_GPT, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "tie_word_embeddings": False})  # fmt: skip
_decoder("pythia-160m", "gpt_neox", "GPTNeoX", **_MULTI, rotary_pct=0.25, rotary_emb_base=10000, save=_F16)
_decoder("redpajama-incite", "gpt_neox", "GPTNeoX", **_MULTI, rotary_pct=1.0, use_parallel_residual=False)
_decoder(
    "opt-125m",
    "opt",
    "OPT",
    **_MULTI,
    ffn_dim=93,
    word_embed_proj_dim=64,
    tie_word_embeddings=True,
    save=_F16,
)
_decoder("opt-350m", "opt", "OPT", **_MULTI, ffn_dim=93, word_embed_proj_dim=32, do_layer_norm_before=False,
         tie_word_embeddings=True)  # fmt: skip
_decoder("galactica", "opt", "OPT", **_MULTI, ffn_dim=96, word_embed_proj_dim=64, enable_bias=False,
         layer_norm_elementwise_affine=False, activation_function="gelu",
         tie_word_embeddings=True)  # fmt: skip
_decoder("bloom-560m", "bloom", "Bloom", hidden_size=48, n_layer=2, n_head=3, num_hidden_layers=None,
         num_attention_heads=None, num_key_value_heads=None, max_position_embeddings=None,
         tie_word_embeddings=True)  # fmt: skip
_decoder("mpt-7b", "mpt", "Mpt", hidden_size=None, num_hidden_layers=None, num_attention_heads=None,
         num_key_value_heads=None, max_position_embeddings=None, d_model=64, n_layers=2, n_heads=4,
         max_seq_len=POSITIONS, expansion_ratio=2, no_bias=True, tie_word_embeddings=True)  # fmt: skip
_decoder("falcon-7b", "falcon", "Falcon", **_MULTI, multi_query=True, parallel_attn=True, bias=False,
         new_decoder_architecture=False, alibi=False, tie_word_embeddings=True)  # fmt: skip
_decoder("falcon-40b", "falcon", "Falcon", num_key_value_heads=None, num_kv_heads=2, parallel_attn=True,
         new_decoder_architecture=True, bias=False, alibi=False)  # fmt: skip
_decoder("falcon-rw-1b", "falcon", "Falcon", **_MULTI, multi_query=False, parallel_attn=False, bias=True,
         alibi=True, new_decoder_architecture=False, tie_word_embeddings=True)  # fmt: skip
_decoder("xglm", "xglm", "XGLM", hidden_size=None, num_hidden_layers=None, num_attention_heads=None,
         num_key_value_heads=None, d_model=64, ffn_dim=93, num_layers=2, attention_heads=4,
         tie_word_embeddings=True)  # fmt: skip
_decoder("biogpt", "biogpt", "BioGpt", **_MULTI, tie_word_embeddings=True)
_decoder("bitnet", "bitnet", "BitNet", tie_word_embeddings=True)
# experts
_MOE = {"num_experts_per_tok": 2}
_decoder(
    "mixtral-8x7b",
    "mixtral",
    "Mixtral",
    **_MOE,
    num_local_experts=4,
    sliding_window=None,
    save={"sharded": True},
)
_decoder("qwen2-moe", "qwen2_moe", "Qwen2Moe", **_MOE, num_experts=4, moe_intermediate_size=40,
         shared_expert_intermediate_size=56, norm_topk_prob=False)  # fmt: skip
_decoder("qwen3-30b-a3b", "qwen3_moe", "Qwen3Moe", **_MOE, head_dim=32, num_experts=4,
         moe_intermediate_size=40, norm_topk_prob=True, save=_BF16)  # fmt: skip
_decoder("granite-moe", "granitemoe", "GraniteMoe", **_MOE, num_local_experts=4, embedding_multiplier=12.0,
         residual_multiplier=0.22, attention_multiplier=0.0625, logits_scaling=6.0)  # fmt: skip
_decoder("olmoe", "olmoe", "Olmoe", **_MOE, num_experts=4, num_key_value_heads=4)
_decoder("gpt-oss-20b", "gpt_oss", "GptOss", **_MOE, head_dim=32, num_local_experts=4, sliding_window=9,
         layer_types=["sliding_attention", "full_attention"])  # fmt: skip
_decoder("deepseek-v3", "deepseek_v3", "DeepseekV3", **_MOE, num_key_value_heads=4, n_routed_experts=4,
         n_shared_experts=1, n_group=2, topk_group=1, moe_intermediate_size=40, first_k_dense_replace=1,
         q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)  # fmt: skip
_decoder(
    "phi-3.5-moe", "phimoe", "Phimoe", **_MOE, num_local_experts=4, attention_bias=True, lm_head_bias=True
)
# states
_decoder("mamba-130m", "mamba", "Mamba", **_STATE, state_size=8, tie_word_embeddings=True)
_decoder("mamba2", "mamba2", "Mamba2", **{**_STATE, "state_size": 8, "num_heads": 8, "head_dim": 16,
         "n_groups": 1, "chunk_size": 16})  # fmt: skip
_decoder("falcon-mamba", "falcon_mamba", "FalconMamba", **_STATE, state_size=8)
_decoder("jamba", "jamba", "Jamba", **_MOE, num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2,
         expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4,
         use_mamba_kernels=False)  # fmt: skip
_decoder("lfm2", "lfm2", "Lfm2", layer_types=["conv", "full_attention"], tie_word_embeddings=True)
_decoder("recurrent-gemma", "recurrent_gemma", "RecurrentGemma", num_hidden_layers=3, num_key_value_heads=1,
         lru_width=64, attention_window_size=32, tie_word_embeddings=True)  # fmt: skip
_decoder("rwkv-4", "rwkv", "Rwkv", **_STATE, context_length=POSITIONS, attention_hidden_size=64)


def _encoder(
    name: str, model_type: str, architecture: str, *, save: dict[str, Any] | None = None, **raw: Any
) -> None:
    own = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    own = {name: value for name, value in {**own, **raw}.items() if value is not None}
    _add("encoder", name, model_type, architecture, own, **(save or {}))


_ROBERTA = {"tokens": ROBERTA}
_encoder("bert-base", "bert", "BertForMaskedLM", hidden_act="gelu")
_encoder("minilm", "bert", "BertModel", save=_F16)
_encoder("bert-sst2", "bert", "BertForSequenceClassification")
_encoder("roberta-base", "roberta", "RobertaForMaskedLM", type_vocab_size=1, save=_ROBERTA)
_encoder(
    "e5-multilingual", "xlm-roberta", "XLMRobertaModel", type_vocab_size=1, save={**_ROBERTA, "sharded": True}
)
_encoder("camembert", "camembert", "CamembertForMaskedLM", type_vocab_size=1, save=_ROBERTA)
_DISTIL = {
    "hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None, "dim": 48, "hidden_dim": 93,
    "n_layers": 2, "n_heads": 3,
}  # fmt: skip
_encoder("distilbert", "distilbert", "DistilBertForMaskedLM", **_DISTIL)
_encoder("distilbert-sinusoidal", "distilbert", "DistilBertModel", **_DISTIL, sinusoidal_pos_embds=True)
_encoder("electra-small", "electra", "ElectraForMaskedLM", embedding_size=24)
_encoder("electra-discriminator", "electra", "ElectraModel", embedding_size=24)
_DEBERTA = {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "position_biased_input": False, "type_vocab_size": 0,
    "max_relative_positions": -1,
}  # fmt: skip
_encoder("deberta-v3", "deberta-v2", "DebertaV2ForMaskedLM", **_DEBERTA)
_encoder("deberta-v3-embeds", "deberta-v2", "DebertaV2Model", **_DEBERTA)
_encoder("modernbert", "modernbert", "ModernBertForMaskedLM", local_attention=8, global_attn_every_n_layers=2,
         num_attention_heads=3, cls_token_id=1, sep_token_id=2)  # fmt: skip
_encoder("albert", "albert", "AlbertForMaskedLM", embedding_size=24)
_encoder("mpnet", "mpnet", "MPNetForMaskedLM", save=_ROBERTA)
_encoder("all-mpnet", "mpnet", "MPNetModel", save=_ROBERTA)
_encoder("nomic-bert", "nomic_bert", "NomicBertModel")
_encoder("esm2", "esm", "EsmForMaskedLM", position_embedding_type="rotary", token_dropout=True,
         mask_token_id=4, emb_layer_norm_before=False, save=_ROBERTA)  # fmt: skip
_encoder("eurobert", "eurobert", "EuroBertForMaskedLM", num_key_value_heads=3)
_encoder("roformer", "roformer", "RoFormerForMaskedLM", embedding_size=48)
_encoder("megatron-bert", "megatron-bert", "MegatronBertForMaskedLM")


def _seq2seq(
    name: str, model_type: str, architecture: str, *, save: dict[str, Any] | None = None, **raw: Any
) -> None:
    _add("encoder-decoder", name, model_type, f"{architecture}ForConditionalGeneration", raw, **(save or {}))


_T5 = {"d_model": 48, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
       "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
       "decoder_start_token_id": 0}  # fmt: skip
_seq2seq("t5-small", "t5", "T5", **_T5, feed_forward_proj="relu", tie_word_embeddings=True)
_seq2seq("flan-t5", "t5", "T5", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, save=_BF16)
_seq2seq("mt5-small", "mt5", "MT5", **{**_T5, "num_decoder_layers": 1}, feed_forward_proj="gated-gelu",
         tie_word_embeddings=False)  # fmt: skip
_seq2seq("umt5", "umt5", "UMT5", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
_seq2seq("switch", "switch_transformers", "SwitchTransformers", **_T5, num_experts=2, expert_capacity=64,
         num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, tie_word_embeddings=True)  # fmt: skip
_BART = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 3,
         "decoder_attention_heads": 3, "max_position_embeddings": POSITIONS, "decoder_start_token_id": 2,
         "forced_eos_token_id": 2}  # fmt: skip
_seq2seq("bart-base", "bart", "Bart", **_BART, save=_ROBERTA)
_seq2seq("distilbart-cnn", "bart", "Bart", **_BART, scale_embedding=True, save={**_ROBERTA, **_F16})
_seq2seq(
    "mbart-50",
    "mbart",
    "MBart",
    **{**_BART, "scale_embedding": True, "forced_bos_token_id": 9},
    save=_ROBERTA,
)
_seq2seq("pegasus", "pegasus", "Pegasus", **{**_BART, "decoder_start_token_id": 0, "scale_embedding": True})
_seq2seq("nllb", "m2m_100", "M2M100", **{**_BART, "scale_embedding": True}, save=_ROBERTA)
_seq2seq("blenderbot", "blenderbot", "Blenderbot", **{**_BART, "decoder_start_token_id": 1})
SHAPES["opus-mt"] = Shape("encoder-decoder", "marian", "MarianMTModel", {
    **_BART, "scale_embedding": True, "decoder_start_token_id": 0, "static_position_embeddings": True,
    "share_encoder_decoder_embeddings": True, "activation_function": "swish"})  # fmt: skip
