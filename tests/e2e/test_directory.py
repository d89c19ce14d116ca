"""A directory with safetensors against a GGUF file of the same weights; and directories that are wrong."""
import itertools
import json
import pathlib
import subprocess
import sys

import gguf
import numpy
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "engine"), str(TESTS / "tokenizer")]
import oracles  # noqa: E402
import package_reader  # noqa: E402
import reference  # noqa: E402
import tiny_family  # noqa: E402
from test_engine import engine, seal  # noqa: E402
from test_tokenizer import ROLES, chats_for, rendered, runner, template_of  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

FAMILIES = list(tiny_family.FAMILIES)


def opened(folder):
    return package_reader.Package((folder / "m.cmpkg").read_bytes(), (folder / "key").read_bytes())


@pytest.fixture(scope="module")
def both(build, tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            top = tmp_path_factory.mktemp(family)
            (top / "a").mkdir()
            (top / "b").mkdir()
            tiny_family.write_directory(top / "model", family)
            made[family] = (seal(build, tiny_family.write_gguf(top / "tiny.gguf", family), top / "a"),
                            seal(build, top / "model", top / "b"), top / "model")
        return made[family]
    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_directory_and_gguf_are_the_same_model(build, both, family):
    from_gguf, from_directory, _ = both(family)
    a, b = opened(from_gguf), opened(from_directory)
    assert a.payload == b.payload
    names = ["layer", "role", "kind", "rows", "columns", "offset", "scale_offset", "bytes"]
    assert [[t[n] for n in names] for t in a.manifest.tensors] == \
        [[t[n] for n in names] for t in b.manifest.tensors]
    assert a.manifest.tokens == b.manifest.tokens and a.manifest.decoder == b.manifest.decoder
    for tag in (8, 11, 12):  # ids and split, types, merges
        parts = [m.records[tag] for m in (a.manifest, b.manifest)]
        if (tag, family) == (8, "mistral"):  # GGUF does not say which spaces `tokenizers` leaves out
            assert [part[4:8] for part in parts] == [b"\6\0\0\0", b"\7\0\0\0"]
            parts = [part[:4] + part[8:] for part in parts]
        assert parts[0] == parts[1], tag
    shape = [{k: v for k, v in m.shape.items() if k != "architecture"}
             for m in (a.manifest, b.manifest)]
    assert shape[0] == shape[1]  # GGUF knows Mistral as a llama
    tokens = tiny_family.tokens(family)
    runs = {engine(build, folder, "greedy", 40, 16, tokens=tokens)
            for folder in (from_gguf, from_directory)}
    assert len(runs) == 1 and len(runs.pop().split()) == 40


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bf16_matrices_are_carried_over(build, tmp_path, family):
    for name, write in (("a", tiny_family.write_gguf), ("b", tiny_family.write_directory)):
        (tmp_path / name).mkdir()
        seal(build, write(tmp_path / name / "model.gguf", family, bf16=True), tmp_path / name,
             "--matrices", "bf16")
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert a.payload == b.payload and a.manifest.loss is None
    down = next(t for t in b.manifest.tensors if (t["layer"], t["role"]) == (1, 5))
    stored = tiny_family.weights(family, bf16=True)["model.layers.1.mlp.down_proj.weight"]
    assert (tiny_family.bfloats(b.weights(down)) == stored).all() and down["kind"] == 5


SCALINGS = {"llama3": tiny_family.LLAMA3, "linear": tiny_family.LINEAR, "yarn": tiny_family.YARN,
            "yarn, all said": tiny_family.YARN_SAID}


@pytest.mark.parametrize("family,name", [("gemma3", "linear"), *itertools.product(
    ("llama", "mistral", "qwen2", "qwen3"), SCALINGS)])
def test_scaled_rope(build, tmp_path, family, name):
    """From config.json and from GGUF, beside float64; and it is not what it is unscaled."""
    tokens, scaling = tiny_family.tokens(family) * 3, SCALINGS[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", family, True, scaling)
    a = seal(build, path, tmp_path / "a", "--matrices", "bf16")
    b = seal(build, tiny_family.write_directory(tmp_path / "model", family, True, scaling),
             tmp_path / "b", "--matrices", "bf16")
    made = [opened(folder) for folder in (a, b)]
    assert made[0].payload == made[1].payload
    if name == "linear":
        assert made[0].manifest.decoder[-1] == made[1].manifest.decoder[-1] == 0.25
    else:
        factors = made[0].manifest.rope_factors
        assert numpy.allclose(factors, made[1].manifest.rope_factors, rtol=2e-7, atol=0)
        assert factors[0] == 1 and len({float(f) for f in factors}) > 2
        assert numpy.isclose(factors[-1], scaling["factor"], rtol=1e-6) or "said" in name
    if name.startswith("yarn"):
        assert numpy.isclose(made[0].manifest.decoder[7], made[1].manifest.decoder[7], rtol=1e-6)
        assert [m.manifest.shape["context_max"] for m in made] == [
            max(512, scaling["factor"] * scaling["original_max_position_embeddings"])] * 2
    wanted = reference.Decoder(path).logits(tokens)
    for folder in (a, b):
        found = numpy.frombuffer(engine(build, folder, "logits", tokens=tokens), "<f4")
        part, _ = reference.compare(wanted, found.reshape(wanted.shape))
        assert part / len(tokens) < 2e-6
    plain = reference.Decoder(tiny_family.write_gguf(tmp_path / "plain.gguf", family, True))
    assert reference.compare(wanted, plain.logits(tokens))[0] / len(tokens) > 1e-3


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_longrope(build, tmp_path, family):
    """From config.json and from GGUF, beside float64, by the long factors and by the short ones."""
    tokens = tiny_family.tokens(family) * 3
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", family, True, tiny_family.LONG)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, model in zip(folders, (path, tiny_family.write_directory(
            tmp_path / "model", family, True, tiny_family.LONG))):
        folder.mkdir()
        seal(build, model, folder, "--matrices", "bf16")
        manifest = opened(folder).manifest
        assert manifest.long_context == 128
        for kind, found in (("short", manifest.rope_factors), ("long", manifest.long_factors)):
            assert (found == numpy.array(tiny_family.LONG[kind + "_factor"], "<f4")).all()
        scale = (1 + numpy.log(512 / 128) / numpy.log(128)) / tiny_family.head_width(family) ** 0.5
        assert numpy.isclose(manifest.decoder[7], scale, rtol=3e-7, atol=0)
    assert opened(folders[0]).payload == opened(folders[1]).payload
    wanted = {context: reference.Decoder(path, context).logits(tokens) for context in (128, 129)}
    assert reference.compare(wanted[128], wanted[129])[0] / len(tokens) > 1e-3
    for context, logits in wanted.items():
        for folder in folders:
            found = numpy.frombuffer(engine(build, folder, "logits", tokens=tokens,
                                            CASEMATE_CONTEXT=str(context)), "<f4")
            part, _ = reference.compare(logits, found.reshape(logits.shape))
            assert part / len(tokens) < 2e-6
        assert len({engine(build, folder, "greedy", 40, 16, tokens=tokens, CASEMATE_CONTEXT=str(context))
                    for folder in folders}) == 1


