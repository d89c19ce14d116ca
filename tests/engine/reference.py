"""A float64 pass of the dequantised weights, teacher-forced: what the engine is measured against.

Reads the GGUF file through the gguf package; shares nothing with the packer or the engine."""
import gguf
import numpy


class Llama:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}

        def number(key):
            field = reader.fields["llama." + key]
            return field.parts[field.data[0]][0]
        self.layers = int(number("block_count"))
        self.heads = int(number("attention.head_count"))
        self.kv_heads = int(number("attention.head_count_kv"))
        self.rope_base = float(number("rope.freq_base"))
        self.epsilon = float(number("attention.layer_norm_rms_epsilon"))

    def weight(self, name):
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float64)

    def norm(self, x, name):
        scale = 1 / numpy.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * scale * self.weight(name)

    def rope(self, x):
        count, _, width = x.shape
        turn = numpy.arange(count)[:, None] * self.rope_base ** (-numpy.arange(0, width, 2) / width)
        cosine, sine = numpy.cos(turn)[:, None, :], numpy.sin(turn)[:, None, :]
        out = numpy.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cosine - x[..., 1::2] * sine
        out[..., 1::2] = x[..., 0::2] * sine + x[..., 1::2] * cosine
        return out

    def attention(self, x, block):
        count, width = x.shape
        size = width // self.heads
        q = self.rope((x @ self.weight(block + "attn_q.weight").T).reshape(count, self.heads, size))
        k = self.rope((x @ self.weight(block + "attn_k.weight").T).reshape(count, -1, size))
        v = (x @ self.weight(block + "attn_v.weight").T).reshape(count, -1, size)
        future = numpy.triu(numpy.ones((count, count), bool), 1)
        out = numpy.empty((count, self.heads, size))
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            scores = q[:, head] @ k[:, kv].T / numpy.sqrt(size)
            scores[future] = -numpy.inf
            scores = numpy.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = (scores / scores.sum(-1, keepdims=True)) @ v[:, kv]
        return out.reshape(count, width) @ self.weight(block + "attn_output.weight").T

    def logits(self, tokens):
        """float64 [len(tokens), vocabulary]"""
        x = self.weight("token_embd.weight")[tokens]
        for layer in range(self.layers):
            block = f"blk.{layer}."
            x = x + self.attention(self.norm(x, block + "attn_norm.weight"), block)
            y = self.norm(x, block + "ffn_norm.weight")
            gate = y @ self.weight(block + "ffn_gate.weight").T
            gate = gate / (1 + numpy.exp(-gate)) * (y @ self.weight(block + "ffn_up.weight").T)
            x = x + gate @ self.weight(block + "ffn_down.weight").T
        head = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.norm(x, "output_norm.weight") @ self.weight(head).T


def compare(reference, found):
    """(sum of KL(reference || found), positions where the best token agrees)"""
    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))
    a, b = log_softmax(reference), log_softmax(found.astype(numpy.float64))
    divergence = (numpy.exp(a) * (a - b)).sum(-1)
    return divergence.sum(), int((reference.argmax(-1) == found.argmax(-1)).sum())
