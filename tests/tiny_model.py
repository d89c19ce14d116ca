#!/usr/bin/env python3
"""A tiny seeded llama of other shapes than the real test model: untied head, other GQA ratio, mixed
types. `tiny_model.py OUT.gguf`"""
import sys

import gguf
import numpy

WIDTH, HEADS, KV_HEADS, FFN, LAYERS, CONTEXT = 128, 4, 1, 192, 3, 512
Q = gguf.GGMLQuantizationType
TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
            "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\\n' }}{% endif %}")


def byte_alphabet() -> list[str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 324))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    alphabet = byte_alphabet()
    space = alphabet[32]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    merges = []
    for left, right in [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("an", "d"), ("e", "r"),
                        (space, "t"), (space, "a"), (space + "t", "h"), (space + "th", "e"),
                        ("o", "n"), ("r", "e"), ("l", "l"), ("i", "s"), (space, "i")]:
        merges.append(f"{left} {right}")
        if left + right not in tokens:
            tokens.append(left + right)
    return tokens, [3, 3, 3] + [1] * (len(tokens) - 3), merges


# Formats that gguf reads but does not write: bytes of a block of 256, and where its halves are.
K_BLOCKS = {Q.Q4_K: (144, (0, 2)), Q.Q5_K: (176, (0, 2)), Q.Q6_K: (210, (208,))}


def k_blocks(random, rows: int, columns: int, kind: Q) -> numpy.ndarray:
    size, halves = K_BLOCKS[kind]
    blocks = random.integers(0, 256, (rows * columns // 256, size), numpy.uint8)
    for at in halves:
        scales = 2e-4 * random.standard_normal(len(blocks)).astype("<f2")
        blocks[:, at:at + 2] = scales.view(numpy.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write(path: str, quants: dict | None = None, template: str = TEMPLATE) -> None:
    tokens, types, merges = vocabulary()
    random = numpy.random.default_rng(7)
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_token_merges(merges)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(template)

    def matrix(name: str, rows: int, columns: int, kind: Q) -> None:
        values = (random.standard_normal((rows, columns)) / columns ** 0.5).astype(numpy.float32)
        kind = (quants or {}).get(name, kind)
        out.add_tensor(name, k_blocks(random, rows, columns, kind) if kind in K_BLOCKS else
                       gguf.quants.quantize(values, kind), raw_dtype=kind)

    def vector(name: str) -> None:
        out.add_tensor(name, (1 + 0.1 * random.standard_normal(WIDTH)).astype(numpy.float32))

    kv = WIDTH // HEADS * KV_HEADS
    matrix("token_embd.weight", len(tokens), WIDTH, Q.F16)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        kind = [Q.Q8_0, Q.Q4_0, Q.Q4_1][layer % 3]
        vector(block + "attn_norm.weight")
        matrix(block + "attn_q.weight", WIDTH, WIDTH, kind)
        matrix(block + "attn_k.weight", kv, WIDTH, kind)
        matrix(block + "attn_v.weight", kv, WIDTH, Q.Q8_0)
        matrix(block + "attn_output.weight", WIDTH, WIDTH, kind)
        vector(block + "ffn_norm.weight")
        matrix(block + "ffn_gate.weight", FFN, WIDTH, kind)
        matrix(block + "ffn_up.weight", FFN, WIDTH, kind)
        matrix(block + "ffn_down.weight", WIDTH, FFN, kind)
    vector("output_norm.weight")
    matrix("output.weight", len(tokens), WIDTH, Q.Q8_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    write(sys.argv[1])
