"""The confinement: attempts to escape from each role, with each layer off in turn; a start that is
refused when a layer does not hold; what a machine lacks; ordinary users; calls in a killed role's end."""
import collections
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import node as nodes  # noqa: E402
import tiny_model  # noqa: E402

ROLES = ["gateway", "keeper", "worker", "devtpm"]
LAYERS = ["pid_ns", "net_ns", "other_ns", "root", "identity", "capabilities", "limits", "no_new_privs",
          "mdwe", "dump", "landlock", "cgroup", "filter"]
ROOT = os.geteuid() == 0
DENIED = {"SIGSYS", "SIGXFSZ", "EACCES", "EPERM", "ENOENT", "ESRCH", "ENOSYS", "ENOMEM", "ENETUNREACH",
          "ENETDOWN", "EINVAL", "EROFS", "ECONNREFUSED", "ENOKEY", "EBADF", "EFBIG", "EMFILE", "EAFNOSUPPORT",
          "ENOTDIR", "EOPNOTSUPP", "ENOSPC"}


def attempts(build, where, off=""):
    """attempt -> event"""
    done = subprocess.run([build / "harness" / "escape", where], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "CASEMATE_TEST_OFF": off} if off else None)
    rows = [json.loads(line) for line in done.stdout.splitlines() if '"attempt"' in line]
    return done.returncode, {row["attempt"]: row["event"] for row in rows}


@pytest.fixture(scope="module")
def control(build):
    code, events = attempts(build, "control")
    assert code == 0
    return events


@pytest.mark.skipif(not ROOT, reason="the controls need root outside")
def test_each_attempt_succeeds_outside(control):
    assert len(control) >= 40
    assert [name for name, event in control.items() if event != "done"] == []


@pytest.mark.parametrize("role", ROLES)
def test_no_attempt_succeeds_inside(build, control, role):
    code, events = attempts(build, role)
    assert code == 0 and set(events) == set(control)
    assert [name for name, event in events.items() if event not in DENIED] == []
    # Memory alone is answered: malloc must be able to fail. Everything else kills.
    assert {event for event in events.values()} <= {"SIGSYS", "ENOMEM"}, events
    print(f"\n{role}: {len(events)} attempts, {collections.Counter(events.values())}")


@pytest.mark.skipif(not ROOT, reason="an ordinary user has other layers")
@pytest.mark.parametrize("layer", LAYERS)
def test_with_a_layer_off_the_others_hold(build, control, layer):
    for role in ROLES:
        code, events = attempts(build, role, layer)
        if layer == "no_new_privs":  # without it the kernel takes neither Landlock nor filter
            assert code != 0 and not events
            continue
        assert code == 0 and set(events) == set(control)
        through = [name for name, event in events.items() if event not in DENIED]
        assert len(through) <= len(events) // 10, through
        print(f"\n{layer} off, {role}: {len(events) - len(through)} of {len(events)} denied; through: {through}")


