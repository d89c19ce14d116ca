"""Plaintext weights and the key are where they may be, and nowhere else.

Three blocks of plaintext weights and the package key are searched in every file under the node's state,
in the memory of every process of the service, in cores taken of them, and with prompts and replies in the
rings. Controls: the worker's own memory holds the blocks, and each is found where it is planted."""
import json
import os
import pathlib
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import package_reader  # noqa: E402
import tiny_model  # noqa: E402

PASSPHRASE = "correct horse battery"
CHUNK = 1 << 22
PYTHON = "/usr/bin/python3"  # which any user may run


def memory_contains(pid, needles):
    """Which needles occur in a process's readable memory. Mappings that the kernel hides are counted."""
    found, hidden = set(), 0
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if "r" not in rights or "[vvar" in line or "[vsyscall]" in line:
                continue
            start, end = (int(x, 16) for x in span.split("-"))
            tail = b""
            while start < end:
                try:
                    memory.seek(start)
                    data = memory.read(min(CHUNK, end - start))
                except OSError:
                    hidden += 1
                    break
                if not data:
                    break
                found |= {name for name, needle in needles.items() if needle in tail + data}
                tail, start = data[-64:], start + len(data)
    return found, hidden


def file_contains(path, needles):
    data = path.read_bytes()
    return {name for name, needle in needles.items() if needle in data}


