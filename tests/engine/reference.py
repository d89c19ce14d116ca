"""A float64 pass of the dequantised weights, teacher-forced: what the engine is measured against.

One decoder by parameters, read from a GGUF file through the gguf package; shares nothing with the
packer or the engine. tests/golden/engine holds it to what `transformers` computes."""
import gguf
import numpy


def gelu(x):
    return 0.5 * x * (1 + numpy.tanh(numpy.sqrt(2 / numpy.pi) * (x + 0.044715 * x ** 3)))


def silu(x):
    return x / (1 + numpy.exp(-x))


class Decoder:
    def __init__(self, path, context=None):
        """context: what is served, if not the model's, by which LongRoPE's factors are chosen."""
        reader = gguf.GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        self.fields = reader.fields
        self.family = bytes(self.fields["general.architecture"].parts[-1]).decode()
        self.layers = int(self.number("block_count"))
        self.heads = int(self.number("attention.head_count"))
        self.kv_heads = int(self.number("attention.head_count_kv"))
        self.width = int(self.number("embedding_length"))
        self.ffn = int(self.number("feed_forward_length"))
        self.size = int(self.number("attention.key_length", self.width // self.heads))
        self.turned = int(self.number("rope.dimension_count", self.size))
        self.rope_base = float(self.number("rope.freq_base", 10000))
        self.epsilon = float(self.number("attention.layer_norm_rms_epsilon"))
        self.window = int(self.number("attention.sliding_window", 0))
        self.attention_cap = float(self.number("attn_logit_softcapping", 0))
        self.logits_cap = float(self.number("final_logit_softcapping", 0))
        kind = self.fields.get(f"{self.family}.rope.scaling.type")
        kind = "none" if kind is None else bytes(kind.parts[-1]).decode()
        factor = float(self.number("rope.scaling.factor", 1))
        self.linear = factor if kind == "linear" else 0
        self.yarn = factor if kind == "yarn" else 0
        original = int(self.number("rope.scaling.original_context_length", 0))
        context = context or int(self.number("context_length"))
        self.long = "rope_factors_" + ("long" if context > original else "short") + ".weight"
        gemma = self.family.startswith("gemma")
        self.period = {"gemma2": 2, "gemma3": 6}.get(self.family, 0)
        self.local_base = 10000.0 if self.family == "gemma3" else self.rope_base
        self.activation = gelu if gemma else silu
        self.embedding_scale = numpy.sqrt(self.width) if gemma else 1.0
        self.adjacent = self.family == "llama"  # RoPE pairs

    def number(self, key, default=None):
        field = self.fields.get(f"{self.family}.{key}")
        return default if field is None else field.parts[field.data[0]][0]

    def has(self, name):
        return name in self.tensors

    def weight(self, name, rows=slice(None)):
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data[rows], tensor.tensor_type).astype(numpy.float64)

    def norm(self, x, name):
        scale = 1 / numpy.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * scale * self.weight(name)

    def stretched(self, turn, base):
        """YaRN as llama.cpp has it (ggml, `rope_yarn`): turns, and what they are multiplied by."""
        half = self.turned // 2
        context = float(self.number("rope.scaling.original_context_length"))
        ends = [self.turned * numpy.log(context / (2 * numpy.pi * float(self.number(
            f"rope.scaling.yarn_beta_{end}", most)))) / (2 * numpy.log(base))
            for end, most in (("fast", 32), ("slow", 1))]
        low, high = max(0, numpy.floor(ends[0])), min(self.turned - 1, numpy.ceil(ends[1]))
        kept = 1 - numpy.clip((numpy.arange(half) - low) / max(0.001, high - low), 0, 1)
        size = float(self.number("rope.scaling.attn_factor", 1)) * (1 + 0.1 * numpy.log(self.yarn))
        return turn / self.yarn * (1 - kept) + turn * kept, size

    def rope(self, x, base):
        count, half = x.shape[0], self.turned // 2
        turn = numpy.arange(count)[:, None] * base ** (-numpy.arange(half) / half)
        if self.has("rope_freqs.weight"):
            turn = turn / self.weight("rope_freqs.weight")
        if self.linear and base == self.rope_base:
            turn = turn / self.linear
        size = 1.0
        if self.has(self.long):
            turn = turn / self.weight(self.long)
            size = float(self.number("rope.scaling.attn_factor", 1))
        if self.yarn:
            turn, size = self.stretched(turn, base)
        cosine, sine = size * numpy.cos(turn)[:, None, :], size * numpy.sin(turn)[:, None, :]
        first, second = ((slice(0, self.turned, 2), slice(1, self.turned, 2)) if self.adjacent else
                         (slice(0, half), slice(half, self.turned)))
        out = x.copy()
        out[..., first] = x[..., first] * cosine - x[..., second] * sine
        out[..., second] = x[..., first] * sine + x[..., second] * cosine
        return out

    def product(self, x, name):
        y = x @ self.weight(name + ".weight").T
        return y + self.weight(name + ".bias").reshape(-1) if self.has(name + ".bias") else y

    def heads_of(self, x, block):
        """Q, K, V as [position, head, size]."""
        if self.has(block + "attn_qkv.weight"):
            edges = [self.heads * self.size, (self.heads + self.kv_heads) * self.size]
            parts = numpy.split(self.product(x, block + "attn_qkv"), edges, axis=-1)
        else:
            parts = [self.product(x, f"{block}attn_{part}") for part in "qkv"]
        q, k, v = (part.reshape(len(x), -1, self.size) for part in parts)
        if self.has(block + "attn_q_norm.weight"):
            q, k = (self.norm(q, block + "attn_q_norm.weight"),
                    self.norm(k, block + "attn_k_norm.weight"))
        return q, k, v

    def attention(self, x, layer):
        block = f"blk.{layer}."
        count = len(x)
        windowed = self.window and (not self.period or (layer + 1) % self.period)
        base = self.local_base if windowed else self.rope_base
        q, k, v = self.heads_of(x, block)
        q, k = self.rope(q, base), self.rope(k, base)
        hidden = numpy.triu(numpy.ones((count, count), bool), 1)
        if windowed:
            hidden |= numpy.tril(numpy.ones((count, count), bool), -self.window)
        out = numpy.empty((count, self.heads, self.size))
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            scores = q[:, head] @ k[:, kv].T / numpy.sqrt(self.size)
            if self.attention_cap:
                scores = numpy.tanh(scores / self.attention_cap) * self.attention_cap
            scores[hidden] = -numpy.inf
            scores = numpy.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = (scores / scores.sum(-1, keepdims=True)) @ v[:, kv]
        return self.product(out.reshape(count, -1), block + "attn_output")

    def feed_forward(self, x, block):
        if self.has(block + "ffn_gate.weight"):
            gate, up = self.product(x, block + "ffn_gate"), self.product(x, block + "ffn_up")
        else:
            gate, up = numpy.split(self.product(x, block + "ffn_up"), 2, axis=-1)
        return self.product(self.activation(gate) * up, block + "ffn_down")

    def after(self, x, name):
        return self.norm(x, name) if self.has(name) else x

    def logits(self, tokens, first=0):
        """float64 [len(tokens) - first, vocabulary]"""
        x = self.weight("token_embd.weight", numpy.array(tokens)) * self.embedding_scale
        for layer in range(self.layers):
            block = f"blk.{layer}."
            y = self.attention(self.norm(x, block + "attn_norm.weight"), layer)
            x = x + self.after(y, block + "post_attention_norm.weight")
            y = self.feed_forward(self.norm(x, block + "ffn_norm.weight"), block)
            x = x + self.after(y, block + "post_ffw_norm.weight")
        head = "output.weight" if self.has("output.weight") else "token_embd.weight"
        logits = self.norm(x[first:], "output_norm.weight") @ self.weight(head).T
        return numpy.tanh(logits / self.logits_cap) * self.logits_cap if self.logits_cap else logits


def compare(reference, found):
    """(sum of KL(reference || found), positions where the best token agrees)"""
    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))
    divergence = 0.0
    for row in range(len(reference)):
        a, b = log_softmax(reference[row]), log_softmax(found[row].astype(numpy.float64))
        divergence += float((numpy.exp(a) * (a - b)).sum())
    return divergence, int((reference.argmax(-1) == found.argmax(-1)).sum())
