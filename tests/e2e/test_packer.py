"""casemate-pack as its user runs it; the result is read by the independent reader."""
import collections
import json
import pathlib
import subprocess
import sys

import gguf
import numpy
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import package_reader  # noqa: E402
import tiny_model  # noqa: E402

PASSPHRASE = "correct horse battery"


def run(build, *words, code=0):
    done = subprocess.run([build / "bin" / "casemate-pack", *map(str, words)], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def owner(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "owner"
    run(build, "keygen", "--owner", folder)
    (folder / "pass").write_text(PASSPHRASE + "\n")
    return folder


def pack(build, owner, model, out, *more):
    recovery = out.with_suffix(".recovery")
    done = run(build, "pack", model, "--out", out, "--owner", owner, "--recovery", recovery,
               "--passphrase-file", owner / "pass", "--json", *more)
    key = package_reader.recovery_key(recovery.read_bytes(), PASSPHRASE)
    return json.loads(done.stdout), package_reader.Package(out.read_bytes(), key)


def pairs_together(rows, head):
    """Rows of heads whose RoPE pairs are (i, i + head / 2), put side by side."""
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return numpy.swapaxes(halves, 1, 2).reshape(rows.shape)


def source_rows(reader, names, weave, turned=0, head=0):
    found = {t.name: t for t in reader.tensors}
    parts = [gguf.dequantize(found[n].data, found[n].tensor_type) for n in names]
    parts = [pairs_together(p, head) if i < turned else p for i, p in enumerate(parts)]
    if weave:
        tiles = [part.reshape(-1, 16, part.shape[1]) for part in parts]
        return numpy.stack(tiles, 1).reshape(-1, parts[0].shape[1])
    return numpy.concatenate(parts)


# role: the tensors it is made of, whether they alternate, how many of them RoPE turns
MADE_OF = {1: (("attn_q", "attn_k", "attn_v"), False, 2), 4: (("ffn_gate", "ffn_up"), True, 0),
           7: (("attn_q_norm",), False, 1), 8: (("attn_k_norm",), False, 1)}


def compare_all(package, path, worst_allowed, apart=False):
    """Each stored tensor against its sources; worst_allowed: by the type of the first source."""
    reader = gguf.GGUFReader(path)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    for tensor in package.manifest.tensors:
        names, weave, turned = [tensor["name"]], False, 0
        if tensor["layer"] != 0xFFFFFFFF and tensor["role"] in MADE_OF:
            parts, weave, turned = MADE_OF[tensor["role"]]
            names = [f"blk.{tensor['layer']}.{part}.weight" for part in parts]
        head = package.manifest.shape["head_width"]
        wanted = source_rows(reader, names, weave, turned if apart else 0, head)
        found = package.weights(tensor).reshape(wanted.shape)
        error = float(numpy.abs(found - wanted).max() / numpy.abs(wanted).max())
        allowed = max(worst_allowed.get(types[name], worst_allowed[""]) for name in names)
        assert error <= allowed, (tensor["name"], error)
    return len(package.manifest.tensors)


def test_the_real_model_is_carried_over_exactly(build, owner, smollm_gguf, tmp_path):
    facts, package = pack(build, owner, smollm_gguf, tmp_path / "m.cmpkg", "--name", "smollm2")
    assert facts["exact"] and facts["model"] == "smollm2"
    assert compare_all(package, smollm_gguf, {"": 1e-6}) == 182
    manifest = package.manifest
    assert manifest.shape["vocabulary"] == 49152 and manifest.shape["tied_head"] == 1
    assert manifest.tokens[2] == b"<|im_end|>" and len(manifest.merges) == 48900
    for left, right in manifest.merges[::97]:
        assert manifest.tokens[left] + manifest.tokens[right] in manifest.tokens
    assert manifest.chat == 1
    assert manifest.default_system == \
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_gemma_is_carried_over_but_for_rounded_scales(build, owner, gemma_gguf, tmp_path):
    facts, package = pack(build, owner, gemma_gguf, tmp_path / "m.cmpkg", "--name", "gemma")
    assert not facts["exact"] and facts["relative_rms_error"] < 0.0006
    # Q4_K: scales become halves; Q6_K: one scale for 32 in place of 16. The rest is exact.
    assert compare_all(package, gemma_gguf, {"Q4_K": 1e-3, "Q6_K": 0.004, "": 0}, True) == 182
    kinds = collections.Counter((t["role"], t["kind"]) for t in package.manifest.tensors
                                if t["kind"] != 1 and t["layer"] != 0xFFFFFFFF)
    # V of Q8_0 takes Q and K of Q5_0 with it into eight bits; all gates are u5
    assert kinds == {(1, 8): 9, (1, 4): 9, (2, 2): 18, (4, 8): 18, (5, 2): 9, (5, 4): 9}
    manifest = package.manifest
    assert manifest.shape["head_width"] == 256 and manifest.shape["kv_heads"] == 1
    activation, qk_norm, post_norms, bias, window, period = manifest.decoder[:6]
    assert (activation, qk_norm, post_norms, bias, window, period) == (1, 1, 1, 0, 512, 6)
    assert manifest.decoder[6:] == (numpy.float32(640 ** 0.5), 0, 0, 0, 10000, 0)
    assert manifest.chat == 0 and len(manifest.tokens) == 262144 and manifest.tokens[108] == b"\n\n"


U4A, U4S, U8S, U5A, U5S = 2, 3, 4, 7, 8


# the kind, and the greatest error by the greatest weight
@pytest.mark.parametrize("type_,kind,allowed", [
    ("F32", U8S, 0.004), ("F16", U8S, 0.004), ("BF16", U8S, 0.004), ("Q4_0", U4S, 0),
    ("Q4_1", U4A, 0), ("Q5_0", U5S, 0), ("Q5_1", U5A, 0), ("Q8_0", U8S, 0), ("Q4_K", U4A, 1e-3),
    ("Q5_K", U5A, 1e-3), ("Q6_K", U8S, 0.004)])
def test_each_type_reaches_its_nearest_kind(build, owner, tmp_path, monkeypatch, type_, kind,
                                            allowed):
    path, names = tmp_path / "tiny.gguf", ["output.weight", "blk.1.ffn_down.weight"]
    monkeypatch.setattr(tiny_model, "WIDTH", 256)
    monkeypatch.setattr(tiny_model, "FFN", 512)
    tiny_model.write(str(path), dict.fromkeys(names, gguf.GGMLQuantizationType[type_]))
    _, package = pack(build, owner, path, tmp_path / "t.cmpkg")
    reader = gguf.GGUFReader(path)
    tensors = [t for t in package.manifest.tensors if t["name"] in names]
    assert [t["kind"] for t in tensors] == [kind, kind]
    for tensor in tensors:
        wanted = source_rows(reader, [tensor["name"]], False)
        found = package.weights(tensor)
        assert len(numpy.unique(wanted)) > 16 and not numpy.isnan(wanted).any()
        error = numpy.abs(found - wanted).max() / numpy.abs(wanted).max()
        assert error <= allowed, error


# Q and K of one type, V of another, in one tensor
@pytest.mark.parametrize("type_,value,kind,exact", [
    ("Q4_0", "Q5_0", U5S, True), ("Q5_0", "Q4_0", U5S, True), ("Q5_0", "Q8_0", U8S, True),
    ("Q4_0", "Q8_0", U8S, True), ("Q5_1", "Q4_1", U5A, True), ("Q4_1", "Q5_1", U5A, True),
    ("Q4_1", "Q5_0", U8S, False), ("Q5_1", "Q8_0", U8S, False), ("F16", "Q5_1", U8S, False)])
def test_types_that_share_a_tensor_meet_in_a_kind_that_holds_both(build, owner, tmp_path, type_,
                                                                  value, kind, exact):
    path, Q = tmp_path / "tiny.gguf", gguf.GGMLQuantizationType
    names = [f"blk.1.attn_{part}.weight" for part in "qkv"]
    tiny_model.write(str(path), dict(zip(names, [Q[type_], Q[type_], Q[value]])))
    _, package = pack(build, owner, path, tmp_path / "t.cmpkg")
    tensor, = [t for t in package.manifest.tensors if t["name"] == names[0]]
    wanted = source_rows(gguf.GGUFReader(path), names, False)
    error = numpy.abs(package.weights(tensor) - wanted).max() / numpy.abs(wanted).max()
    assert tensor["kind"] == kind and (error == 0 if exact else 0 < error < 0.006)


@pytest.mark.parametrize("suite", ["aes-256-gcm", "chacha20-poly1305"])
def test_a_tiny_model_of_other_shapes(build, owner, tmp_path, suite):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    facts, package = pack(build, owner, tmp_path / "tiny.gguf", tmp_path / "t.cmpkg", "--suite",
                          suite)
    assert not facts["exact"] and facts["relative_rms_error"] < 0.006
    compare_all(package, tmp_path / "tiny.gguf", {"": 0.01})
    assert package.manifest.shape["tied_head"] == 0 and package.manifest.default_system == ""
    run(build, "recover", tmp_path / "t.cmpkg", "--recovery", tmp_path / "t.recovery",
        "--passphrase-file", owner / "pass")
    blob = bytearray((tmp_path / "t.cmpkg").read_bytes())
    blob[-5] ^= 1
    (tmp_path / "t.cmpkg").write_bytes(blob)
    done = run(build, "recover", tmp_path / "t.cmpkg", "--recovery", tmp_path / "t.recovery",
               "--passphrase-file", owner / "pass", code=4)
    assert "payload segment" in done.stderr and "CM-PKG-HASH" in done.stderr


@pytest.mark.parametrize("fault,words", [
    ("short", "shorter than 8 bytes"), ("no pass", "cannot read"), ("no folder", "cannot write")])
def test_no_package_is_written_whose_recovery_file_cannot_be(build, owner, tmp_path, fault, words):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    (tmp_path / "short").write_text("secret\n")
    recovery = tmp_path / "gone" / "t.recovery" if fault == "no folder" else tmp_path / "t.recovery"
    secret = owner / "pass" if fault == "no folder" else tmp_path / fault
    before = sorted(tmp_path.iterdir())
    done = run(build, "pack", tmp_path / "tiny.gguf", "--out", tmp_path / "t.cmpkg", "--owner", owner,
               "--recovery", recovery, "--passphrase-file", secret, code=2 if fault == "short" else 9)
    assert words in done.stderr and sorted(tmp_path.iterdir()) == before


def test_inspect_needs_no_key(build, owner, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    pack(build, owner, tmp_path / "tiny.gguf", tmp_path / "t.cmpkg")
    facts = json.loads(run(build, "inspect", tmp_path / "t.cmpkg", "--json").stdout)
    assert facts["signature_valid"] and facts["length_right"] and not facts["slots_torn"]
    text = run(build, "inspect", tmp_path / "t.cmpkg").stdout
    assert "only the key opens them" in text and "tiny" not in text.replace(str(tmp_path), "")
    blob = bytearray((tmp_path / "t.cmpkg").read_bytes())
    blob[9000] ^= 1
    (tmp_path / "t.cmpkg").write_bytes(blob)
    facts = json.loads(run(build, "inspect", tmp_path / "t.cmpkg", "--json").stdout)
    assert facts["slots_torn"] and facts["slots_copy"] == "B"


def test_keys_are_never_overwritten(build, owner):
    before = (owner / "owner.key").read_bytes()
    assert "never overwritten" in run(build, "keygen", "--owner", owner, code=2).stderr
    assert (owner / "owner.key").read_bytes() == before
    assert (owner / "owner.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("words", [[], ["nonsense"], ["pack"], ["pack", "x", "--bogus"],
                                   ["pack", "x", "--out"], ["inspect"]])
def test_wrong_usage_is_exit_2_with_one_line(build, words):
    done = run(build, *words, code=2)
    assert words == [] or (len(done.stderr.strip().splitlines()) == 1 and "--help" in done.stderr and
                           done.stderr.startswith("casemate-pack: CM-PACK-USAGE: "))


# What is done to a good file, and the id that must come back.
def cut(blob):
    return blob[:len(blob) // 2]


def magic(blob):
    return b"GGUG" + blob[4:]


def version(blob):
    return blob[:4] + b"\x09" + blob[5:]


def huge_count(blob):
    return blob[:8] + b"\xff" * 8 + blob[16:]


def renamed(old, new):
    return lambda blob: blob.replace(old, new)


def template(blob):
    return blob.replace(b"add_generation_prompt", b"add_generation_prompx")


@pytest.mark.parametrize("change,id_", [
    (cut, "CM-GGUF-LENGTH"), (magic, "CM-GGUF-MAGIC"), (version, "CM-GGUF-VERSION"),
    (huge_count, "CM-GGUF-COUNT"), (lambda b: b[:40], "CM-GGUF-LENGTH"), (lambda b: b"", "CM-GGUF"),
    (renamed(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"), "CM-GGUF-DUPLICATE"),
    (renamed(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "CM-GGUF-TENSOR"),
    (renamed(b"llama.block_count", b"llama.block_counx"), "CM-GGUF-KEY"),
    (renamed(b"gpt-2", b"gpt-9"), "CM-GGUF-TOKENIZER"),
    (template, "CM-GGUF-TEMPLATE"),
])
def test_a_bad_model_is_one_line_and_no_file(build, owner, tmp_path, change, id_):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    blob = (tmp_path / "tiny.gguf").read_bytes()
    changed = change(blob)
    assert changed != blob
    (tmp_path / "bad.gguf").write_bytes(changed)
    done = run(build, "pack", tmp_path / "bad.gguf", "--out", tmp_path / "b.cmpkg", "--owner", owner,
               code=4)
    assert id_ in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("b.cmpkg*"))


@pytest.mark.parametrize("name", ["output.weight", "blk.1.attn_norm.weight", "token_embd.weight"])
def test_a_weight_that_is_no_number_is_refused_by_name(build, owner, tmp_path, name):
    path = tmp_path / "nan.gguf"
    tiny_model.write(str(path))
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    bad = b"\x00\x00\xc0\x7f" if "norm" in name else b"\x00\x7e"
    blob = bytearray(path.read_bytes())
    blob[tensor.data_offset:tensor.data_offset + len(bad)] = bad
    path.write_bytes(blob)
    done = run(build, "pack", path, "--out", tmp_path / "b.cmpkg", "--owner", owner, code=4)
    assert "CM-GGUF-VALUE" in done.stderr and name in done.stderr
    assert not list(tmp_path.glob("b.cmpkg*"))


def test_an_unread_weight_type_is_named(build, owner, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    blob = bytearray((tmp_path / "tiny.gguf").read_bytes())
    at = blob.index(b"output.weight", blob.index(b"output_norm.weight")) + len(b"output.weight")
    assert blob[at:at + 4] == b"\2\0\0\0"  # dimensions; the type follows them
    blob[at + 20] = 10  # Q2_K
    (tmp_path / "bad.gguf").write_bytes(blob)
    done = run(build, "pack", tmp_path / "bad.gguf", "--out", tmp_path / "b.cmpkg", "--owner", owner,
               code=4)
    assert "output.weight" in done.stderr and "CM-GGUF-TENSOR-TYPE" in done.stderr


def test_a_full_disk_leaves_the_earlier_package(build, owner, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    pack(build, owner, tmp_path / "tiny.gguf", tmp_path / "t.cmpkg")
    before = (tmp_path / "t.cmpkg").read_bytes()
    program = build / "bin" / "casemate-pack"
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; ulimit -f 200; exec {program} pack "
                           f"{tmp_path}/tiny.gguf --out {tmp_path}/t.cmpkg --owner {owner}"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 9 and "CM-PKG-WRITE" in done.stderr
    assert (tmp_path / "t.cmpkg").read_bytes() == before
    assert not (tmp_path / "t.cmpkg.partial").exists()
