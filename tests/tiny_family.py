#!/usr/bin/env python3
"""Tiny seeded models of each family, in both file formats, of the same weights.

`write_directory` makes what `transformers` reads (config.json, model.safetensors, tokenizer.json),
`write_gguf` what llama.cpp's converter would make of it. All matrices are fp16 in both."""
import contextlib
import json
import math
import pathlib

import gguf
import numpy
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from tiny_model import byte_alphabet

WIDTH, HEADS, KV_HEADS, FFN = 96, 4, 2, 160
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
PAIRS = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("an", "d"), ("e", "r"), ("_", "t"),
         ("_", "a"), ("_t", "h"), ("_th", "e"), ("o", "n"), ("r", "e"), ("l", "l"), ("i", "s")]


def config(kind, **more):
    return {"architectures": [more.pop("name")], "model_type": kind, "hidden_size": WIDTH,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN,
            "num_hidden_layers": 3, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
            "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | more


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "head_dim": 32,
         "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 16,
         "num_hidden_layers": 7}
FAMILIES = {
    "llama": config("llama", name="LlamaForCausalLM"),
    "mistral": config("mistral", name="MistralForCausalLM", sliding_window=20, head_dim=24),
    "qwen2": config("qwen2", name="Qwen2ForCausalLM", use_sliding_window=False, rope_theta=1e6,
                    tie_word_embeddings=True),
    "qwen3": config("qwen3", name="Qwen3ForCausalLM", head_dim=32, use_sliding_window=False,
                    rope_theta=1e6),
    "phi3": config("phi3", name="Phi3ForCausalLM", sliding_window=20),
    "gemma2": config("gemma2", name="Gemma2ForCausalLM", attn_logit_softcapping=5.0,
                     final_logit_softcapping=3.0, **GEMMA),
    "gemma3": config("gemma3_text", name="Gemma3ForCausalLM", rope_theta=1e6,
                     rope_local_base_freq=10000.0, sliding_window_pattern=6,
                     attn_logit_softcapping=None, final_logit_softcapping=None, **GEMMA),
}
# SentencePiece: is there a space before a text? "first": where a prompt begins, alone.
PIECES = {"mistral": "first", "phi3": "always", "gemma2": "", "gemma3": ""}


@contextlib.contextmanager
def reshaped(family, **facts):
    """The family with other numbers, for a while."""
    kept = FAMILIES[family]
    FAMILIES[family] = kept | facts
    try:
        yield
    finally:
        FAMILIES[family] = kept