def switched(build, folder):
    """The programs, with the supervisor that has switches."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ["casemate", *(f"casemate-{role}" for role in ROLES), "casemate-pack"]:
        shutil.copy(build / "bin" / name, programs)
    shutil.copy(build / "harness" / "casemate-supervisor-switched", programs / "casemate-supervisor")
    return programs


@pytest.fixture(scope="module")
def made(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandbox")
    tiny_model.write(str(folder / "tiny.gguf"))
    node = nodes.Node(switched(build, folder), folder / "node", folder / "owner")
    node.make(folder / "tiny.gguf", "tiny")
    node.api_key = node.key("sandbox")
    return node


@pytest.fixture
def node(made, monkeypatch):
    made.log.write_text("")
    yield made
    made.stop()


def answers(node):
    reply = node.client(node.api_key).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    return reply.usage.completion_tokens >= 1


@pytest.mark.skipif(not ROOT, reason="an ordinary user has other layers")
@pytest.mark.parametrize("layer", LAYERS)
def test_a_start_is_refused_when_a_layer_does_not_hold(node, monkeypatch, layer):
    monkeypatch.setenv("CASEMATE_TEST_OFF", layer)
    if layer == "dump":  # who takes another identity is not dumpable, whether it asks for that or not
        node.start()
        assert answers(node)
        return
    node.start(wait=False)
    assert node.service.wait(30) == 8, node.tail()
    assert "CM-SANDBOX-HOLDS" in node.tail() or layer == "no_new_privs", node.tail()


def test_with_nothing_off_it_serves_and_names_nothing_missing(node):
    node.start()
    assert answers(node)
    lacks = [line for line in node.log.read_text().splitlines() if "sandbox_lacks" in line]
    assert not ROOT or lacks == []


def test_who_speaks_plain_http_kills_nobody(node):
    node.start()
    host, port = node.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(64).startswith(b"HTTP/1.1 400")
    assert answers(node) and node.status()["roles"]["gateway"]["restarts"] == 0


def test_weights_that_could_be_swapped_out_are_not_served(node, monkeypatch):
    """Locked they stay; not locked they may lie in memory only where there is no swap."""
    node.start()
    locked = node.status()["load"]["arena_locked"]
    assert answers(node) and node.stop() == 0
    monkeypatch.setenv("CASEMATE_TEST_SWAP", "1")
    node.start(wait=False)
    if locked:
        node.ready()
        assert answers(node)
    else:
        assert node.service.wait(30) == 8, node.tail()
        assert "CM-SUP-SWAP" in node.tail() and "LimitMEMLOCK" in node.tail()


def test_the_old_kernel_s_set_holds_every_promise(node, monkeypatch):
    """Debian 12's 6.1: no MDWE, Landlock ABI 2."""
    monkeypatch.setenv("CASEMATE_TEST_KERNEL", "6.1")
    node.start()
    assert answers(node)
    log = node.log.read_text()
    assert '"landlock_abi":2' in log and "no new executable memory" in log


def test_a_promise_that_nothing_holds_is_refused_or_named(node, monkeypatch):
    monkeypatch.setenv("CASEMATE_TEST_LACKS", "filter,net_ns")
    node.start(wait=False)
    assert node.service.wait(30) == 8, node.tail()
    assert "runs no other program" in node.tail() and "CM-SANDBOX-PROMISE" in node.tail()
    yaml = node.state / "casemate.yaml"
    text = yaml.read_text()
    try:
        yaml.write_text(text.replace("sealed:\n", "sealed:\n  require_sandbox: best\n"))
        node.sign()
        node.start()
        assert answers(node)
        assert '"promise":"no_network"' in node.log.read_text()
    finally:
        yaml.write_text(text)


@pytest.mark.skipif(not ROOT, reason="needs root to become somebody else")
def test_an_ordinary_user_serves_confined(build):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="casemate-user-"))
    try:
        programs = switched(build, folder)
        shutil.copy(build / "bin" / "casemate-supervisor", programs)
        tiny_model.write(str(folder / "tiny.gguf"))
        script = folder / "serve.py"
        script.write_text(
            f"import sys, pathlib, subprocess\nsys.path.insert(0, {str(folder)!r})\nimport node as nodes\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "n = nodes.Node(folder / 'bin', folder / 'node', folder / 'owner')\n"
            "n.make(folder / 'tiny.gguf', 'tiny')\nn.start()\n"
            "for role in ('gateway', 'keeper', 'worker', 'devtpm'):\n"
            "    print(role, open(f'/proc/{n.pid(role)}/status').read().replace('\\n', ' '))\n"
            "assert n.stop() == 0\nprint(n.log.read_text())\n")
        shutil.copy(pathlib.Path(nodes.__file__), folder)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 65534, 65534)
        done = subprocess.run(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
                               "/usr/bin/python3", script], capture_output=True, text=True, timeout=90,
                              cwd=folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        roles = [line for line in done.stdout.splitlines() if "Seccomp:\t2" in line]
        assert len(roles) == 4 and all("NoNewPrivs:\t1" in line and "CapEff:\t0000000000000000" in line
                                       for line in roles), done.stdout
    finally:
        shutil.rmtree(folder, ignore_errors=True)
