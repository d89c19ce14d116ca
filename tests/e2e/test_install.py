"""`make install`, the unit that it puts in place, and `make uninstall`."""
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import tiny_model  # noqa: E402

EXPOSURE_MOST = 3.0  # of 10; the figure is printed


def make(repo, target, root):
    done = subprocess.run(["make", "-s", "-C", repo, target, f"DESTDIR={root}", "PREFIX=/usr"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def open_folder() -> pathlib.Path:
    """Where the service's own user may come, unlike pytest's folders."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="casemate-install-"))
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def installed(repo):
    root = open_folder()
    make(repo, "install", root)
    yield root
    make(repo, "uninstall", root)
    left = [p for p in root.rglob("*") if not p.is_dir()]
    assert left == [] and not (root / "usr/lib/casemate").exists(), left
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def unit(installed, tmp_path_factory):
    """The unit as it is where the install is the root: its program is there to be checked."""
    text = (installed / "usr/lib/systemd/system/casemate.service").read_text()
    assert "ExecStart=/usr/bin/casemate serve\n" in text and "@" not in re.sub("@system-service|@mount|~@.*", "", text)
    path = tmp_path_factory.mktemp("unit") / "casemate.service"
    path.write_text(text.replace("=/usr/bin/", f"={installed}/usr/bin/").replace(
        "file:/usr", f"file:{installed}/usr"))
    return path


@pytest.fixture(scope="module")
def node(installed):
    folder = open_folder()
    tiny_model.write(str(folder / "tiny.gguf"))
    made = nodes.Node(installed / "usr/bin", folder / "casemate", folder / "owner")
    made.make(folder / "tiny.gguf", "tiny")
    made.api_key = made.key("installed")
    yield made
    shutil.rmtree(folder)


def test_what_is_installed_and_nothing_of_the_tests(installed):
    files = {str(p.relative_to(installed)) for p in installed.rglob("*") if not p.is_dir()}
    programs = {f"usr/lib/casemate/casemate{x}" for x in (
        "", "-supervisor", "-gateway", "-keeper", "-devtpm", "-worker", "-pack", "-verify")}
    assert {f for f in files if f.startswith("usr/lib/casemate/")} == programs
    assert {f for f in files if f.startswith("usr/bin/")} == {
        "usr/bin/casemate", "usr/bin/casemate-pack", "usr/bin/casemate-verify"}
    assert {"usr/lib/systemd/system/casemate.service", "usr/lib/sysusers.d/casemate.conf"} <= files
    assert all((installed / f).stat().st_mode & 0o022 == 0 for f in files)


def test_it_serves_from_where_it_is(node):
    node.start()
    reply = node.client(node.api_key).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    assert reply.usage.completion_tokens <= 4
    assert node.stop() == 0


def test_the_unit_is_sound(unit):
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "casemate" in line]
    assert ours == [] and done.returncode == 0, done.stderr
    broken = unit.with_name("broken.service")
    broken.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=mxied"))
    done = subprocess.run(["systemd-analyze", "verify", broken], capture_output=True, text=True, timeout=60)
    assert "mxied" in done.stderr, "verify sees what is wrong"


def exposure(unit) -> float:
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
                          capture_output=True, text=True, timeout=60)
    return float(re.search(r"Overall exposure level.*: ([\d.]+)", done.stdout)[1])


def test_what_the_unit_costs_the_walls(unit):
    figure = exposure(unit)
    print(f"systemd-analyze security: {figure}")
    assert figure <= EXPOSURE_MOST
    bare = unit.with_name("bare.service")
    bare.write_text("\n".join(line for line in unit.read_text().splitlines()
                              if not line.startswith(("Protect", "SystemCall", "Capability", "User="))))
    assert exposure(bare) > figure + 3, "without the walls the figure says so"


def test_the_unit_leaves_the_service_what_it_needs(unit):
    """Each of these was a way to break it."""
    lines = set(unit.read_text().splitlines())
    for needed in ("LimitMEMLOCK=infinity", "DeviceAllow=/dev/tpmrm0 rw", "Delegate=yes", "KillMode=mixed",
                   "OOMPolicy=continue", "Type=notify", "WatchdogSec=20"):
        assert needed in lines
    for broken in ("RestrictNamespaces", "PrivateDevices", "PrivateUsers", "ProtectControlGroups", "ProtectProc"):
        assert not any(line.startswith(broken + "=") for line in lines)


def filter_of(unit) -> set[str]:
    """The system calls that the unit allows, as systemd's own groups say."""
    groups, allowed = {}, set()
    text = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager"], capture_output=True,
                          text=True, check=True, timeout=30).stdout
    for line in text.splitlines():
        if line.startswith("@"):
            current = groups.setdefault(line.strip(), set())
        elif line.startswith("    ") and not line.strip().startswith("#"):
            current.add(line.strip())

    def expand(word):
        if not word.startswith("@"):
            return {word}
        return set().union(*(expand(member) for member in groups[word]))
    for line in unit.read_text().splitlines():
        if line.startswith("SystemCallFilter="):
            words = line.split("=", 1)[1]
            named = set().union(*(expand(word) for word in words.lstrip("~").split()))
            allowed = allowed - named if words.startswith("~") else allowed | named
    return allowed


def as_the_unit(node) -> list[str]:
    """User, capabilities and no_new_privs as the unit sets them, as far as the tests' user can."""
    if os.getuid() != 0:
        return ["setpriv", "--no-new-privs"]
    for path in (node.state.parent, *node.state.rglob("*"), node.state):
        os.chown(path, 65534, 65534)
    return ["setpriv", "--reuid=65534", "--regid=65534",
            "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]


def test_each_system_call_of_a_whole_life_passes_the_unit(node, unit):
    """Start, serve, quote, replace a worker, stop: traced, and compared with the filter."""
    assert "Environment=XDG_STATE_HOME=%S" in unit.read_text().splitlines()
    command = as_the_unit(node)
    node.api_key = node.key("added-by-root")  # after the folder became the service's
    assert all(p.stat().st_uid == node.state.stat().st_uid for p in node.state.glob("keys*"))
    trace = node.state / "trace"
    out = open(node.log, "ab")
    node.service = subprocess.Popen(
        [*command, "strace", "-f", "-qq", "-o", trace, "-e", "trace=all", "-e", "signal=none",
         node.programs / "casemate", "serve", "--listen", "127.0.0.1:0"],
        stdout=out, stderr=out, env={**os.environ, "XDG_STATE_HOME": str(node.state.parent)})
    end = time.monotonic() + 60
    while not node.status().get("ready"):
        assert time.monotonic() < end and node.service.poll() is None, node.tail()
        time.sleep(0.1)
    node.address, supervisor = node.status()["listen"], node.status()["pid"]
    worker = node.pid("worker")
    node.client(node.api_key).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    os.kill(worker, 9)
    while not node.status()["ready"] or node.pid("worker") in (0, worker):
        assert time.monotonic() < end, node.tail()
        time.sleep(0.1)
    os.kill(supervisor, 15)
    assert node.service.wait(30) == 0
    node.service = None
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)[( ]", trace.read_text(), re.M)) - {"exited", "killed"}
    assert {"execveat", "accept4", "memfd_create", "mlock"} & calls and len(calls) > 40
    assert calls - filter_of(unit) == set()
    assert "reboot" not in filter_of(unit) and "ptrace" not in filter_of(unit)


def test_a_manager_is_told_what_happens(node, tmp_path, monkeypatch):
    """As systemd would hear it, through `casemate serve` and the exec of the supervisor."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(20)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    node.start(wait=False)
    told = []
    while "READY=1" not in told:
        told.append(manager.recv(1000).decode())
    assert told[0].startswith("STATUS=loading: ") and node.status()["ready"]
    assert "WATCHDOG=1" in told
    assert [t for t in told if t.startswith("STATUS=")][-1].startswith("STATUS=ready on https://127.0.0.1:")
    began = time.monotonic()
    assert manager.recv(1000) == b"WATCHDOG=1" and time.monotonic() - began < 0.6
    assert node.stop() == 0
    told = []
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            told.append(manager.recv(1000).decode())
    assert "STOPPING=1" in told and "STATUS=not ready: draining, 0 role restarts" in told
