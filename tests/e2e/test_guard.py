"""The output guard through every process, with a model that really says the secret: a control without
rules says it too."""
import json
import random
import re
import string
import subprocess
import sys
import time

import pathlib
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
sys.path.insert(0, str(TESTS / "guard"))
import node as nodes  # noqa: E402
import tokens  # noqa: E402

MODEL = "smollm2-135m-instruct"


def access_key() -> str:
    return "AKIA" + "".join(random.SystemRandom().choices(string.ascii_uppercase + "234567", k=16))


def prompt_of(secret: str) -> str:
    """A text that only goes on in one way."""
    return f"export AWS_ACCESS_KEY_ID={secret}\n" * 5 + "export AWS_ACCESS_KEY_ID="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guard")


def node_make(build, folder, name, gguf, *lines) -> nodes.Node:
    node = nodes.Node(build / "bin", folder / name, folder / "owner")
    node.make(gguf, MODEL)
    if lines:
        yaml = node.state / "casemate.yaml"
        yaml.write_text(yaml.read_text().replace("site:", "".join(f"  {line}\n" for line in lines) + "site:"))
        node.sign()
    node.start("--kv_bytes", str(64 << 20), "--sequences_max", "2", "--context_max", "1024")
    node.api_key = node.key("test")
    time.sleep(0.6)
    return node


@pytest.fixture(scope="module")
def guarded(build, folder, smollm_gguf):
    node = node_make(build, folder, "guarded", smollm_gguf)
    yield node
    assert node.stop() == 0


def ask(node, prompt, **options):
    return node.client(node.api_key).completions.create(
        model=MODEL, prompt=prompt, temperature=0, **{"max_tokens": 40, "stop": ["\n"], **options})


@pytest.fixture(scope="module")
def unguarded(build, folder, smollm_gguf):
    """The control: the same model, the same prompts, no rules."""
    node = node_make(build, folder, "open", smollm_gguf, "guard: 'off'")
    yield node
    assert node.stop() == 0


@pytest.fixture()
def secret(unguarded) -> str:
    """A fresh one that the model alone does say, wherever it is asked to go on: it misspells some."""
    for _ in range(10):
        key = access_key()
        if all(key[known:] in ask(unguarded, prompt_of(key) + key[:known]).choices[0].text
               for known in (0, 4, 8, 12)):
            return key
    raise AssertionError("the model repeats none of ten keys")


def test_a_secret_that_the_model_says_is_redacted(guarded, secret):
    reply = ask(guarded, prompt_of(secret)).choices[0]
    assert secret not in reply.text and "[key removed]" in reply.text
    pieces = [c.choices[0].text for c in ask(guarded, prompt_of(secret), stream=True) if c.choices]
    assert "".join(pieces) == reply.text


def test_a_reply_that_is_cut_in_a_secret_keeps_its_beginning_back(guarded, secret):
    seen = set()
    for tokens in range(1, 14):
        reply = ask(guarded, prompt_of(secret), max_tokens=tokens).choices[0]
        seen.add(reply.text)
        for size in range(5, len(secret) + 1):
            assert secret[:size] not in reply.text, f"{tokens} tokens release {size} bytes"
    assert len(seen) <= 4, seen


def test_a_secret_whose_beginning_stands_in_the_prompt_does_not_leave(guarded, secret):
    """A text is gone on from as it stands: who knows how keys begin must not get the rest."""
    for known in (4, 8, 12):
        reply = ask(guarded, prompt_of(secret) + secret[:known]).choices[0]
        assert secret[known:known + 6] not in reply.text, f"{known} known: {reply.text}"
        assert "[key removed]" in reply.text, "the rest is replaced"


def test_the_rules_are_measured(build, guarded):
    events = json.loads(guarded.run("casemate", "measure", "--state", guarded.state, "--json").stdout)
    rules = [e for e in events["events"] if e["type"] == "rules"]
    assert len(rules) == 1 and [f["name"] for f in rules[0]["files"]] == ["rules"]


def test_own_rules_refuse_and_other_rules_are_another_state(build, folder, smollm_gguf):
    rules = folder / "own.yaml"
    text = ("built_in: false\nrules:\n  - id: no-foxes\n    class: output\n    category: animals\n"
            "    pattern: '(?i)foxtrot'\n    action: refuse\n    positive: [foxtrot]\n"
            "    negative: [fox]\n")
    rules.write_text(text)
    node = node_make(build, folder, "own", smollm_gguf, f"guard_rules: {rules}")
    try:
        reply = ask(node, "alpha bravo charlie delta echo foxtrot golf\n" * 5 + "alpha bravo",
                    stop=None).choices[0]
        assert reply.finish_reason == "content_filter"
        assert "echo" in reply.text and "fox" not in reply.text.lower()
    finally:
        assert node.stop() == 0
    rules.write_text(text.replace("foxtrot'", "foxtrots?'"))
    node.start(wait=False)
    assert node.service.wait(30) == 5, node.tail()  # the TPM keeps its key
    rules.write_text(text.replace("foxtrot'", "fox(?=trot)'"))
    node.start(wait=False)
    assert node.service.wait(30) == 3, node.tail()
    assert "CM-RULES-PATTERN" in node.tail()


def test_samples_cut_at_the_borders_of_real_tokens(build, smollm_gguf):
    # 50 segmentations of each text; `./run guard` tries 1,000.
    done = subprocess.run([build / "harness" / "guard", "tokens", "50", "7"], input=tokens.lines(smollm_gguf),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    runs, texts = (int(n) for n in re.search(r"tokens: (\d+) runs over (\d+) texts", done.stdout).groups())
    assert texts > 500 and runs == 50 * texts
