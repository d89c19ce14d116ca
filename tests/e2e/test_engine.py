"""The engine against a float64 pass of the same weights, and against itself."""
import hashlib
import json
import pathlib
import re
import resource
import struct
import subprocess
import sys

import numpy
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "engine"), str(TESTS / "tokenizer")]
import corpus  # noqa: E402
import package_reader  # noqa: E402
import reference  # noqa: E402
import tiny_family  # noqa: E402
import tiny_model  # noqa: E402

# llama.cpp's own divergence from the same float64 pass on the same positions (`./run golden`).
PEER = json.loads((TESTS / "golden" / "engine" / "llama_cpp.json").read_text())


def seal(build, model, folder, *words):
    pack = build / "bin" / "casemate-pack"
    (folder / "pass").write_text("correct horse battery\n")
    subprocess.run([pack, "keygen", "--owner", folder / "owner"], check=True, capture_output=True)
    subprocess.run([pack, "pack", model, "--out", folder / "m.cmpkg", "--owner", folder / "owner",
                    "--recovery", folder / "r", "--passphrase-file", folder / "pass", *words], check=True,
                   capture_output=True)
    key = package_reader.recovery_key((folder / "r").read_bytes(), "correct horse battery")
    (folder / "key").write_bytes(key)
    return folder
TRANSFORMERS = numpy.load(TESTS / "golden" / "engine" / "families.npz")
FAMILIES = list(tiny_family.FAMILIES)
KV_KINDS = ["fp16", "int8"]


