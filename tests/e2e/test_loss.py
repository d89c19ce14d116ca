"""What rounding costs, as `inspect` prints it, against the NumPy pass over source and stored weights."""
import json
import pathlib
import re
import subprocess
import sys

import gguf
import numpy
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "engine"), str(TESTS / "tokenizer")]
import package_reader  # noqa: E402
import reference  # noqa: E402
import tiny_family  # noqa: E402
import tiny_model  # noqa: E402
from test_engine import seal  # noqa: E402
from test_packer import MADE_OF, pairs_together  # noqa: E402


class Stored(reference.Decoder):
    """The same decoder with the weights that the package holds, taken apart again."""

    def __init__(self, path, package):
        super().__init__(path)
        self.stored = {}
        for tensor in package.manifest.tensors:
            values, layer, role = package.weights(tensor), tensor["layer"], tensor["role"]
            parts, weave, turned = MADE_OF.get(role, ((), False, 0))
            if layer == 0xFFFFFFFF or not parts:
                self.stored[tensor["name"]] = values
                continue
            names = [f"blk.{layer}.{part}.weight" for part in parts]
            if weave:
                tiles = values.reshape(-1, 2, 16, values.shape[1])
                split = [tiles[:, i].reshape(-1, values.shape[1]) for i in range(2)]
            else:
                edges = numpy.cumsum([len(super(Stored, self).weight(n)) for n in names])[:-1]
                split = numpy.split(values, edges)
            for i, (name, part) in enumerate(zip(names, split)):
                self.stored[name] = self.apart(part) if i < turned else part

    def apart(self, rows):
        if self.adjacent:
            return rows
        order = pairs_together(numpy.arange(len(rows)), self.size)
        out = numpy.empty_like(rows)
        out[order] = rows
        return out

    def weight(self, name, rows=slice(None)):
        if name == "rope_freqs.weight":  # sealed in the manifest
            return super().weight(name)
        return self.stored[name][rows].astype(numpy.float64)


def text_tokens(package):
    source = (TESTS.parent / "loader" / "pack" / "loss.c").read_text()
    literal = re.search(r'text\[\] =\n(.*?);\n', source, re.DOTALL)[1]
    text = "".join(json.loads(line.strip()) for line in literal.splitlines()).encode()
    normal = [(t, i) for i, (t, kind) in enumerate(zip(package.manifest.tokens,
                                                       package.manifest.records[11])) if kind == 1]
    tokens, at = [], 0
    while len(tokens) < 32:
        fit = [(len(t), -i) for t, i in normal if t and text.startswith(t, at)]
        size, best = max(fit) if fit else (1, None)
        tokens += [] if best is None else [-best]
        at += size
    return tokens


@pytest.mark.parametrize("family,matrices,scaling", [
    ("llama", "u8", None), ("qwen3", "u8", None), ("gemma2", "u8", None), ("gemma3", "u8", None),
    ("llama", "bf16", None), ("llama", "u8", tiny_family.LLAMA3 | {"original_max_position_embeddings": 16})])
def test_the_loss_is_the_one_of_a_float64_pass(build, tmp_path, family, matrices, scaling):
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", family, scaling=scaling)
    compare(build, tmp_path, path, f"tiny-{family}", "--matrices", matrices)


def test_the_loss_of_k_formats_and_of_types_that_share_a_tensor(build, tmp_path, monkeypatch):
    kinds, path = gguf.GGMLQuantizationType, tmp_path / "tiny.gguf"
    monkeypatch.setattr(tiny_model, "WIDTH", 256)
    monkeypatch.setattr(tiny_model, "FFN", 512)
    tiny_model.write(str(path), {
        "token_embd.weight": kinds.Q5_0, "blk.0.ffn_down.weight": kinds.Q5_K,
        "blk.1.ffn_down.weight": kinds.Q6_K, "blk.2.ffn_down.weight": kinds.Q4_K,
        "blk.1.attn_v.weight": kinds.Q5_0, "blk.2.attn_v.weight": kinds.Q5_1})
    compare(build, tmp_path, path, "tiny")


def compare(build, tmp_path, path, name, *words):
    seal(build, path, tmp_path, *words)
    done = subprocess.run([build / "bin" / "casemate-pack", "inspect", tmp_path / "m.cmpkg",
                           "--recovery", tmp_path / "r", "--passphrase-file", tmp_path / "pass",
                           "--json"], capture_output=True, text=True, check=True, timeout=60)
    model = json.loads(done.stdout)["model"]
    package = package_reader.Package((tmp_path / "m.cmpkg").read_bytes(),
                                     (tmp_path / "key").read_bytes())
    tokens = text_tokens(package)
    total, _ = reference.compare(reference.Decoder(path).logits(tokens),
                                 Stored(path, package).logits(tokens))
    assert model["name"] == name and model["kl_positions"] == 32
    assert package.manifest.loss == (32, numpy.float32(model["kl_divergence"]))
    assert total / 32 > 1e-7
    assert abs(model["kl_divergence"] - total / 32) < 0.02 * total / 32 + 1e-7, total / 32


def test_an_exact_model_has_no_loss(build, tmp_path):
    kinds = gguf.GGMLQuantizationType
    tiny_model.write(str(tmp_path / "tiny.gguf"), {
        "token_embd.weight": kinds.Q5_1, "output.weight": kinds.Q8_0,
        "blk.0.ffn_gate.weight": kinds.Q5_0, "blk.2.attn_v.weight": kinds.Q5_1})
    seal(build, tmp_path / "tiny.gguf", tmp_path)
    inspect = [build / "bin" / "casemate-pack", "inspect", tmp_path / "m.cmpkg"]
    opened = inspect + ["--recovery", tmp_path / "r", "--passphrase-file", tmp_path / "pass"]
    done = subprocess.run(opened, capture_output=True, text=True, check=True, timeout=60)
    assert "no loss is recorded" in done.stdout and "only the key" not in done.stdout
    closed = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=60)
    assert "only the key" in closed.stdout and "tiny" not in closed.stdout.replace(str(tmp_path), "")
    (tmp_path / "pass").write_text("another passphrase\n")
    wrong = subprocess.run(opened, capture_output=True, text=True, timeout=60)
    assert wrong.returncode != 0 and len(wrong.stderr.strip().splitlines()) == 1
    half = subprocess.run(inspect + ["--recovery", tmp_path / "r"], capture_output=True, text=True,
                          timeout=60)
    assert half.returncode == 2 and "go together" in half.stderr
