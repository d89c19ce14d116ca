"""What each role really calls once it serves, traced, against its policy: nothing beside it, and no
call in it that nobody makes. A rule whose reason begins with "fallback:" names a case that cannot be
made here (a clock that needs a call, a lock that is contended)."""
import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import node as nodes  # noqa: E402
import tiny_adapter  # noqa: E402
import tiny_model  # noqa: E402

SERVING = {"gateway": "gateway", "keeper": "keeper", "worker": "worker-serve"}


def policy(repo, name):
    """call -> reasons"""
    rules = collections.defaultdict(list)
    for line in (repo / "policies/seccomp" / f"{name}.policy").read_text().splitlines():
        rule = re.match(r"(\w+)(?: [^:]*?)? : (.*)", line)
        if rule and "->" not in line:
            rules[rule[1]].append(rule[2])
    return rules


def calls(folder):
    """role -> calls under its last filter"""
    used = collections.defaultdict(set)
    for path in folder.iterdir():
        text = path.read_text(errors="replace")
        name = re.search(r'PR_SET_NAME, "casemate-(gatewa|worker|keeper|devtpm)', text)
        role = "supervisor" if "signalfd4" in text else name and {"gatewa": "gateway"}.get(name[1], name[1])
        parts = re.split(r"^seccomp\(SECCOMP_SET_MODE_FILTER.*$", text, flags=re.M)
        if role and len(parts) > (1 if role == "supervisor" else 2):
            used[role] |= set(re.findall(r"^(\w+)\(", parts[-1], flags=re.M))
    return used


def life(build, node, key, trace):
    """One traced life of the service: requests, stops, deaths of each role, an end that takes force."""
    trace.mkdir()
    with open(node.log, "wb") as out:
        node.service = subprocess.Popen(
            ["strace", "-ff", "-o", trace / "t", build / "bin" / "casemate", "serve", "--state", node.state,
             "--listen", "127.0.0.1:0", "--evidence_refresh_ms", "1000"], stdout=out, stderr=out)

    def wait(done):
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end, node.tail()
            time.sleep(0.05)

    def flows():
        node.address = node.status()["listen"]
        say = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        node.client(key).chat.completions.create(**say)
        list(node.client(key).chat.completions.create(**say, stream=True))
        assert node.get("/metrics", key)[0] == 200

    def adapters(*wanted):
        wait(lambda: [(a["name"], a["state"]) for a in node.status()["adapters"]] == list(wanted))

    before = node.status().get("pid")
    wait(lambda: node.status().get("ready") and node.status()["pid"] != before)
    flows()
    node.run("casemate", "adapter", "add", node.adapter, "--state", node.state)
    adapters(("red", "serving"))
    say = {"model": "red", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    node.client(key).chat.completions.create(**say)
    node.run("casemate", "adapter", "remove", "red", "--state", node.state)
    adapters()
    node.key("b")
    for role in ("gateway", "worker", "keeper", "supervisor"):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            os.kill(node.pid(role), number)
            time.sleep(0.2)
    for role in ("gateway", "worker", "keeper"):
        pid = node.pid(role)
        os.kill(pid, signal.SIGKILL)
        wait(lambda: node.pid(role) not in (0, pid) and node.status()["ready"])
        flows()
    time.sleep(1.5)
    pid = node.status()["pid"]
    os.kill(node.pid("devtpm"), signal.SIGSTOP)  # it does not go when it is told: it is killed
    os.kill(pid, signal.SIGTERM)
    node.service.wait(60)
    nodes.no_bug(node.log.read_text(errors="replace"))
    return calls(trace)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("strace"), reason="tracing other users takes root")
def test_roles_call_what_their_policies_say_and_nothing_else(build, repo, tmp_path):
    """Some calls depend on who comes first, so what one life leaves unused, another may use: at most three."""
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    node = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(tmp_path / "tiny.gguf", "tiny")
    tiny_adapter.allow(node, node.owner)
    node.sign()
    node.adapter = tiny_adapter.pack(node, tmp_path / "adapters", "red", 1)
    key, used, unused = node.key("a", "--adapters", "red"), collections.defaultdict(set), {"": {""}}
    for number in range(3):
        for role, made in life(build, node, key, tmp_path / f"trace{number}").items():
            used[role] |= made
        for role, name in {**SERVING, "supervisor": "supervisor"}.items():
            rules = policy(repo, name)
            assert used[role] - set(rules) - {"brk", "mmap", "mremap"} == set(), f"{role} calls what {name} has not"
            unused[name] = {call for call in rules if call not in used[role]
                            and not any(reason.startswith("fallback:") for reason in rules[call])}
            print(f"\n{role}: {len(rules)} calls, unused: {sorted(unused[name])}")
        unused.pop("", None)
        if not any(unused.values()):
            return
    assert not any(unused.values()), f"allowed, and never made: {unused}"