@pytest.mark.parametrize("beside,within,counts", [(100, 128, 100), (None, 128, 128), (100, None, 100)])
def test_longropes_context_as_transformers_finds_it(build, tmp_path, beside, within, counts):
    scaling = tiny_family.LONG | {"original_max_position_embeddings": within}
    with tiny_family.reshaped("llama", original_max_position_embeddings=beside):
        tiny_family.write_directory(tmp_path / "model", "llama", scaling=scaling)
    manifest = opened(seal(build, tmp_path / "model", tmp_path)).manifest
    assert manifest.long_context == counts
    factor = (1 + numpy.log(512 / counts) / numpy.log(counts)) ** 0.5
    assert numpy.isclose(manifest.decoder[7] * 24 ** 0.5, factor ** 2, rtol=3e-7, atol=0)


class Changed(gguf.GGUFWriter):
    """Leaves tensors out, or puts other values or keys in."""
    change: dict = {}

    def add_tensor(self, name, tensor, **more):
        if name in self.change.get("without", ()):
            return
        super().add_tensor(name, self.change.get(name, tensor), **more)

    def add_rope_scaling_orig_ctx_len(self, value):
        if "original" not in self.change.get("without", ()):
            super().add_rope_scaling_orig_ctx_len(value)
        for key, put in self.change.get("keys", {}).items():
            getattr(self, key)(*put)


