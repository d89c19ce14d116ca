"""Adapters (LoRA) on a whole node: chosen by name, loaded and unloaded while it serves, and what is refused."""
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import struct
import sys
import time

import openai
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "e2e")]
import evidence_reader  # noqa: E402
import node as nodes  # noqa: E402
import package_reader  # noqa: E402
import peft  # noqa: E402
import tiny_adapter  # noqa: E402
import tiny_model  # noqa: E402
from test_memory_scan import memory_contains  # noqa: E402

PROMPT = "the tale of an inn " * 6  # some pages of tokens


class Adapted(nodes.Node):
    """A node that loads adapters."""

    def begin(self, folder, mode="restartable", most=3, size=1 << 20, model=None):
        if model is None:
            tiny_model.write(str(folder / "tiny.gguf"))
        self.run("casemate-pack", "keygen", "--owner", self.owner)
        self.run("casemate", "init", "--state", self.state, "--owner-key", self.owner / "owner.pub", "--policy-key",
                 self.owner / "policy.pub", "--package", self.package, "--node-name", "node-1", "--tpm",
                 "development", "--attest-mode", mode)
        tiny_adapter.allow(self, self.owner, most=most, size=size)
        self.make(model or folder / "tiny.gguf", "tiny")
        self.api_key = self.key("test", "--adapters", "all")
        self.folder = folder / "adapters"

    def seal(self, name, seed, *words, **options):
        return tiny_adapter.pack(self, self.folder, name, seed, *words, **options)

    def add(self, path, *words):
        self.run("casemate", "adapter", "add", path, "--state", self.state, *words)

    def remove(self, name):
        self.run("casemate", "adapter", "remove", name, "--state", self.state)

    def adapters(self):
        told = self.run("casemate", "adapter", "list", "--json", "--state", self.state).stdout
        return {row["name"]: row for row in json.loads(told)}

    def until(self, name, *states, seconds=15):
        def row():
            found = self.adapters().get(name)
            return found if found is not None and found["state"] in states else None
        return nodes.wait(row, seconds, lambda: (self.adapters(), self.tail()))

    def in_flight(self, count):
        line = f"casemate_requests_in_flight {count}\n"
        nodes.wait(lambda: line in self.get("/metrics", self.api_key)[1], 8, self.tail)

    def ask(self, model, text=PROMPT, tokens=16, **more):
        return self.client(self.api_key).chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], max_tokens=tokens, temperature=0,
            extra_body={"ignore_eos": True}, **more)

    def says(self, model, text=PROMPT, tokens=16):
        return self.ask(model, text, tokens).choices[0].message.content

    def logged(self, event, **fields):
        lines = [json.loads(x) for x in self.log.read_text().splitlines() if x.startswith("{")]
        return [x for x in lines if x["event"] == event and all(x.get(k) == v for k, v in fields.items())]

    def well(self):
        """The model alone answers, nobody died, and no key page was left as it was."""
        assert self.says("tiny") and not self.logged("role_restarts") and not self.logged("key_page_not_wiped")


@pytest.fixture
def empty(build, tmp_path):
    """A node without a package yet; whatever the test does, its service ends with it."""
    made = Adapted(build / "bin", tmp_path / "node", tmp_path / "owner")
    yield made
    if made.service is not None and made.service.poll() is None:
        made.stop()


@pytest.fixture
def node(empty, tmp_path):
    empty.begin(tmp_path)
    return empty