def head_width(family):
    return FAMILIES[family].get("head_dim", WIDTH // HEADS)


def vocabulary(family):
    """tokens, GGUF types, merges as pairs of texts"""
    if family in PIECES:
        space, special = "\u2581", ["<pad>", "<s>", "</s>", "<unk>"]
        tokens = special + [f"<0x{b:02X}>" for b in range(256)]
        types = [3, 3, 3, 2] + [6] * 256
        tokens += [space] + [chr(c) for c in range(33, 127)]
    else:
        alphabet = byte_alphabet()
        space, tokens = alphabet[32], ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
        types = [3, 3, 3]
    merges = [(a.replace("_", space), b.replace("_", space)) for a, b in PAIRS]
    made = [a + b for a, b in merges]
    tokens += made
    if family in PIECES:  # as converted from SentencePiece: each way to cut a token is a merge
        known = set(tokens)
        merges = [(t[:i], t[i:]) for t in made for i in range(1, len(t))
                  if t[:i] in known and t[i:] in known]
    return tokens, types + [1] * (len(tokens) - len(types)), merges


def bfloats(values):
    """bf16, to nearest, as uint16"""
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype("<u2")


def weights(family, bf16=False):
    """Seeded, by the names of `transformers`; fp16 (or bf16) matrices, fp32 vectors."""
    shape, random = FAMILIES[family], numpy.random.default_rng(sum(map(ord, family)))
    width, kv = head_width(family) * HEADS, head_width(family) * KV_HEADS
    made, gemma = {}, family.startswith("gemma")

    def matrix(name, rows, columns):
        values = random.standard_normal((rows, columns)) / columns ** 0.5
        made[name + ".weight"] = bfloats(values) if bf16 else values.astype(numpy.float16)

    def norm(name, size=WIDTH):
        made[name + ".weight"] = ((0 if gemma else 1) + 0.2 * random.standard_normal(size)).astype(
            numpy.float32)
    matrix("model.embed_tokens", len(vocabulary(family)[0]), WIDTH)
    for layer in range(shape["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        norm(block + "input_layernorm")
        if family == "phi3":
            matrix(block + "self_attn.qkv_proj", width + 2 * kv, WIDTH)
            matrix(block + "mlp.gate_up_proj", 2 * FFN, WIDTH)
        else:
            for part, rows in (("q", width), ("k", kv), ("v", kv)):
                matrix(f"{block}self_attn.{part}_proj", rows, WIDTH)
                if family == "qwen2":
                    made[f"{block}self_attn.{part}_proj.bias"] = random.standard_normal(
                        rows).astype(numpy.float32)
            matrix(block + "mlp.gate_proj", FFN, WIDTH)
            matrix(block + "mlp.up_proj", FFN, WIDTH)
        if family in ("qwen3", "gemma3"):
            norm(block + "self_attn.q_norm", head_width(family))
            norm(block + "self_attn.k_norm", head_width(family))
        matrix(block + "self_attn.o_proj", WIDTH, width)
        matrix(block + "mlp.down_proj", WIDTH, FFN)
        norm(block + "post_attention_layernorm")
        if gemma:
            norm(block + "pre_feedforward_layernorm")
            norm(block + "post_feedforward_layernorm")
    norm("model.norm")
    if not shape["tie_word_embeddings"]:
        matrix("lm_head", len(vocabulary(family)[0]), WIDTH)
    return made


# ---------------------------------------------------------------- a directory

def tokenizer(family):
    tokens, types, merges = vocabulary(family)
    ids = {t: i for i, t in enumerate(tokens)}
    if family in PIECES:
        made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True,
                                    byte_fallback=True))
        replace = normalizers.Replace(" ", "\u2581")
        if PIECES[family] == "first":
            made.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
        else:
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), replace]) if PIECES[family] else replace
    else:
        made = Tokenizer(models.BPE(ids, merges))
        made.normalizer = normalizers.NFC() if family != "llama" else None
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "llama")
        made.pre_tokenizer = level if family == "llama" else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN2), "isolated"), level])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False)
                             for t, kind in zip(tokens, types) if kind in (2, 3)])
    return made


