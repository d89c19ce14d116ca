"""LoRA adapters: what `peft` writes, sealed, computed, against float64 of W + scale * B A; and what is refused."""
import json
import pathlib
import shutil
import subprocess
import sys

import numpy
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "engine"), str(TESTS / "tokenizer")]
import corpus  # noqa: E402
import package_reader  # noqa: E402
import peft  # noqa: E402
import reference  # noqa: E402
import tiny_family  # noqa: E402
from test_engine import available_paths, engine, needs_bf16_tiles, seal  # noqa: E402

FAMILIES = [f for f in tiny_family.FAMILIES if f != "phi3"]  # its projections are fused
def pack(build, *words):
    return subprocess.run([build / "bin" / "casemate-pack", *map(str, words)], capture_output=True,
                          text=True, timeout=120)


def adapter_seal(build, model, peft_folder, name="tuned", to=None, **more):
    """model: a folder as `seal` leaves it, with config.json in it."""
    to = to or peft_folder
    options = {"base": model / "m.cmpkg", "config": model / "config.json", "name": name,
               "out": to / "a.cmpkg", "owner": model / "owner", "recovery": to / "a.r",
               "passphrase-file": model / "pass"} | more
    words = [w for key, value in options.items() for w in (f"--{key}", value)]
    return pack(build, "adapter", peft_folder, *words, "--json")


def adapter_made(build, model, folder, config, weights, **more):
    done = adapter_seal(build, model, peft.write(folder, config, weights), **more)
    assert done.returncode == 0, done.stderr
    key = package_reader.recovery_key((folder / "a.r").read_bytes(), "correct horse battery")
    (folder / "a.key").write_bytes(key)
    return json.loads(done.stdout)


def with_adapter(folder, **more):
    return {"CASEMATE_ADAPTER": str(folder / "a.cmpkg"),
            "CASEMATE_ADAPTER_KEY": str(folder / "a.key")} | more


def opened(folder):
    return package_reader.Package((folder / "a.cmpkg").read_bytes(), (folder / "a.key").read_bytes())