def refused(call):
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def test_adapters_come_and_go_while_the_node_serves(node):
    red, blue = node.seal("red", 1), node.seal("blue", 2)
    node.start()
    plain = node.says("tiny")
    error = refused(lambda: node.says("red"))
    assert error.status_code == 404 and error.code == "model_not_found" and "red" in error.message
    node.add(red)
    node.until("red", "serving")
    reply = node.ask("red")
    assert reply.model == "red" and reply.choices[0].message.content != plain
    node.add(blue)
    node.until("blue", "serving")
    told = {"tiny": plain, "red": node.says("red"), "blue": node.says("blue")}
    assert told["red"] == reply.choices[0].message.content and len(set(told.values())) == 3
    models = json.loads(node.get("/v1/models", node.api_key)[1])["data"]
    assert {m["id"]: m["parent"] for m in models} == {"tiny": None, "red": "tiny", "blue": "tiny"}
    assert json.loads(node.get("/v1/models/blue", node.api_key)[1])["parent"] == "tiny"
    # All three in one batch, many times over, each as alone.
    names = list(told) * 6
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(node.says, names)) == [told[name] for name in names]
    status = node.run("casemate", "status", "--state", node.state).stdout
    assert "adapters: 2 of 3: blue serving, red serving" in status or "red serving, blue serving" in status
    assert "not yet: adapters" not in status
    assert "max_lora=\"3\"" in node.get("/metrics", node.api_key)[1]
    node.remove("red")
    nodes.wait(lambda: node.logged("adapter_wiped"), 10, node.tail)
    assert refused(lambda: node.says("red")).status_code == 404
    assert node.get("/v1/models/red", node.api_key)[0] == 404
    assert node.says("blue") == told["blue"] and node.says("tiny") == plain
    node.well()
    # A node that has known nothing else says the same, from its start on.
    node.stop()
    node.remove("blue")
    node.add(red)
    node.start()
    node.until("red", "serving")
    assert node.says("red") == told["red"] and node.says("tiny") == plain


def test_an_adapter_whose_numbers_overflow_fails_alone(node):
    """Each of its values is finite; what they make of a sequence is not. Nobody beside it loses a token."""
    for path in (node.seal("red", 1), node.seal("hot", 2, alpha=3e38)):
        node.add(path)
    node.start()
    for name in ("red", "hot"):
        node.until(name, "serving")
    told = {name: node.says(name) for name in ("tiny", "red")}

    def answer(name):
        if name == "hot":
            error = refused(lambda: node.says(name))
            return error.status_code, error.code
        return node.says(name)
    names = ["tiny", "hot", "red"] * 6
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(answer, names))
    assert replies == [told.get(name, (500, "worker_failed")) for name in names]
    node.in_flight(0)
    node.well()


def test_a_key_uses_the_adapters_that_it_is_granted(node):
    """To others an adapter is as one that does not exist; what is changed holds within a second."""
    node.add(node.seal("red", 1))
    node.add(node.seal("blue", 2))
    node.start()
    for name in ("red", "blue"):
        node.until(name, "serving")
    told = {name: node.says(name) for name in ("tiny", "red", "blue")}
    keys = {name: node.key(name, *words) for name, words in
            {"nothing": (), "one": ("--adapters", "red"), "two": ("--adapters", "blue,red")}.items()}
    may = {"nothing": {"tiny"}, "one": {"tiny", "red"}, "two": {"tiny", "red", "blue"}}

    def used(key):
        """Names that answer, that are listed, and that are shown alone: one set, or it is told."""
        node.api_key, answered = key, set()
        for name in told:
            try:
                assert node.says(name) == told[name]
                answered.add(name)
            except openai.APIStatusError as error:
                assert error.status_code == 404 and error.code == "model_not_found"
        listed = {m["id"] for m in json.loads(node.get("/v1/models", key)[1])["data"]}
        shown = {name for name in told if node.get(f"/v1/models/{name}", key)[0] == 200}
        return answered if answered == listed == shown else (answered, listed, shown)

    def they_use(wanted):
        def what():
            return {name: used(key) for name, key in keys.items()}
        nodes.wait(lambda: what() == wanted, 3, what)
    nodes.wait(lambda: all(node.get("/v1/models", key)[0] == 200 for key in keys.values()), 3)
    they_use(may)
    node.run("casemate", "keys", "grant", keys["one"][3:19], "--adapters", "blue", "--state", node.state)
    node.run("casemate", "keys", "grant", keys["two"][3:19], "--adapters", "none", "--state", node.state)
    they_use({"nothing": {"tiny"}, "one": {"tiny", "blue"}, "two": {"tiny"}})
    node.stop()
    node.start("--adapter_access", "all")
    for name in ("red", "blue"):
        node.until(name, "serving")
    assert used(keys["nothing"]) == set(told)
    node.stop()