def safetensors(tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        kind = {"float16": "F16", "float32": "F32", "uint16": "BF16"}[values.dtype.name]
        header[name] = {"dtype": kind, "shape": list(values.shape),
                        "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in tensors.values())


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# Each number that YaRN's authors leave open, said.
YARN_SAID = YARN | {"factor": 8.0, "beta_fast": 10.0, "beta_slow": 0.5, "attention_factor": 1.5}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 128,
        "short_factor": [round(1 + 0.02 * i, 2) for i in range(12)],
        "long_factor": [round(1.1 ** i, 4) for i in range(12)]}
YARN_GGUF = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def llama3_factors(width, base, scaling):
    """How `_compute_llama3_parameters` of transformers (modeling_rope_utils.py) changes frequencies:
    the quotient is what GGUF stores."""
    plain = 1.0 / base ** (numpy.arange(0, width, 2) / width)
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    length = 2 * numpy.pi / plain
    smooth = (context / length - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    changed = numpy.where(length > context / low, plain / factor, plain)
    middle = ~(length < context / high) & ~(length > context / low)
    return (plain / numpy.where(middle, between, changed)).astype(numpy.float32)


def write_directory(folder, family, bf16=False, scaling=None):
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    shape = FAMILIES[family] | {"vocab_size": len(vocabulary(family)[0])}
    shape |= {"rope_scaling": scaling} if scaling else {}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").write_bytes(safetensors(weights(family, bf16)))
    tokenizer(family).save(str(folder / "tokenizer.json"))
    return folder


# ---------------------------------------------------------------- GGUF

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
GEMMA_NAMES = {"post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name, family):
    stem, _, suffix = name.rpartition(".")
    if stem in GLOBAL:
        return f"{GLOBAL[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    names = NAMES | (GEMMA_NAMES if family.startswith("gemma") else {})
    return f"blk.{layer}.{names[part]}.{suffix}"


def gguf_values(name, values, family):
    """As llama.cpp's converter leaves them: llama's pairs side by side, Gemma's norms whole."""
    if family in ("llama", "mistral") and (".q_proj" in name or ".k_proj" in name):
        halves = values.reshape(-1, 2, head_width(family) // 2, values.shape[-1])
        return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    if family.startswith("gemma") and "norm" in name:
        return values + numpy.float32(1)
    return values


def write_gguf(path, family, bf16=False, scaling=None, pre=None):
    """pre: what GGUF calls the pre-tokenizer, if not the family's own."""
    shape, (tokens, types, merges) = FAMILIES[family], vocabulary(family)
    arch = "llama" if family == "mistral" else family
    out = gguf.GGUFWriter(str(path), arch)
    out.add_name(f"tiny-{family}")
    out.add_context_length(shape["max_position_embeddings"])
    out.add_embedding_length(WIDTH)
    out.add_block_count(shape["num_hidden_layers"])
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_freq_base(shape["rope_theta"])
    out.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    if "head_dim" in shape:
        out.add_key_length(shape["head_dim"])
        out.add_value_length(shape["head_dim"])
    if "sliding_window" in shape:
        out.add_sliding_window(shape["sliding_window"])
    if family == "gemma2":
        out.add_attn_logit_softcapping(shape["attn_logit_softcapping"])
        out.add_final_logit_softcapping(shape["final_logit_softcapping"])
    out.add_tokenizer_model("llama" if family in PIECES else "gpt2")
    out.add_tokenizer_pre(
        pre or {"llama": "gpt-2"}.get(family, "default" if family in PIECES else "qwen2"))
    out.add_token_list(tokens)
    out.add_token_types(types)
    if family in PIECES:
        rank = {token: i for i, token in enumerate(dict.fromkeys(a + b for a, b in merges))}
        out.add_token_scores([-float(rank.get(t, 10 ** 6)) for t in tokens])
        out.add_add_space_prefix(bool(PIECES[family]))
    else:
        out.add_token_merges([f"{a} {b}" for a, b in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(False)
    if scaling and scaling["rope_type"] == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(scaling["factor"])
    elif scaling and scaling["rope_type"] == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(scaling["factor"])
        out.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        for key, name in YARN_GGUF.items():
            if key in scaling:
                out.add_float32(f"{arch}.rope.scaling.{name}", scaling[key])
        if "attention_factor" in scaling:  # GGUF's stands beside what follows from the factor
            out.add_rope_scaling_attn_factors(
                scaling["attention_factor"] / (0.1 * math.log(scaling["factor"]) + 1))
    elif scaling and scaling["rope_type"] == "longrope":  # as llama.cpp converts Phi-3: no type
        original = scaling["original_max_position_embeddings"]
        out.add_rope_scaling_orig_ctx_len(original)
        factor = shape["max_position_embeddings"] / original
        out.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0)
        for kind in ("long", "short"):
            out.add_tensor(f"rope_factors_{kind}.weight", numpy.array(scaling[kind + "_factor"], "<f4"))
    elif scaling:
        out.add_tensor("rope_freqs.weight",
                       llama3_factors(head_width(family), shape["rope_theta"], scaling))
    for name, values in weights(family, bf16).items():
        values = gguf_values(name, values, family)
        if values.dtype == numpy.uint16:
            out.add_tensor(gguf_name(name, family), values.view(numpy.uint8),
                           raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            out.add_tensor(gguf_name(name, family), values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def tokens(family, count=48):
    random = numpy.random.default_rng(5)
    return [int(t) for t in random.integers(4, len(vocabulary(family)[0]), count)]
