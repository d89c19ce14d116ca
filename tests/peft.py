"""LoRA adapters as `peft` writes them, seeded; and what they make of a model's weights, in float64."""
import json

import numpy

import tiny_family

MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn",
           "o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}

# config.json of SmolLM2-135M
SMOLLM = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9,
          "num_key_value_heads": 3, "intermediate_size": 1536, "num_hidden_layers": 30,
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
          "hidden_act": "silu", "tie_word_embeddings": True}


def shapes(config):
    """module → (rows, columns) of its W"""
    width, ffn = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {"q_proj": (query, width), "k_proj": (kv, width), "v_proj": (kv, width),
            "o_proj": (width, query), "gate_proj": (ffn, width), "up_proj": (ffn, width),
            "down_proj": (width, ffn)}


def tensors(config, rank, modules=tuple(MODULES), seed=1, layers=None, dtype=numpy.float16,
            size=1.0):
    """Names as in adapter_model.safetensors."""
    random, made = numpy.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]) if layers is None else layers:
        for module in modules:
            rows, columns = shapes(config)[module]
            stem = f"base_model.model.model.layers.{layer}.{MODULES[module]}.{module}.lora_"
            made[stem + "A.weight"] = (random.standard_normal((rank, columns)) /
                                       columns ** 0.5).astype(dtype)
            made[stem + "B.weight"] = (random.standard_normal((rows, rank)) * size /
                                       rank ** 0.5).astype(dtype)
    return made


def adapter_config(rank, alpha, modules=tuple(MODULES), **more):
    """The keys that peft 0.18 writes, at their defaults."""
    return {"alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
            "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none",
            "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
            "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
            "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
            "layers_to_transform": None, "loftq_config": {}, "lora_alpha": alpha,
            "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
            "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
            "peft_version": "0.18.0", "qalora_group_size": 16, "r": rank, "rank_pattern": {},
            "revision": None, "target_modules": list(modules), "target_parameters": None,
            "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
            "use_qalora": False, "use_rslora": False} | more


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(tiny_family.safetensors(weights))
    return folder


def turned(values, head_width, rope_width=None):
    """Rows of Q or K as a model has them whose RoPE pairs lie side by side."""
    half = (rope_width or head_width) // 2
    order = [row for i in range(half) for row in (i, i + half)]
    order += range(2 * half, head_width)
    return values.reshape(-1, head_width, values.shape[-1])[:, order].reshape(values.shape)


def adapted(decoder, weights, scale, config):
    """The float64 reference of W + scale * B A; changes `decoder`."""
    plain, deltas = decoder.weight, {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name, a in weights.items():
        if not name.endswith("lora_A.weight"):
            continue
        layer, module = name.split(".")[4], name.split(".")[6]
        b = weights[name.replace("lora_A", "lora_B")]
        delta = scale * (b.astype(numpy.float64) @ a.astype(numpy.float64))
        if decoder.adjacent and module in ("q_proj", "k_proj"):
            delta = turned(delta, size)
        part = tiny_family.NAMES[f"{MODULES[module]}.{module}"]
        deltas[f"blk.{layer}.{part}.weight"] = delta

    def weight(name, rows=slice(None)):
        return plain(name, rows) + deltas[name][rows] if name in deltas else plain(name, rows)
    decoder.weight = weight
    return decoder