def trust_file(node, path, *lines):
    path.write_text(node.run("casemate-pack", "trust", node.package, "--node", node.state / "enrolment.bin",
                             "--measurement", node.state / "node.measure", "--allow-development").stdout +
                    "".join(line + "\n" for line in lines))
    return path


def test_evidence_names_the_adapters_and_a_verifier_judges_them(node, tmp_path):
    """Each of them by digest, owner and adding; asked for anew on this connection, and in the service's own."""
    (tmp_path / "tenant").mkdir()
    node.run("casemate-pack", "keygen", "--owner", tmp_path / "tenant")
    tiny_adapter.allow(node, node.owner, tmp_path / "tenant")
    node.sign()
    files = {"red": node.seal("red", 1), "blue": node.seal("blue", 2, owner=tmp_path / "tenant")}
    facts = {name: json.loads(node.run("casemate-pack", "inspect", path, "--json").stdout) for name, path in files.items()}
    owners = {name: facts[name]["owner_key"] for name in facts}
    digests = {name: facts[name]["core_digest"] for name in facts}
    assert owners["red"] != owners["blue"]
    node.start()

    def verify(*lines):
        trust = trust_file(node, tmp_path / "trust", *lines)
        done = node.run("casemate-verify", f"https://{node.address}", "--trust", trust, "--json", check=False)
        told = json.loads(done.stdout)
        return told["id"], [(a["name"], a["core_digest"], a["owner"]) for a in told["adapters"]]

    def own():
        blob = (node.state / "run" / "evidence.bin").read_bytes()
        return sorted(adapter["name"] for adapter in evidence_reader.Evidence(blob).adapters)

    def own_until(*names):
        nodes.wait(lambda: own() == sorted(names), 5, own)
    assert verify() == ("", []) and verify("adapter none") == ("", []) and own() == []
    for name, path in files.items():
        node.add(path)
        node.until(name, "serving")
    shown = [(name, digests[name], owners[name]) for name in files]
    assert verify() == ("", shown)
    own_until("red", "blue")
    text = node.run("casemate-verify", f"https://{node.address}", "--trust", tmp_path / "trust").stdout
    assert f"with adapter blue: package {digests['blue'][:8]}…, owner {owners['blue'][2:10]}…" in text
    both = ["adapter-owner " + owners["red"], "adapter " + digests["blue"]]
    assert verify(*both) == ("", shown)
    for lines in (["adapter none"], both[:1], both[1:], ["adapter " + "0" * 64], ["adapter-owner 04" + "0" * 128]):
        assert verify(*lines)[0] == "CM-EVD-ADAPTER", lines
    # A new keeper knows them before it answers anybody, and has the gateway's TLS key; so has a new gateway.
    pid = node.pid("keeper")
    os.kill(pid, signal.SIGKILL)
    told = nodes.wait(lambda: node.run("casemate-verify", f"https://{node.address}", "--trust", tmp_path / "trust",
                                       "--json", check=False).stdout, 20)
    assert json.loads(told)["id"] == "CM-EVD-ADAPTER", "the trust file names another; else all is well"
    assert [a["name"] for a in json.loads(told)["adapters"]] == list(files)
    assert node.pid("keeper") not in (0, pid)
    pid = node.pid("gateway")
    os.kill(pid, signal.SIGKILL)
    nodes.wait(lambda: node.pid("gateway") not in (0, pid) and node.status()["ready"], 20, node.tail)
    node.address = node.status()["listen"]
    assert verify() == ("", shown)
    node.remove("red")
    nodes.wait(lambda: verify("adapter " + digests["blue"]) == ("", shown[1:]), 5, verify)
    own_until("blue")
    assert node.says("tiny") and not node.logged("key_page_not_wiped")