SHORT, FREQUENCIES = "rope_factors_short.weight", numpy.full(12, 2, "<f4")


@pytest.mark.parametrize("change,says", [
    ({"without": [SHORT]}, "'rope_factors_short.weight' is not 12 F32"),
    ({"without": ["rope_factors_long.weight"]}, "'rope_factors_long.weight' is not 12 F32"),
    ({SHORT: numpy.ones(11, "<f4")}, "is not 12 F32"),
    ({SHORT: numpy.ones(12, "<f2")}, "is not 12 F32"),
    ({SHORT: numpy.array([1] * 11 + [0], "<f4")}, "has 0 at 11"),
    ({"without": ["original"]}, "original_context_length"),
    ({"keys": {"add_tensor": ("rope_freqs.weight", FREQUENCIES)}}, "beside LongRoPE's"),
    ({"keys": {"add_rope_scaling_type": (gguf.RopeScalingType.LINEAR,)}}, "is not 'longrope'"),
    ({"keys": {"add_rope_scaling_type": (gguf.RopeScalingType.LONGROPE,)},
      "without": [SHORT, "rope_factors_long.weight"]}, "without tensors"),
    ({"keys": {"add_rope_dimension_count": (12,)}, SHORT: FREQUENCIES[:6],
      "rope_factors_long.weight": FREQUENCIES[:6]}, "12 of 24"),
])
def test_a_wrong_longrope_in_gguf_is_refused(build, tmp_path, monkeypatch, change, says):
    monkeypatch.setattr(tiny_family.gguf, "GGUFWriter", type("Writer", (Changed,), {"change": change}))
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", "llama", scaling=tiny_family.LONG)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        seal(build, path, tmp_path)
    said = caught.value.stderr.decode()
    assert caught.value.returncode == 4 and says in said and len(said.strip().splitlines()) == 1


CASES = [(kind, case) for kind in ("yarn", "longrope") for case in json.loads(
    (TESTS / "golden" / "engine" / f"{kind}.json").read_text())["cases"]]


