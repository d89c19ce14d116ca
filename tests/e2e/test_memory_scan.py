"""Plaintext weights and the key are where they may be, and nowhere else.

Three blocks of plaintext weights and the package key are searched in every file under the node's state
and in the memory of every process of the service. Controls: the worker's own memory holds the blocks, and
both are found where they are planted."""
import pathlib
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import package_reader  # noqa: E402

PASSPHRASE = "correct horse battery"
CHUNK = 1 << 22


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