def test_a_keeper_that_cannot_name_an_adapter_any_more_ends_it(node):
    """Its file went away, the keeper too: nothing would say that it is there, so it goes."""
    node.add(node.seal("red", 1))
    node.start()
    node.until("red", "serving")
    node.says("red")
    (node.state / "adapters" / "red.cmpkg").unlink()
    pid = node.pid("keeper")
    os.kill(pid, signal.SIGKILL)
    assert node.until("red", "refused", seconds=20)["id"] == "CM-PKG-OPEN"
    assert node.logged("adapter_wiped")
    node.ready()
    assert refused(lambda: node.says("red")).code == "model_refused" and node.says("tiny")


def test_what_has_begun_is_finished_before_an_adapter_goes(node):
    """Thirty long requests, one at a time, and the adapter is taken back behind the first."""
    node.add(node.seal("red", 1))
    node.start("--sequences_max", "1", "--threads", "1")
    node.until("red", "serving")
    whole = node.says("red", tokens=380)
    os.kill(node.pid("worker"), signal.SIGSTOP)  # until all of them have been sent
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        running = [pool.submit(node.says, "red", PROMPT, 380) for _ in range(30)]
        node.in_flight(30)
        os.kill(node.pid("worker"), signal.SIGCONT)
        next(concurrent.futures.as_completed(running))
        (node.state / "adapters.table").unlink()
        nodes.wait(lambda: node.logged("adapter", state="unloading"), 5, node.tail)
        error = refused(lambda: node.says("red", tokens=1))
        assert error.status_code == 409 and error.code == "model_unloading", "too soon over to be seen"
        assert not node.logged("adapter_wiped")
        assert [future.result() for future in running] == [whole] * 30
    nodes.wait(lambda: node.logged("adapter_wiped"), 5, node.tail)
    assert refused(lambda: node.says("red")).status_code == 404
    node.well()