@pytest.mark.parametrize("kind,case", CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_scaled_rope_is_transformers(build, tmp_path, kind, case):
    """Of one layer: what is sealed, beside the figures of its own functions."""
    head = case["head_dim"] or case["hidden_size"] // case["num_attention_heads"]
    with tiny_family.reshaped("llama", num_hidden_layers=1, head_dim=head,
                              rope_theta=case["rope_theta"],
                              max_position_embeddings=case["max_position_embeddings"]):
        tiny_family.write_directory(tmp_path / "model", "llama",
                                    scaling={"rope_type": kind} | case["rope_scaling"])
    manifest = opened(seal(build, tmp_path / "model", tmp_path)).manifest
    plain = case["rope_theta"] ** (-2 * numpy.arange(head // 2) / head)
    factors = manifest.rope_factors if len(manifest.rope_factors) else numpy.ones(head // 2)
    assert numpy.allclose(plain / factors, case["inverse"], rtol=3e-7, atol=0)
    if kind == "longrope" and manifest.shape["context_max"] > case["rope_scaling"]["original_max_position_embeddings"]:
        assert numpy.allclose(plain / manifest.long_factors, case["inverse_long"], rtol=3e-7, atol=0)
    else:
        assert not len(manifest.long_factors)
    scale = manifest.decoder[7] if manifest.decoder and manifest.decoder[7] else head ** -0.5
    assert numpy.isclose(scale * head ** 0.5, case["attention"] ** 2, rtol=3e-7, atol=0)


def rope_tensor(*values):
    def change(path):
        kept = tiny_family.llama3_factors
        tiny_family.llama3_factors = lambda *_: numpy.array(values, numpy.float32)
        try:
            return tiny_family.write_gguf(path, "llama", scaling=tiny_family.LLAMA3)
        finally:
            tiny_family.llama3_factors = kept
    return change


@pytest.mark.parametrize("values,says", [([1.0] * 11, "12 F32"), ([1.0] * 13, "12 F32"),
                                         ([1.0] * 11 + [0.0], "has 0 at 11"),
                                         ([float("nan")] + [1.0] * 11, "nan at 0"),
                                         ([1.0] * 5 + [-2.0] + [1.0] * 6, "-2 at 5")])
def test_factors_that_divide_nothing_are_refused(build, tmp_path, values, says):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        seal(build, rope_tensor(*values)(tmp_path / "tiny.gguf"), tmp_path)
    assert caught.value.returncode == 4 and says in caught.value.stderr.decode()


def test_factors_of_one_are_none(build, tmp_path):
    folder = seal(build, rope_tensor(*[1.0] * 12)(tmp_path / "tiny.gguf"), tmp_path)
    assert len(opened(folder).manifest.rope_factors) == 0


def dump(package, out, chat=0, names=()):
    """names: what tokens are called otherwise."""
    m = package.manifest
    kind, split = numpy.frombuffer(m.records[8], "<u4")[:2]
    tokens = [dict(names).get(token, token) for token in m.tokens]
    return oracles.dump(out, int(kind), int(split), chat, "", tokens, m.records[11],
                        [int(i) for i in m.merges.reshape(-1)], [int(i) for i in m.ranks],
                        whole=m.records[8][8] & 2 != 0)


LINES = ["e\u0301 A\u030a\u0327 \u1112\u1161\u11ab \u212b \u2126 \U0001d15e a\u0301\u0301\u0327",
         "hello the thin man and another", " two  spaces ", "thethethe and\n\nin", "naïve 東京 🎉",
         "The 12345 's don't I'LL", "a\tb\r\nc", "x" * 50, "and and  the\nthin", "<unk> </s> <s>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_is_the_directorys(build, both, family, tmp_path):
    oracle = tiny_family.tokenizer(family)
    run = runner(build, dump(opened(both(family)[1]), tmp_path / "dump"))
    special = ["<unk>", "</s>", "<s>"]
    for line in LINES:
        if any(s in line for s in special):
            continue
        found = run([(0, [(0, line)])])[0]
        assert found == oracle.encode(line, add_special_tokens=False).ids, line


def test_the_tokenizer_of_the_gguf_too(build, both, tmp_path):
    for family in ("qwen2", "gemma3", "phi3"):
        a, b = (runner(build, dump(opened(folder), tmp_path / "dump"))([(0, [(0, line)])
                                                                        for line in LINES])
                for folder in both(family)[:2])
        assert a == b


def test_mistrals_chats_in_pieces(build, both, tmp_path):
    """No space but those that the format writes, though a prompt's text gets one before it."""
    names = {b"<pad>": b"[INST]", b"<s>": b"[/INST]"}
    text = tiny_family.tokenizer("mistral").to_str()
    for old, new in names.items():
        text = text.replace(f'"{old.decode()}"', f'"{new.decode()}"')
    oracle = Tokenizer.from_str(text)
    run = runner(build, dump(opened(both("mistral")[1]), tmp_path / "dump", 6, names))
    _, template = template_of("mistral-v3")
    chats = chats_for("mistral-v3", 300)
    found = run([(1, [(ROLES[role], text) for role, text in chat]) for chat in chats])
    for chat, ids in zip(chats, found):
        wanted = oracle.encode(rendered(template, "mistral-v3", chat), add_special_tokens=False).ids
        assert ids == wanted, chat


def split_by(pattern, **facts):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split | facts, {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


# What GGUF calls it, our number, and whether llama.cpp takes a piece whole that is a token.
PRE = [("tekken", 9, True), ("gpt-4o", 10, False), ("llama-bpe", 4, True), ("llama3", 4, True),
       ("llama-v3", 4, True), ("smaug-bpe", 4, False), ("deepseek-r1-qwen", 3, False)]


@pytest.mark.parametrize("pre,number,whole", PRE, ids=[pre for pre, *_ in PRE])
def test_pre_tokenizers_by_name_and_by_pattern(build, tmp_path, pre, number, whole):
    """From GGUF and from tokenizer.json: the same tokens, which are those of `tokenizers`."""
    (tmp_path / "a").mkdir()
    a = opened(seal(build, tiny_family.write_gguf(tmp_path / "tiny.gguf", "llama", pre=pre), tmp_path / "a"))
    model = tiny_family.write_directory(tmp_path / "model", "llama")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["ignore_merges"] = whole
    tokenizer_change(model=tokenizer["model"], normalizer={"type": "Sequence", "normalizers": []},
                     pre_tokenizer=split_by(oracles.PATTERNS[number]))(model)
    b = opened(seal(build, model, tmp_path))
    assert a.manifest.records[8] == b.manifest.records[8] and a.payload == b.payload
    assert a.manifest.records[8][4:12] == bytes([number, 0, 0, 0, 2 * whole, 0, 0, 0])
    oracle = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = runner(build, dump(b, tmp_path / "dump"))([(0, [(0, line)]) for line in LINES])
    assert found == [oracle.encode(line, add_special_tokens=False).ids for line in LINES]


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-v3", "gpt-4", "tekken2", "default"])
def test_a_pre_tokenizer_of_another_name_is_refused(build, tmp_path, pre):
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", "llama", pre=pre)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        seal(build, path, tmp_path)
    said = caught.value.stderr.decode()
    assert caught.value.returncode == 4 and f"'gpt2' / '{pre}'" in said and "tekken" in said


# ---------------------------------------------------------------- refusals

def tokenizer_change(**facts):
    def change(folder):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | facts))
    return change


@pytest.mark.parametrize("family,normalizer", [
    ("qwen2", {"type": "NFKC"}), ("qwen2", {"type": "Lowercase"}), ("llama", {"type": "NFC"}),
    ("qwen2", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]})])
def test_a_normalizer_that_the_host_does_not_have_is_refused(build, both, tmp_path, family, normalizer):
    tiny_family.write_directory(tmp_path / "model", family)
    tokenizer_change(normalizer=normalizer)(tmp_path / "model")
    done = subprocess.run([build / "bin" / "casemate-pack", "pack", tmp_path / "model", "--out",
                           tmp_path / "x.cmpkg", "--owner", both("mistral")[0] / "owner"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "is not NFC" in done.stderr


def test_a_sequence_of_form_c_alone_is_form_c(build, both, tmp_path):
    tiny_family.write_directory(tmp_path / "model", "qwen2")
    tokenizer_change(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})(tmp_path / "model")
    sealed = opened(seal(build, tmp_path / "model", tmp_path))
    assert sealed.manifest.records[8] == opened(both("qwen2")[1]).manifest.records[8]
    assert sealed.manifest.records[8][4] == 8


TEKKEN = split_by(oracles.PATTERNS[9])
PUNCTUATION = {"type": "Punctuation", "behavior": "Isolated"}


@pytest.mark.parametrize("pre", [
    split_by(oracles.PATTERNS[9] + " "), split_by(oracles.PATTERNS[9].replace("{Lt}", "{Lo}")),
    split_by(oracles.PATTERNS[9], behavior="Removed"), split_by(oracles.PATTERNS[9], invert=True),
    TEKKEN | {"pretokenizers": [PUNCTUATION, *TEKKEN["pretokenizers"]]},
    TEKKEN | {"pretokenizers": TEKKEN["pretokenizers"][:1] * 2 + TEKKEN["pretokenizers"][1:]},
    TEKKEN | {"pretokenizers": [TEKKEN["pretokenizers"][0],
                                TEKKEN["pretokenizers"][1] | {"use_regex": True}]},
    {"type": "Sequence", "pretokenizers": [PUNCTUATION, {"type": "ByteLevel", "add_prefix_space": False,
                                                         "use_regex": True}]}])
def test_a_pre_tokenizer_that_the_host_does_not_have_is_refused(build, both, tmp_path, pre):
    tiny_family.write_directory(tmp_path / "model", "llama")
    tokenizer_change(pre_tokenizer=pre)(tmp_path / "model")
    done = subprocess.run([build / "bin" / "casemate-pack", "pack", tmp_path / "model", "--out",
                           tmp_path / "x.cmpkg", "--owner", both("mistral")[0] / "owner"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "CM-DIR-TOKENIZER" in done.stderr and "Tekken's" in done.stderr


META = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize("change,says", [
    (tokenizer_change(pre_tokenizer=META | {"split": True}), "Metaspace"),
    (tokenizer_change(pre_tokenizer=META | {"replacement": "_"}), "Metaspace"),
    (tokenizer_change(pre_tokenizer=META, normalizer={"type": "NFC"}), "Metaspace"),
    (tokenizer_change(pre_tokenizer=None), "spaces"),
    (tokenizer_change(added_tokens=[{"id": 5, "content": "<call>", "special": False}]), "'first'"),
])
def test_spaces_that_the_host_does_not_put_are_refused(build, both, tmp_path, change, says):
    tiny_family.write_directory(tmp_path / "model", "mistral")
    change(tmp_path / "model")
    done = subprocess.run([build / "bin" / "casemate-pack", "pack", tmp_path / "model", "--out",
                           tmp_path / "x.cmpkg", "--owner", both("mistral")[0] / "owner"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "CM-DIR-TOKENIZER" in done.stderr and says in done.stderr


def header_of(folder):
    blob = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:8 + size]), blob[8 + size:]


def header_put(folder, header, data):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor_change(name, **facts):
    def change(folder):
        header, data = header_of(folder)
        header[name] |= facts
        header_put(folder, header, data)
    return change


def config_change(**facts):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | facts))
    return change


def nan_put(folder):
    header, data = header_of(folder)
    at = header["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    header_put(folder, header, data[:at] + b"\x00\x7e" + data[at + 2:])


def cut(folder):
    blob = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(blob[:len(blob) - 100])


def length_huge(folder):
    blob = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + blob[8:])


def renamed(folder):
    header, data = header_of(folder)
    header["model.layers.0.self_attn.x_proj.weight"] = header.pop(
        "model.layers.0.self_attn.q_proj.weight")
    header_put(folder, header, data)


def merge_dropped(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].remove(["\u2581", "the"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_merges_that_leave_out_a_pair_are_refused(build, both, tmp_path):
    tiny_family.write_directory(tmp_path / "model", "mistral")
    merge_dropped(tmp_path / "model")
    done = subprocess.run([build / "bin" / "casemate-pack", "pack", tmp_path / "model", "--out",
                           tmp_path / "x.cmpkg", "--owner", both("mistral")[0] / "owner"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "leave out" in done.stderr


NORM = "model.norm.weight"


@pytest.mark.parametrize("change,id_,says", [
    (cut, "CM-SAFETENSORS", "outside the file"), (length_huge, "CM-SAFETENSORS", "length"),
    (renamed, "CM-GGUF-TENSOR", "x_proj"), (nan_put, "CM-GGUF-VALUE", "blk.1.ffn_down.weight"),
    (tensor_change(NORM, dtype="F64"), "CM-SAFETENSORS", NORM),
    (tensor_change(NORM, shape=[95]), "CM-SAFETENSORS", NORM),
    (tensor_change(NORM, shape=[]), "CM-SAFETENSORS", NORM),
    (tensor_change(NORM, shape=[1 << 62, 1 << 62]), "CM-SAFETENSORS", NORM),
    (tensor_change(NORM, data_offsets=[-4, 380]), "CM-SAFETENSORS", NORM),
    (tensor_change(NORM, data_offsets=[0, 384]), "CM-SAFETENSORS", "overlap"),
    (config_change(model_type="bert"), "CM-GGUF-ARCHITECTURE", "bert"),
    (config_change(hidden_size=0), "CM-DIR-CONFIG", "hidden_size"),
    (config_change(num_hidden_layers="3"), "CM-DIR-CONFIG", "num_hidden_layers"),
    (config_change(hidden_act="relu"), "CM-DIR-MODEL", "activation"),
    (config_change(attention_bias=True), "CM-DIR-MODEL", "bias"),
    (config_change(rope_scaling={"rope_type": "yarn"}), "CM-GGUF-ROPE", "factor 0"),
    (config_change(rope_scaling=tiny_family.YARN | {"factor": 5000}), "CM-GGUF-ROPE", "5000"),
    (config_change(rope_scaling=tiny_family.YARN | {"beta_slow": 40}), "CM-GGUF-ROPE", "beta_slow 40"),
    (config_change(rope_scaling=tiny_family.YARN | {"attention_factor": 100}), "CM-GGUF-ROPE", "100"),
    (config_change(rope_scaling=tiny_family.YARN | {"attention_factor": -1}), "CM-DIR-CONFIG", "negative"),
    (config_change(rope_scaling=tiny_family.YARN, partial_rotary_factor=0.5), "CM-GGUF-ROPE", "12 of 24"),
    (config_change(rope_scaling=tiny_family.YARN, rope_theta=1.0), "CM-GGUF-ROPE", "yarn"),
    (config_change(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "CM-GGUF-ROPE", "dynamic"),
    (config_change(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "CM-GGUF-ROPE", "short_factor"),
    (config_change(rope_scaling=tiny_family.LONG | {"long_factor": [1.0] * 11}), "CM-GGUF-ROPE", "long_factor"),
    (config_change(rope_scaling=tiny_family.LONG | {"long_factor": [1.0] * 11 + ["1"]}), "CM-GGUF-ROPE", "long"),
    (config_change(rope_scaling=tiny_family.LONG | {"short_factor": [1.0, 0] + [1.0] * 10}), "CM-GGUF-ROPE",
     "0 and 1.1 of pair 1"),
    (config_change(rope_scaling=tiny_family.LONG | {"attention_factor": 17}), "CM-GGUF-ROPE", "17"),
    (config_change(rope_scaling=tiny_family.LONG | {"long_mscale": 1.2}), "CM-GGUF-ROPE", "long_mscale"),
    (config_change(rope_scaling=tiny_family.LONG | {"original_max_position_embeddings": None}), "CM-GGUF-ROPE",
     "original context 0"),
    (config_change(rope_scaling=tiny_family.LONG | {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
                   partial_rotary_factor=0.5), "CM-GGUF-ROPE", "12 of 24"),
    (config_change(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "CM-GGUF-ROPE", "out of bounds"),
    (config_change(rope_scaling=tiny_family.LLAMA3 | {"factor": 0.5}), "CM-GGUF-ROPE", "0.5"),
    (config_change(eos_token_id=[2] * 9), "CM-DIR-MODEL", "eos_token_id"),
    (config_change(num_attention_heads=8), "CM-GGUF-SHAPE", ""),
    (lambda f: (f / "config.json").write_text("{"), "CM-DIR-MODEL", "config.json"),
    (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "CM-DIR-MODEL", "config.json"),
    (lambda f: (f / "tokenizer.json").unlink(), "CM-GGUF-READ", "tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}'),
     "CM-DIR-TOKENIZER", "BPE"),
])
def test_a_wrong_directory_is_one_line_and_no_file(build, tmp_path, change, id_, says):
    tiny_family.write_directory(tmp_path / "model", "llama")
    change(tmp_path / "model")
    pack = build / "bin" / "casemate-pack"
    subprocess.run([pack, "keygen", "--owner", tmp_path / "owner"], check=True, capture_output=True)
    done = subprocess.run([pack, "pack", tmp_path / "model", "--out", tmp_path / "m.cmpkg", "--owner",
                           tmp_path / "owner"], capture_output=True, text=True, timeout=60)
    assert done.returncode == (9 if id_ == "CM-GGUF-READ" else 4), done.stderr
    assert id_ in done.stderr and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("m.cmpkg*"))


def test_shards(build, both, tmp_path):
    """Two files and an index: the same package."""
    _, whole, model = both("llama")
    split = tmp_path / "model"
    split.mkdir()
    (tmp_path / "s").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (split / name).write_bytes((model / name).read_bytes())
    weights = tiny_family.weights("llama")
    halves = {"one.safetensors": list(weights)[::2], "two.safetensors": list(weights)[1::2]}
    for name, keys in halves.items():
        (split / name).write_bytes(tiny_family.safetensors({k: weights[k] for k in keys}))
    index = {"weight_map": {k: name for name, keys in halves.items() for k in keys}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    assert opened(seal(build, split, tmp_path / "s")).payload == opened(whole).payload
    index["weight_map"][NORM] = "../one.safetensors"
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    done = subprocess.run([build / "bin" / "casemate-pack", "pack", split, "--out",
                           tmp_path / "x.cmpkg", "--owner", tmp_path / "s" / "owner"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "shard's name" in done.stderr
