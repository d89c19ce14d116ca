#!/usr/bin/env python3
"""A seeded llama of the 1B class, for speed alone: the shapes of Llama 3.2 1B, random Q4_1 weights.
`seeded.py OUT.gguf`"""
import pathlib
import sys

import gguf
import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tiny_model  # noqa: E402

WIDTH, HEADS, KV_HEADS, HEAD, FFN, LAYERS, VOCABULARY = 2048, 32, 8, 64, 8192, 16, 128256
Q4_1 = gguf.GGMLQuantizationType.Q4_1
BLOCK = numpy.dtype([("d", "<f2"), ("m", "<f2"), ("quants", "u1", 16)])


def write(path: str) -> None:
    random = numpy.random.default_rng(11)
    out = gguf.GGUFWriter(path, "llama")
    tokens, types, merges = tiny_model.vocabulary()
    more = VOCABULARY - len(tokens)
    out.add_name("seeded-1b")
    out.add_context_length(8192)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_dimension_count(HEAD)
    out.add_rope_freq_base(500000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens + [f"zz{i}" for i in range(more)])
    out.add_token_types(types + [1] * more)
    out.add_token_merges(merges)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(tiny_model.TEMPLATE)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = numpy.empty((rows, columns // 32), BLOCK)
        scale = columns ** -0.5 / 4
        blocks["d"], blocks["m"] = scale, -7.5 * scale
        blocks["quants"] = random.integers(0, 256, (rows, columns // 32, 16), numpy.uint8)
        out.add_tensor(name, blocks.view(numpy.uint8).reshape(rows, -1), raw_dtype=Q4_1)

    matrix("token_embd.weight", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        out.add_tensor(block + "attn_norm.weight", numpy.ones(WIDTH, numpy.float32))
        matrix(block + "attn_q.weight", HEADS * HEAD, WIDTH)
        matrix(block + "attn_k.weight", KV_HEADS * HEAD, WIDTH)
        matrix(block + "attn_v.weight", KV_HEADS * HEAD, WIDTH)
        matrix(block + "attn_output.weight", WIDTH, HEADS * HEAD)
        out.add_tensor(block + "ffn_norm.weight", numpy.ones(WIDTH, numpy.float32))
        matrix(block + "ffn_gate.weight", FFN, WIDTH)
        matrix(block + "ffn_up.weight", FFN, WIDTH)
        matrix(block + "ffn_down.weight", WIDTH, FFN)
    out.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    write(sys.argv[1])