def test_a_request_that_crosses_with_the_unloading_is_refused(node):
    """The gateway has sent it, and the worker hears of the unloading first."""
    node.add(node.seal("red", 1))
    node.start()
    node.until("red", "serving")
    os.kill(node.pid("worker"), signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        crossing = pool.submit(refused, lambda: node.says("red"))
        node.in_flight(1)
        node.remove("red")
        nodes.wait(lambda: node.logged("adapter", state="unloading"), 5, node.tail)
        os.kill(node.pid("worker"), signal.SIGCONT)
        error = crossing.result()
    assert error.status_code == 409 and error.code == "model_unloading"
    node.well()


def test_no_byte_of_an_adapter_outlives_it(node, tmp_path):
    """Weights in the worker alone, the key in the keeper alone; after it is removed, nowhere."""
    (tmp_path / "pass").write_text("correct horse battery")
    red = node.seal("red", 1, "--recovery", tmp_path / "recovery", "--passphrase-file", tmp_path / "pass")
    key = package_reader.recovery_key((tmp_path / "recovery").read_bytes(), "correct horse battery")
    payload = package_reader.Package(red.read_bytes(), key).payload
    needles = {f"block {at}": payload[at:at + 48] for at in (4096, len(payload) // 2, len(payload) - 4096)}
    assert all(len(set(needle)) > 8 for needle in needles.values())
    needles["key"] = key
    node.start()
    node.add(red)
    node.until("red", "serving")
    node.says("red")

    def found():
        return {role: memory_contains(node.pid(role), needles)[0]
                for role in ("worker", "keeper", "supervisor", "gateway", "devtpm")}
    nobody = {"supervisor": set(), "gateway": set(), "devtpm": set()}
    assert found() == nobody | {"worker": set(needles) - {"key"}, "keeper": {"key"}}
    node.remove("red")
    nodes.wait(lambda: not node.status()["adapters"])
    gone = nobody | {"worker": set(), "keeper": set()}
    nodes.wait(lambda: found() == gone, 5, found)
    files = [p for p in node.state.rglob("*") if p.is_file()]
    assert not [p for p in files if any(needle in p.read_bytes() for needle in needles.values())]


def test_prefixes_are_kept_apart(node):
    """What red has computed of a prompt is not what blue or the model would have."""
    node.add(node.seal("red", 1))
    node.add(node.seal("blue", 2))
    node.start("--prefix_cache", "false")
    for name in ("red", "blue"):
        node.until(name, "serving")
    alone = {name: node.says(name) for name in ("tiny", "red", "blue")}
    node.stop()
    node.start()
    for name in ("red", "blue"):
        node.until(name, "serving")
    for name in ("tiny", "red", "blue"):
        for cached in (False, True):
            reply = node.ask(name)
            assert reply.choices[0].message.content == alone[name]
            assert (reply.usage.prompt_tokens_details.cached_tokens > 0) == cached, name
    # The same adapter, loaded anew, is another one.
    node.remove("red")
    nodes.wait(lambda: "red" not in [m["id"] for m in json.loads(node.get("/v1/models", node.api_key)[1])["data"]])
    node.add(node.folder / "red.cmpkg")
    node.until("red", "serving")
    assert node.ask("red").usage.prompt_tokens_details.cached_tokens == 0


def test_adapters_come_back_with_a_new_worker_and_a_new_keeper(node):
    for name, seed in (("red", 1), ("blue", 2)):
        node.add(node.seal(name, seed))
    node.start()
    for name in ("red", "blue"):
        node.until(name, "serving")
    told = {name: node.says(name) for name in ("tiny", "red", "blue")}
    for role in ("worker", "keeper", "worker", "gateway"):
        pid = node.pid(role)
        os.kill(pid, signal.SIGKILL)
        nodes.wait(lambda: node.pid(role) not in (0, pid) and node.status()["ready"], 20, node.tail)
        node.address = node.status()["listen"]
        for name in ("red", "blue"):
            node.until(name, "serving")
        assert {name: node.says(name) for name in told} == told, role
    assert not node.logged("key_page_not_wiped")


def test_an_adapter_of_many_chunks(empty, tmp_path, smollm_gguf):
    """A real model's, while others are answered; the last byte counts as the first does."""
    node = empty
    node.begin(tmp_path, size=16 << 20, model=smollm_gguf)
    large = node.seal("large", 1, rank=8, config=peft.SMOLLM)
    red = node.seal("red", 2, config=peft.SMOLLM)
    data = large.read_bytes()
    assert len(data) > 4 << 20 and len(data) % (1 << 18) != 0
    node.add(red)
    node.start()
    node.until("red", "serving")
    told = {name: node.says(name) for name in ("tiny", "red")}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(node.says, name) for name in list(told) * 8]
        node.add(large)
        node.until("large", "serving")
        assert [future.result() for future in running] == list(told.values()) * 8
    said = node.says("large")
    assert said not in told.values()
    assert node.logged("adapter_loaded", adapter="large")[0]["bytes"] > 4 << 20
    node.remove("large")
    for at in (len(data) - 1, len(data) - (1 << 20), len(data) - (2 << 20)):
        changed = bytearray(data)
        changed[at] ^= 1
        path = node.folder / "bad" / "large.cmpkg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(changed)
        shutil.copy(f"{large}.policy", f"{path}.policy")
        node.add(path)
        row = node.until("large", "refused")
        assert row["id"] == "CM-PKG-HASH" and "segment" in row["text"]
        assert {name: node.says(name) for name in told} == told
        node.remove("large")
    node.add(large)
    node.until("large", "serving")
    assert node.says("large") == said
    node.well()


def test_as_many_as_there_may_be_load_and_come_back(build, tmp_path):
    """Eight keys through one page, and once more with a new worker: no rate limit is in the way of that."""
    node = Adapted(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.begin(tmp_path, most=8)
    told = node.run("casemate", "check", "--state", node.state).stdout
    assert "adapter owners" in told
    for i in range(8):
        node.add(node.seal(f"a{i}", i))
    node.start()
    for round in range(2):
        for i in range(8):
            node.until(f"a{i}", "serving")
        said = [node.says(f"a{i}") for i in range(8)]
        assert len(set(said)) == 8 and (round == 0 or said == before)
        before, pid = said, node.pid("worker")
        if round == 0:
            os.kill(pid, signal.SIGKILL)
            node.ready(pid_not=pid)
    assert node.stop() == 0


def test_an_adapter_for_another_base_is_refused_and_both_are_named(node):
    other = "ab" * 32
    node.add(node.seal("red", 1))
    odd = node.folder / "odd.cmpkg"
    tiny_adapter.pack(node, node.folder, "odd", 2, base=other)
    # Its state is of that other base, so the TPM alone would refuse: let it be signed for this one.
    node.run("casemate-pack", "policy-sign", odd, "--owner", node.owner, "--node", node.state / "enrolment.bin",
             "--measurement", node.state / "node.measure", "--base", node.package)
    node.add(odd)
    node.start()
    row = node.until("odd", "refused")
    own = json.loads(node.run("casemate-pack", "inspect", node.package, "--json").stdout)["core_digest"]
    assert row["id"] == "CM-WRK-BASE" and other in row["text"] and own in row["text"]
    error = refused(lambda: node.says("odd"))
    assert error.status_code == 409 and error.code == "model_refused" and "CM-WRK-BASE" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    node.until("red", "serving")
    assert node.says("red")
    node.well()


def by_hand(node, name, path):
    """As an operator might who does not ask `casemate adapter`."""
    folder = node.state / "adapters"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / f"{name}.cmpkg")
    shutil.copy(f"{path}.policy", folder / f"{name}.cmpkg.policy")
    serial = time.time_ns()
    (node.state / "adapters.partial").write_bytes(
        b"CMADAP1\0" + struct.pack("<Q", serial) + struct.pack("<Q64s", serial, name.encode()))
    (node.state / "adapters.partial").rename(node.state / "adapters.table")


def test_an_adapter_of_an_owner_whom_nobody_accepted_is_refused(node, tmp_path):
    stranger = tmp_path / "stranger"
    node.run("casemate-pack", "keygen", "--owner", stranger)
    path = node.seal("red", 1, owner=stranger)
    told = node.run("casemate", "adapter", "add", path, "--state", node.state, check=False)
    assert told.returncode == 5 and "CM-PKG-OWNER" in told.stderr and "adapter_owners" in told.stderr
    node.start()
    by_hand(node, "red", path)
    assert node.until("red", "refused")["id"] == "CM-PKG-OWNER"
    assert not node.logged("adapter_unsealed")
    node.well()
    # The base's owner accepts him: that is another state, which he signs.
    node.stop()
    tiny_adapter.allow(node, node.owner, stranger)
    node.sign()
    node.add(node.seal("green", 3, owner=stranger))
    node.start()
    node.until("green", "serving")
    assert node.says("green") != node.says("tiny")


PARTS = {"core": lambda h: 4096 + 300, "signature": lambda h: 4096 + 260, "slots": lambda h: 8192 + 300,
         "manifest": lambda h: h["manifest"] + 5, "table": lambda h: h["table"] + 20,
         "payload": lambda h: h["payload"] + 4097, "last": lambda h: h["end"] - 1}


def test_a_changed_byte_anywhere_is_refused_and_nothing_is_loaded(node):
    good = node.seal("red", 1)
    data = good.read_bytes()
    manifest, _, table, _, payload = struct.unpack_from("<5Q", data, 4096 + 72)
    places = {"manifest": manifest, "table": table, "payload": payload, "end": len(data)}
    node.start()
    plain = node.says("tiny")
    for part, place in PARTS.items():
        changed = bytearray(data)
        at = place(places)
        changed[at] ^= 1
        if part == "slots":  # both copies: one alone is mended by the other
            changed[at + 32768] ^= 1
        path = node.folder / "changed.cmpkg"
        path.write_bytes(changed)
        shutil.copy(f"{good}.policy", f"{path}.policy")
        by_hand(node, "red", path)
        row = node.until("red", "refused")
        assert row["id"].startswith(("CM-PKG-", "CM-SEAL-")), (part, row)
        assert refused(lambda: node.says("red")).status_code == 409
        assert node.says("tiny") == plain
        (node.state / "adapters.table").unlink()
        nodes.wait(lambda: not node.status()["adapters"])
    assert not node.logged("adapter_loaded")
    for cut in (100, 73728, len(data) - 1):
        path.write_bytes(data[:cut])
        by_hand(node, "red", path)
        assert node.until("red", "refused")["id"].startswith("CM-PKG-"), cut
    node.well()
    by_hand(node, "red", good)
    node.until("red", "serving")
    assert node.says("red") != plain


def test_names_kinds_and_states_that_do_not_fit_are_refused(node):
    red = node.seal("red", 1)
    node.start()
    node.add(red, "--name", "crimson")
    row = node.until("crimson", "refused")
    assert row["id"] == "CM-WRK-NAME" and "red" in row["text"]
    node.remove("crimson")
    by_hand(node, "model", node.package)
    assert node.until("model", "refused")["id"] == "CM-WRK-KIND"
    # A policy list of another state: signed, and not this one.
    (node.state / "adapters.table").unlink()
    log = (node.state / "node.measure").read_bytes()
    node.stop()
    tiny_adapter.allow(node, node.owner, most=2)
    blue = node.seal("blue", 2)
    tiny_adapter.allow(node, node.owner, most=3)
    (node.state / "node.measure").write_bytes(log)
    node.start()
    node.add(blue)
    assert node.until("blue", "refused")["id"] == "CM-SEAL-PCR"
    (node.state / "adapters" / "blue.cmpkg.policy").unlink()
    node.remove("blue")
    shutil.copy(red, node.folder / "bare.cmpkg")
    told = node.run("casemate", "adapter", "add", node.folder / "bare.cmpkg", "--state", node.state, check=False)
    assert told.returncode == 5 and "CM-SEAL-POLICY" in told.stderr
    for i in range(3):
        shutil.copy(red, node.folder / f"n{i}.cmpkg")
        shutil.copy(f"{red}.policy", node.folder / f"n{i}.cmpkg.policy")
        node.add(node.folder / f"n{i}.cmpkg")
    told = node.run("casemate", "adapter", "add", red, "--state", node.state, check=False)
    assert told.returncode == 3 and "adapters_max is 3" in told.stderr
    node.well()


def test_a_stepped_counter_ends_an_adapters_older_states(node):
    red, blue = node.seal("red", 1), node.seal("blue", 2)
    node.run("casemate-pack", "policy-revoke", node.package, "--owner", node.owner, "--node",
             node.state / "enrolment.bin", "--measurement", node.measure())
    node.run("casemate-pack", "policy-revoke", blue, "--owner", node.owner, "--node", node.state / "enrolment.bin",
             "--measurement", node.measure(), "--base", node.package)
    node.run("casemate", "revoke", "--state", node.state)
    node.add(red)
    node.add(blue)
    node.start()
    assert node.until("red", "refused")["id"] == "CM-SEAL-COUNTER"
    node.until("blue", "serving")
    node.well()


def test_strict_mode_loads_what_was_there_at_the_start_and_nothing_later(build, tmp_path):
    node = Adapted(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.begin(tmp_path, mode="strict")
    red, blue = node.seal("red", 1), node.seal("blue", 2)
    node.add(red)
    node.start()
    node.until("red", "serving")
    told = node.says("red")
    node.add(blue)
    row = node.until("blue", "refused")
    assert row["id"] == "CM-SEAL-CAPPED" and "next start" in row["text"]
    pid = node.pid("worker")
    os.kill(pid, signal.SIGKILL)
    node.ready(pid_not=pid)
    node.until("red", "serving")
    assert node.says("red") == told
    assert node.stop() == 0


def test_a_node_that_allows_none_loads_none(build, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    node = Adapted(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(tmp_path / "tiny.gguf", "tiny")
    node.folder, node.api_key = tmp_path / "adapters", node.key("test", "--adapters", "all")
    path = node.seal("red", 1)
    told = node.run("casemate", "adapter", "add", path, "--state", node.state, check=False)
    assert told.returncode == 3 and "adapters_max" in told.stderr
    by_hand(node, "red", path)
    node.start()
    time.sleep(0.6)
    assert node.status()["adapters"] == [] and refused(lambda: node.says("red")).status_code == 404
    assert node.stop() == 0