@pytest.fixture(scope="module")
def family(build, tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = seal(build, tiny_family.write_gguf(folder / "tiny.gguf", name), folder)
            (folder / "config.json").write_text(json.dumps(tiny_family.FAMILIES[name]))
        return made[name]
    return of


@pytest.fixture(scope="module")
def real(build, smollm_gguf, tmp_path_factory):
    folder = seal(build, smollm_gguf, tmp_path_factory.mktemp("real"))
    (folder / "config.json").write_text(json.dumps(peft.SMOLLM))
    return folder


# ---------------------------------------------------------------- what is computed

PROMPTS = ["exact", pytest.param("bf16", marks=needs_bf16_tiles)]


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_beside_float64_on_each_path(build, family, name, prompts, tmp_path):
    config, tokens = tiny_family.FAMILIES[name], tiny_family.tokens(name) * 2
    weights = peft.tensors(config, 5)
    adapter_made(build, family(name), tmp_path / "p", peft.adapter_config(5, 5), weights)
    wanted = peft.adapted(reference.Decoder(family(name) / "tiny.gguf"), weights, 1.0,
                          config).logits(tokens)
    plain = reference.Decoder(family(name) / "tiny.gguf").logits(tokens)
    runs = {engine(build, family(name), "logits", tokens=tokens,
                   **with_adapter(tmp_path / "p", CASEMATE_CPU=path, CASEMATE_THREADS=count,
                                  CASEMATE_PROMPTS=prompts))
            for path in available_paths() for count in "12"}
    assert len(runs) == 1
    found = numpy.frombuffer(runs.pop(), "<f4").reshape(wanted.shape)
    part, same = reference.compare(wanted, found)
    assert part / len(tokens) <= 0.002 and same / len(tokens) >= 0.85, (part / len(tokens), same)
    # An engine that forgets the adapter is nowhere near.
    assert reference.compare(plain, found)[0] / len(tokens) > 0.1


@pytest.mark.parametrize("module", peft.MODULES)
def test_each_target_by_itself(build, family, module, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    tokens = tiny_family.tokens("llama")
    weights = peft.tensors(config, 3, [module], layers=[1], size=3.0)
    adapter_made(build, base, tmp_path / "p",
                 peft.adapter_config(3, 6, [module], layers_to_transform=[1]), weights)
    wanted = peft.adapted(reference.Decoder(base / "tiny.gguf"), weights, 2.0, config).logits(tokens)
    plain = reference.Decoder(base / "tiny.gguf").logits(tokens)
    found = numpy.frombuffer(engine(build, base, "logits", tokens=tokens,
                                    **with_adapter(tmp_path / "p")), "<f4").reshape(wanted.shape)
    near, far = reference.compare(wanted, found)[0], reference.compare(plain, found)[0]
    assert near / len(tokens) <= 0.005 and far > 50 * near, (near, far)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_a_real_model_beside_float64(build, real, smollm_gguf, prompts, tmp_path, capsys):
    """576 and 1536 columns: several work items of A."""
    tokens = corpus.passages(smollm_gguf)[0][:192]
    weights = peft.tensors(peft.SMOLLM, 16, dtype=numpy.float32, size=0.15)
    adapter_made(build, real, tmp_path / "p", peft.adapter_config(16, 8, use_rslora=True), weights)
    wanted = peft.adapted(reference.Decoder(smollm_gguf), weights, 2.0, peft.SMOLLM).logits(tokens)
    plain = reference.Decoder(smollm_gguf).logits(tokens)
    runs = {engine(build, real, "logits", tokens=tokens,
                   **with_adapter(tmp_path / "p", CASEMATE_CPU=path, CASEMATE_THREADS=count,
                                  CASEMATE_PROMPTS=prompts))
            for path, count in ((p, c) for p in available_paths() for c in "12")}
    assert len(runs) == 1
    found = numpy.frombuffer(runs.pop(), "<f4").reshape(wanted.shape)
    part, same = reference.compare(wanted, found)
    away = reference.compare(plain, found)[0] / len(tokens)
    with capsys.disabled():
        print(f"\nadapter, prompts {prompts}: mean KL {part / len(tokens):.5f} of W + scale B A in float64, top-1 "
              f"{same / len(tokens):.2%}; {away:.3f} from the model without it")
    assert part / len(tokens) <= 0.005 and same / len(tokens) >= 0.95 and away > 0.1
    words = {engine(build, real, "greedy", 30, chunk, tokens=tokens[:40],
                    **with_adapter(tmp_path / "p", CASEMATE_PROMPTS=prompts)) for chunk in (1, 7, 40)}
    assert len(words) == 1
    assert words.pop() != engine(build, real, "greedy", 30, 40, tokens=tokens[:40])


# ---------------------------------------------------------------- what is sealed

@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_the_package_holds_the_files_values(build, family, name, tmp_path):
    base, config = family(name), tiny_family.FAMILIES[name]
    weights = peft.tensors(config, 17, ["k_proj", "q_proj", "down_proj"], layers=[0, 2])
    facts = adapter_made(build, base, tmp_path / "p",
                         peft.adapter_config(17, 34, ["q_proj", "model.layers.0.self_attn.k_proj",
                                                      "down_proj"]), weights)
    package = opened(tmp_path / "p")
    model = package_reader.Package((base / "m.cmpkg").read_bytes(), (base / "key").read_bytes())
    m = package.manifest
    assert m.name == "tuned" and m.base == model.core_digest == bytes.fromhex(facts["base"])
    assert (m.rank, m.scale, m.rounding) == (17, 2.0, 0.0) and facts["exact"]
    assert m.shape == {k: model.manifest.shape[k] for k in m.shape}
    assert [t["role"] for t in m.tensors] == [0, 1, 2, 3, 12, 13] * 2
    assert [t["layer"] for t in m.tensors] == [0] * 6 + [2] * 6
    size = tiny_family.head_width(name)
    for tensor in m.tensors:
        module = list(peft.MODULES)[tensor["role"] // 2]
        wanted = weights[f"base_model.model.model.layers.{tensor['layer']}.{peft.MODULES[module]}."
                         f"{module}.lora_{'AB'[tensor['role'] % 2]}.weight"]
        if tensor["role"] in (1, 3):
            wanted = peft.turned(wanted, size)
        assert (package.weights(tensor) == wanted).all(), tensor


def test_rounding_is_told(build, family, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    weights = peft.tensors(config, 4, dtype=numpy.float32)
    facts = adapter_made(build, base, tmp_path / "p", peft.adapter_config(4, 8.5), weights)
    values = numpy.concatenate([w.reshape(-1) for w in weights.values()]).astype(numpy.float64)
    error = values.astype(numpy.float16).astype(numpy.float64) - values
    wanted = numpy.sqrt((error ** 2).sum() / (values ** 2).sum())
    assert not facts["exact"] and abs(facts["relative_rms_error"] / wanted - 1) < 1e-5
    assert 0 < wanted < 3e-4 and facts["scale"] == 8.5 / 4
    words = ["inspect", tmp_path / "p" / "a.cmpkg", "--recovery", tmp_path / "p" / "a.r",
             "--passphrase-file", base / "pass"]
    text, told = pack(build, *words).stdout, json.loads(pack(build, *words, "--json").stdout)
    assert f"{wanted:.6f}" in text and "adapter tuned" in text and facts["base"] in text
    assert told["adapter"]["targets"] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert told["adapter"]["base"] == facts["base"] and "model" not in told
    sealed = pack(build, "inspect", tmp_path / "p" / "a.cmpkg").stdout
    assert "tuned" not in sealed.replace(str(tmp_path), "") and facts["base"] not in sealed


def test_the_base_by_its_digest_alone(build, family, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    weights = peft.tensors(config, 2, ["v_proj"])
    one = adapter_made(build, base, tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]), weights)
    payload = opened(tmp_path / "p").payload
    two = adapter_made(build, base, tmp_path / "q", peft.adapter_config(2, 2, target_modules="all-linear"), weights,
                       base=one["base"])
    assert two["base"] == one["base"] and opened(tmp_path / "q").payload == payload
    done = adapter_seal(build, base, tmp_path / "p", base=one["base"][:-1], out=tmp_path / "n")
    assert done.returncode != 0 and "64 hex digits" in done.stderr
    assert not (tmp_path / "n").exists()


def test_no_recovery_needed_and_every_suite(build, family, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    weights = peft.tensors(config, 2, ["v_proj"])
    adapter_made(build, base, tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]), weights,
                 suite="chacha20-poly1305", revision=7)
    package = opened(tmp_path / "p")
    assert package.suite == 2 and package.revision == 7


def test_a_model_is_no_adapter_and_an_adapter_no_model(build, family, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    weights = peft.tensors(config, 2, ["v_proj"])
    adapter_made(build, base, tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]), weights)
    shutil.copy(tmp_path / "p" / "a.cmpkg", tmp_path / "m.cmpkg")
    shutil.copy(tmp_path / "p" / "a.key", tmp_path / "key")
    for folder, more, why in (
            (tmp_path, {}, "holds an adapter"),
            (base, {"CASEMATE_ADAPTER": str(base / "m.cmpkg"),
                    "CASEMATE_ADAPTER_KEY": str(base / "key")}, "holds a model")):
        done = subprocess.run([build / "harness" / "engine", "logits", folder / "m.cmpkg",
                               folder / "key"], env=more, capture_output=True, text=True, timeout=60)
        assert done.returncode == 4 and why in done.stderr, done.stderr


def test_an_adapter_for_another_shape_is_refused_by_the_device(build, family, tmp_path):
    """Its base digest is the caller's to compare; the shape is the device's."""
    other, config = family("qwen3"), tiny_family.FAMILIES["qwen3"]
    adapter_made(build, other, tmp_path / "p", peft.adapter_config(2, 2), peft.tensors(config, 2))
    base = family("llama")
    done = subprocess.run([build / "harness" / "engine", "logits", base / "m.cmpkg", base / "key"],
                          env=with_adapter(tmp_path / "p"), capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 4 and "another shape" in done.stderr, done.stderr


# ---------------------------------------------------------------- refusals

REFUSED = {
    "bias": ("all", "bias"), "lora_bias": (True, "lora_bias"), "use_dora": (True, "DoRA"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "rank_pattern": ({"q_proj": 4}, "rank_pattern"),
    "alpha_pattern": ({"q_proj": 4}, "alpha_pattern"),
    "fan_in_fan_out": (True, "fan_in_fan_out"),
    "layer_replication": ([[0, 3], [1, 3]], "layer_replication"),
    "trainable_token_indices": ([1], "trainable_token_indices"),
    "target_parameters": (["x"], "target_parameters"), "use_qalora": (True, "use_qalora"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens"),
    "arrow_config": ({"top_k": 3}, "arrow_config"), "a_key_of_tomorrow": (1, "a_key_of_tomorrow"),
    "init_lora_weights": ("pissa_niter_4", "PiSSA"), "peft_type": ("LOHA", "peft_type"),
    "task_type": ("SEQ_CLS", "task_type"), "r": (65, "from 1 to 64"), "lora_alpha": (0, "lora_alpha"),
    "use_rslora": (1, "use_rslora"), "target_modules": (["v_proj", "lm_head"], "'lm_head'"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_configuration_must_not_say(build, family, key, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    weights = peft.tensors(config, 2, ["v_proj"])
    value, why = REFUSED[key]
    folder = peft.write(tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]) | {key: value}, weights)
    done = adapter_seal(build, base, folder)
    assert done.returncode == 4 and why in done.stderr and "CM-PEFT-CONFIG" in done.stderr
    assert not (folder / "a.cmpkg").exists()


@pytest.mark.parametrize("value", [False, "gaussian", "eva", "orthogonal", None])
def test_harmless_starts_are_taken(build, family, value, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    adapter_made(build, base, tmp_path / "p",
                 peft.adapter_config(2, 2, ["v_proj"], init_lora_weights=value),
                 peft.tensors(config, 2, ["v_proj"]))


STEM = "base_model.model.model.layers.1.self_attn.v_proj."


def half_missing(weights):
    del weights[STEM + "lora_B.weight"]


def planted(value):
    def change(weights):
        weights[STEM + "lora_B.weight"] = weights[STEM + "lora_B.weight"].astype(numpy.float32)
        weights[STEM + "lora_B.weight"][5, 1] = value
    return change


def renamed(name):
    def change(weights):
        weights[name] = weights.pop(STEM + "lora_A.weight")
    return change


def reshaped(weights):
    weights[STEM + "lora_B.weight"] = weights[STEM + "lora_B.weight"][:-1].copy()


TENSORS = {
    "half": (half_missing, "no other half"), "nan": (planted(numpy.nan), "row 5, column 1"),
    "infinite": (planted(numpy.inf), "row 5, column 1"), "huge": (planted(70000), "65504"),
    "shape": (reshaped, STEM + "lora_B"), "rank": (lambda w: w.update(
        {STEM + "lora_A.weight": numpy.zeros((3, 96), numpy.float16)}), STEM + "lora_A"),
    "layer": (renamed(STEM.replace(".1.", ".3.") + "lora_A.weight"), "layers.3."),
    "dora": (renamed(STEM + "lora_magnitude_vector"), "lora_magnitude_vector"),
    "embedding": (renamed("base_model.model.model.embed_tokens.lora_embedding_A"), "lora_embedding_A"),
    "head": (renamed("base_model.model.lm_head.lora_A.weight"), "lm_head"),
    "fused": (renamed(STEM.replace("v_proj", "qkv_proj") + "lora_A.weight"), "qkv_proj"),
    "unlisted": (lambda w: w.update({k.replace("v_proj", "o_proj"): v for k, v in peft.tensors(
        tiny_family.FAMILIES["llama"], 2, ["o_proj"]).items()}), "lacks self_attn.o_proj"),
    "none": (lambda w: w.clear(), "no tensors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_belong(build, family, case, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    weights = peft.tensors(config, 2, ["v_proj"])
    change, why = TENSORS[case]
    change(weights)
    folder = peft.write(tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]), weights)
    done = adapter_seal(build, base, folder)
    assert done.returncode == 4 and why in done.stderr, done.stderr
    assert not (folder / "a.cmpkg").exists()


def test_modules_that_have_no_tensors(build, family, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    folder = peft.write(tmp_path / "p", peft.adapter_config(2, 2, ["v_proj", "q_proj"]),
                        peft.tensors(config, 2, ["v_proj"]))
    done = adapter_seal(build, base, folder)
    assert done.returncode == 4 and "has self_attn.q_proj" in done.stderr, done.stderr


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_not_there(build, family, missing, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    folder = peft.write(tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]),
                        peft.tensors(config, 2, ["v_proj"]))
    (folder / missing).unlink()
    done = adapter_seal(build, base, folder)
    assert done.returncode != 0 and missing in done.stderr


def test_a_name_that_no_client_could_send(build, family, tmp_path):
    base, config = family("llama"), tiny_family.FAMILIES["llama"]
    folder = peft.write(tmp_path / "p", peft.adapter_config(2, 2, ["v_proj"]),
                        peft.tensors(config, 2, ["v_proj"]))
    done = adapter_seal(build, base, folder, name="a b")
    assert done.returncode == 4 and "A-Za-z0-9" in done.stderr