@pytest.fixture(scope="module")
def scene(build, smollm_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    (folder / "pass").write_text(PASSPHRASE)
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    node.make(smollm_gguf, "smollm2", "--recovery", folder / "recovery", "--passphrase-file",
              folder / "pass")
    key = package_reader.recovery_key((folder / "recovery").read_bytes(), PASSPHRASE)
    package = package_reader.Package(node.package.read_bytes(), key)
    size = len(package.payload)
    needles = {f"block {i}": package.payload[at:at + 48]
               for i, at in enumerate((4096 * 50, size // 2, size - 9000))}
    assert all(len(set(n)) > 8 for n in needles.values())
    needles["key"] = key
    node.start()
    node.api_key = node.key("scan")
    time.sleep(0.6)
    node.client(node.api_key).chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "hello"}], max_tokens=8)
    yield node, needles
    node.stop()


def test_controls_find_what_is_there(scene, tmp_path):
    node, needles = scene
    planted = tmp_path / "planted"
    planted.write_bytes(b"x" * 1000 + needles["block 1"] + needles["key"] + b"y")
    assert file_contains(planted, needles) == {"block 1", "key"}
    found, _ = memory_contains("self", needles)
    assert found == set(needles)
    found, _ = memory_contains(node.pid("worker"), needles)
    assert {"block 0", "block 1", "block 2"} <= found


def test_no_file_of_the_node_holds_plaintext_or_key(scene):
    node, needles = scene
    files = [p for p in node.state.rglob("*") if p.is_file()]
    assert len(files) >= 8
    assert {str(p): file_contains(p, needles) for p in files if file_contains(p, needles)} == {}


@pytest.mark.parametrize("role", ["supervisor", "gateway", "keeper", "devtpm"])
def test_no_other_process_holds_plaintext_or_key(scene, role):
    node, needles = scene
    found, _ = memory_contains(node.pid(role), needles)
    # The keeper holds the key in its one guarded secret; nobody else does.
    assert found <= ({"key"} if role == "keeper" else set())


def test_the_worker_no_longer_holds_the_key(scene):
    node, needles = scene
    found, _ = memory_contains(node.pid("worker"), needles)
    assert "key" not in found


# ---------------------------------------------------------------------- rings

def ring_contains(pid, needles):
    """Needles in the ring memory that a process holds, and how many rings those were."""
    found, rings = set(), 0
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:casemate-ring" in str(link.readlink()):
            rings += 1
            found |= file_contains(link, needles)
    return found, rings


def test_rings_keep_no_prompt_no_reply_and_no_secret(scene):
    node, needles = scene
    canary = "canary " + secrets.token_hex(12)
    supervisor, worker = node.pid("supervisor"), node.pid("worker")
    told = []

    def ask():
        told.append(node.client(node.api_key).chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": canary}], max_tokens=24))
    sought = {**needles, "prompt": canary.encode(), "api key": node.api_key.encode()}
    client = threading.Thread(target=ask)
    os.kill(worker, signal.SIGSTOP)  # control: what the worker has not read yet is there to be found
    client.start()
    end = time.monotonic() + 5
    while (found := ring_contains(supervisor, sought)[0]) != {"prompt"}:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    os.kill(worker, signal.SIGCONT)
    client.join(30)
    sought["reply"] = told[0].choices[0].message.content.encode()[-20:]
    assert len(sought["reply"]) >= 12
    time.sleep(1.6)  # the worker's tick wipes once a second
    found, rings = ring_contains(supervisor, sought)
    assert rings >= 2 and found == set()


# ---------------------------------------------------------------------- core files

def user_prefix():
    """An ordinary user's words before a command, whoever runs the tests."""
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []


def gcore(pid, out, excluded=False, prefix=()):
    """A core of a living process, as gdb writes it; None: refused."""
    done = subprocess.run([*prefix, "gdb", "-q", "-batch", "-nx", "-p", str(pid), "-ex",
                           f"set dump-excluded-mappings {'on' if excluded else 'off'}", "-ex", f"gcore {out}"],
                          capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    return out if "Saved corefile" in done.stdout and out.exists() else None


@pytest.fixture
def holder(scene, tmp_path):
    """A process that is nothing special, with the needles planted in it."""
    node, needles = scene
    planted = tmp_path / "needles"
    planted.write_bytes(b"".join(needles.values()))
    planted.chmod(0o644)
    os.chmod(tmp_path, 0o777)
    text = "import sys,time; held = sys.stdin.buffer.read(); print('held', flush=True); time.sleep(60)"
    made = subprocess.Popen([*user_prefix(), PYTHON, "-c", text], stdin=planted.open("rb"),
                            stdout=subprocess.PIPE)
    assert made.stdout.readline() == b"held\n"
    yield made
    made.kill()
    made.wait()


def test_a_core_that_root_takes_of_a_living_role_holds_no_weights_and_no_key(scene, holder, tmp_path):
    node, needles = scene
    control = gcore(holder.pid, tmp_path / "control")
    assert control and file_contains(control, needles) == set(needles)
    taken = {}
    for role in ("worker", "gateway", "keeper"):
        core = gcore(node.pid(role), tmp_path / role)
        taken[role] = core is not None
        if core:
            assert file_contains(core, needles) == set(), role
            core.unlink()
    if os.getuid() == 0:
        assert taken["worker"], "gdb was refused: nothing was looked at"
        # control: the weights are left out because they ask for it, not because the scan is blind
        core = gcore(node.pid("worker"), tmp_path / "all", excluded=True)
        assert {"block 0", "block 1", "block 2"} <= file_contains(core, needles)
        core.unlink()
    node.ready()  # it serves on


@pytest.fixture(scope="module")
def small(build):
    """A node whose roles may be killed, run where core files would fall, as far as limits go."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="casemate-cores-"))  # where any user may come
    folder.chmod(0o755)
    shutil.copytree(build / "bin", folder / "bin")
    # Alone in a process namespace, a role would be deaf to the signals that this sends it.
    shutil.copy(build / "harness" / "casemate-supervisor-switched", folder / "bin" / "casemate-supervisor")
    os.environ.update({"CASEMATE_TEST_OFF": "pid_ns", "CASEMATE_TEST_ACCEPT": "1"})
    tiny_model.write(str(folder / "tiny.gguf"))
    node = nodes.Node(folder / "bin", folder / "node", folder / "owner")
    node.make(folder / "tiny.gguf", "tiny")
    here = os.getcwd()
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    node.start()
    yield node, folder
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    os.chdir(here)
    for name in ("CASEMATE_TEST_OFF", "CASEMATE_TEST_ACCEPT"):
        os.environ.pop(name)
    node.stop()
    shutil.rmtree(folder)


def crash(pid):
    """A fault of its own: the first process of a PID namespace gets no other signal that ends it."""
    subprocess.run(["gdb", "-q", "-batch", "-nx", "-p", str(pid), "-ex", "set $pc = 0", "-ex", "detach"],
                   capture_output=True, timeout=60, stdin=subprocess.DEVNULL)


def test_a_role_that_crashes_leaves_no_core(small):
    node, folder = small
    control = subprocess.run([sys.executable, "-c", "import os; os.abort()"], cwd=folder)
    assert control.returncode == -signal.SIGABRT
    pattern = pathlib.Path("/proc/sys/kernel/core_pattern").read_text().strip()
    cores = set(folder.glob("core*"))
    if not pattern.startswith(("|", "/")) and resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:
        assert cores, "control: a crash here leaves a core file"
    for role in ("worker", "gateway", "keeper"):
        pid = node.pid(role)
        crash(pid)
        end = time.monotonic() + 15
        while node.pid(role) in (0, pid) or not node.status()["ready"]:
            assert time.monotonic() < end, node.tail()
            time.sleep(0.02)
    ended = [json.loads(line) for line in node.log.read_text().splitlines() if '"role_ended"' in line]
    assert [(line["name"], line["signal"]) for line in ended] == [
        ("worker", "SEGV"), ("gateway", "SEGV"), ("keeper", "SEGV")]
    assert [line["core_dumped"] for line in ended] == [0, 0, 0]
    assert set(folder.rglob("core*")) == cores


@pytest.mark.skipif(os.getuid() != 0, reason="a service of another user needs root to be made")
def test_an_ordinary_user_cannot_look_into_a_role(small, holder):
    """The roles are closed, an ordinary process of the same user is open."""
    node, folder = small
    node.ready()
    (folder / "out").mkdir()
    (folder / "out").chmod(0o777)
    assert gcore(holder.pid, folder / "out" / "control", prefix=user_prefix())
    for role in ("worker", "gateway", "keeper", "devtpm"):
        look = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb')"
        pid = node.pid(role)
        assert gcore(pid, folder / "out" / role, prefix=user_prefix()) is None, role
        opened = subprocess.run([*user_prefix(), PYTHON, "-c", look, str(pid)], capture_output=True)
        assert opened.returncode != 0 and b"Permission" in opened.stderr, role
    opened = subprocess.run([*user_prefix(), PYTHON, "-c", look, str(holder.pid)], capture_output=True)
    assert opened.returncode == 0, "control"


# ---------------------------------------------------------------------- swap

def test_nothing_of_a_role_is_in_swap_and_weights_cannot_get_there(scene):
    node, needles = scene
    for role in ("supervisor", "gateway", "keeper", "worker", "devtpm"):
        text = pathlib.Path(f"/proc/{node.pid(role)}/status").read_text()
        assert int(re.search(r"VmSwap:\s+(\d+) kB", text)[1]) == 0, role
    swaps = pathlib.Path("/proc/swaps").read_text().splitlines()[1:]
    biggest, flags = 0, ""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", pathlib.Path(f"/proc/{node.pid('worker')}/smaps").read_text()):
        size = int(re.search(r"Size:\s+(\d+) kB", block)[1])
        if size > biggest:
            biggest, flags = size, re.search(r"VmFlags: (.*)", block)[1]
    assert biggest > 80_000 and "dd" in flags.split(), "the arena, kept out of dumps"
    locked = "lo" in flags.split()
    print(f"weights: {'locked' if locked else 'not locked'}; swap: {len(swaps)} places")
    assert locked or not swaps
    load = node.status()["load"]
    assert load["arena_locked"] == locked
    assert load["weights"] == ("locked" if locked else "not locked; there is no swap")