@pytest.fixture(scope="module")
def real(build, smollm_gguf, tmp_path_factory):
    return seal(build, smollm_gguf, tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def tiny(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.write(str(folder / "tiny.gguf"))
    return seal(build, folder / "tiny.gguf", folder)


@pytest.fixture(scope="module")
def gemma(build, gemma_gguf, tmp_path_factory):
    return seal(build, gemma_gguf, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def family(build, tmp_path_factory):
    """A function: name → folder with the sealed tiny model of that family."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = seal(build, tiny_family.write_gguf(folder / "tiny.gguf", name), folder)
        return made[name]
    return of


def engine(build, folder, *words, tokens, **environment):
    done = subprocess.run([build / "harness" / "engine", words[0], folder / "m.cmpkg",
                           folder / "key", *map(str, words[1:])],
                          input=struct.pack(f"<{len(tokens) + 1}I", len(tokens), *tokens),
                          env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def bf16_tiles() -> bool:
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    return "amx_bf16" in flags and "avx512_bf16" in flags


needs_bf16_tiles = pytest.mark.skipif(not bf16_tiles(), reason="this machine lacks AMX-bf16")


@pytest.mark.parametrize("prompts", ["exact", pytest.param("bf16", marks=needs_bf16_tiles)])
def test_divergence_from_float64_is_below_the_peers(build, real, smollm_gguf, prompts, capsys):
    model = reference.Decoder(smollm_gguf)
    divergence, agree, positions, digest = [0.0, 0.0], [0, 0], 0, hashlib.sha256()
    for tokens in corpus.passages(smollm_gguf):
        digest.update(numpy.array(tokens, "<u4").tobytes())
        wanted = model.logits(tokens)
        positions += len(tokens)
        for i, kv in enumerate(KV_KINDS):
            found = numpy.frombuffer(engine(build, real, "logits", tokens=tokens, CASEMATE_KV=kv,
                                            CASEMATE_PROMPTS=prompts), "<f4")
            part, same = reference.compare(wanted, found.reshape(wanted.shape))
            divergence[i], agree[i] = divergence[i] + part, agree[i] + same
    mean, top = [d / positions for d in divergence], [a / positions for a in agree]
    with capsys.disabled():
        for kv, kl, same in zip(KV_KINDS, mean, top):
            print(f"\nengine, {kv} K and V, prompts {prompts}: mean KL {kl:.5f} (llama.cpp, fp16, {PEER['mean_kl']:.5f}), top-1 "
                  f"{same:.2%} (llama.cpp {PEER['top1_agreement']:.2%}), {positions} positions")
    assert positions >= 2000 and digest.hexdigest() == PEER["tokens_sha256"]
    bar = 0.0044 if prompts == "exact" else 0.0015
    assert mean[0] <= min(PEER["mean_kl"], bar) and top[0] >= PEER["top1_agreement"]
    assert mean[0] != mean[1] <= 0.0044 and top[1] >= PEER["top1_agreement"]


def test_a_model_of_other_shapes(build, tiny):
    tokens = [int(t) for t in numpy.random.default_rng(3).integers(3, 270, 300)]
    wanted = reference.Decoder(tiny / "tiny.gguf").logits(tokens)
    found = numpy.frombuffer(engine(build, tiny, "logits", tokens=tokens), "<f4")
    part, same = reference.compare(wanted, found.reshape(wanted.shape))
    assert part / len(tokens) <= 0.002 and same / len(tokens) >= 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_is_what_transformers_computes(build, family, name):
    wanted = TRANSFORMERS[name]
    tokens = tiny_family.tokens(name)
    found = reference.Decoder(family(name) / "tiny.gguf").logits(tokens, len(tokens) - len(wanted))
    assert numpy.abs(found - wanted).max() < 1e-4, name  # transformers' RoPE is float32


@pytest.mark.parametrize("kv", KV_KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_on_each_path(build, family, name, kv):
    tokens = tiny_family.tokens(name) * 2
    wanted = reference.Decoder(family(name) / "tiny.gguf").logits(tokens)
    runs = {engine(build, family(name), "logits", tokens=tokens, CASEMATE_CPU=path, CASEMATE_KV=kv,
                   CASEMATE_THREADS=count) for path in available_paths() for count in "12"}
    assert len(runs) == 1
    found = numpy.frombuffer(runs.pop(), "<f4").reshape(wanted.shape)
    part, same = reference.compare(wanted, found)
    # Logits of seeded weights are flat: the best two lie close together.
    assert part / len(tokens) <= 0.002 and same / len(tokens) >= 0.85, (part / len(tokens), same)


@needs_bf16_tiles
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_with_prompts_in_bf16(build, tmp_path, name, bf16):
    """Beside float64, the same on each path, and not what the exact prompts give."""
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", name, bf16=bf16)
    folder = seal(build, path, tmp_path, *(["--matrices", "bf16"] if bf16 else []))
    tokens = tiny_family.tokens(name) * 2
    wanted = reference.Decoder(path).logits(tokens)
    runs = {engine(build, folder, "logits", tokens=tokens, CASEMATE_CPU=cpu, CASEMATE_THREADS=count,
                   CASEMATE_PROMPTS="bf16") for cpu in available_paths() for count in "12"}
    assert len(runs) == 1 and engine(build, folder, "logits", tokens=tokens) not in runs
    found = numpy.frombuffer(runs.pop(), "<f4").reshape(wanted.shape)
    part, same = reference.compare(wanted, found)
    assert part / len(tokens) <= 0.002 and same / len(tokens) >= 0.85, (part / len(tokens), same)


def test_prompts_in_bf16_are_refused_where_there_are_none(build, real):
    done = subprocess.run([build / "harness" / "engine", "greedy", real / "m.cmpkg", real / "key", "1", "1"],
                          input=struct.pack("<2I", 1, 5), capture_output=True, timeout=60,
                          env={"CASEMATE_PROMPTS": "bf16"})
    said = done.stderr.decode()
    assert done.returncode == 0 if bf16_tiles() else "CM-DEV-PROMPTS" in said and "prompts: exact" in said


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_bf16_matrices(build, tmp_path, name, capsys):
    """Weights as they are, activations too: what is left is fp16 of K and V, and binary32."""
    path = tiny_family.write_gguf(tmp_path / "tiny.gguf", name, bf16=True)
    tokens = tiny_family.tokens(name) * 2
    wanted, divergence = reference.Decoder(path).logits(tokens), {}
    for kind in ("u8", "bf16"):
        (tmp_path / kind).mkdir()
        folder = seal(build, path, tmp_path / kind, "--matrices", kind)
        package = package_reader.Package((folder / "m.cmpkg").read_bytes(),
                                         (folder / "key").read_bytes())
        kinds = {t["kind"] for t in package.manifest.tensors}
        assert kinds == {1, 5 if kind == "bf16" else 4}
        assert (package.manifest.loss is None) == (kind == "bf16")
        runs = {engine(build, folder, "logits", tokens=tokens, CASEMATE_CPU=path,
                       CASEMATE_THREADS=count) for path in available_paths() for count in "12"}
        assert len(runs) == 1
        found = numpy.frombuffer(runs.pop(), "<f4").reshape(wanted.shape)
        part, same = reference.compare(wanted, found)
        divergence[kind] = part / len(tokens)
        tokens_of = {engine(build, folder, "greedy", 60, chunk, tokens=tokens[:40])
                     for chunk in (1, 7, 40)}
        assert len(tokens_of) == 1
    with capsys.disabled():
        print(f"\n{name}: mean KL u8 {divergence['u8']:.2g}, bf16 {divergence['bf16']:.2g}")
    assert divergence["bf16"] < 2e-6 and divergence["bf16"] < divergence["u8"] / 50
    assert same >= len(tokens) - 1


def test_an_unknown_kind_of_matrices_is_refused(build, tmp_path):
    done = subprocess.run([build / "bin" / "casemate-pack", "pack", "x.gguf", "--out", tmp_path / "m",
                           "--owner", tmp_path, "--matrices", "f64"], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and "u8, bf16" in done.stderr


@pytest.mark.parametrize("kv", KV_KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_tokens_do_not_depend_on_chunks(build, family, name, kv):
    tokens = tiny_family.tokens(name)
    runs = {engine(build, family(name), "greedy", 300, chunk, tokens=tokens, CASEMATE_KV=kv)
            for chunk in (1, 7, 48)}
    assert len(runs) == 1 and len(runs.pop().split()) == 300


def test_gemma_beside_float64(build, gemma, gemma_gguf, capsys):
    """Positions on both sides of the window of 512."""
    peer = json.loads((TESTS / "golden" / "engine" / "llama_cpp_gemma.json").read_text())
    tokens = corpus.gemma_passage(gemma_gguf)
    assert hashlib.sha256(numpy.array(tokens, "<u4").tobytes()).hexdigest() == peer["tokens_sha256"]
    wanted = reference.Decoder(gemma_gguf).logits(tokens)
    count = len(wanted)
    for kv in KV_KINDS:
        found = engine(build, gemma, "logits", tokens=tokens, CASEMATE_KV=kv)
        part, same = reference.compare(wanted, numpy.frombuffer(found, "<f4").reshape(wanted.shape))
        with capsys.disabled():
            print(f"\ngemma, {kv} K and V: mean KL {part / count:.5f} (llama.cpp, fp16, {peer['mean_kl']:.5f}), "
                  f"top-1 {same / count:.2%} (llama.cpp {peer['top1_agreement']:.2%}), {count} positions")
        assert part / count <= min(peer["mean_kl"], 0.0044)
        assert same / count >= peer["top1_agreement"]


@pytest.mark.parametrize("kv", KV_KINDS)
@pytest.mark.parametrize("which", ["real", "tiny", "gemma"])
def test_paths_and_threads_are_bit_equal(build, request, which, kv):
    folder = request.getfixturevalue(which)
    tokens = [int(t) for t in numpy.random.default_rng(4).integers(3, 270, 70)]
    runs = {engine(build, folder, "logits", tokens=tokens, CASEMATE_CPU=path, CASEMATE_THREADS=count,
                   CASEMATE_KV=kv)
            for path in available_paths() for count in "12"}
    assert len(runs) == 1


def test_too_little_memory_is_refused_with_both_numbers(build, real):
    def run(mebibytes):
        limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (mebibytes << 20,) * 2)  # noqa: E731
        return subprocess.run([build / "harness" / "engine", "greedy", real / "m.cmpkg",
                               real / "key", "1", "1"], input=struct.pack("<2I", 1, 5),
                              capture_output=True, text=False, preexec_fn=limit, timeout=60)
    done = run(80)
    said = done.stderr.decode()
    assert done.returncode == 3 and "CM-DEV-MEMORY" in said and "allows 80 MiB" in said
    need = int(re.search(r"need (\d+) MiB", said)[1])
    assert 98 < need < 1000
    assert run(need + 400).returncode == 0


def available_paths():
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    return ["avx2"] + [path for path, flag in (("avx512vnni", "avx512_vnni"), ("amx", "amx_int8"))
                       if flag in flags]


@pytest.mark.parametrize("prompts", ["exact", pytest.param("bf16", marks=needs_bf16_tiles)])
@pytest.mark.parametrize("kv", KV_KINDS)
def test_chunking_of_the_prompt_changes_no_token(build, real, kv, prompts):
    tokens = [int(t) for t in numpy.random.default_rng(5).integers(3, 49000, 200)]
    runs = {engine(build, real, "greedy", 24, chunk, tokens=tokens, CASEMATE_KV=kv, CASEMATE_PROMPTS=prompts)
            for chunk in (1, 7, 32, 256)}
    assert len(runs) == 1 and len(runs.pop().split()) == 24
