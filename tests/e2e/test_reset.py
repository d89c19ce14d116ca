"""A TPM that is reset under load, by somebody who extends its PCRs again as they were: evidence, quotes and
key pages end with their own cause. A proxy between keeper and swtpm stands for the attacker's hands."""
import concurrent.futures
import hashlib
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import evidence_reader  # noqa: E402
import node as nodes  # noqa: E402
import swtpm as tpms  # noqa: E402
import tiny_model  # noqa: E402

STARTUP = bytes.fromhex("80010000000c000001440000")


def frame_read(link: socket.socket) -> bytes:
    """One TPM command or response; empty at the end."""
    blob = b""
    while len(blob) < 10 or len(blob) < struct.unpack(">I", blob[2:6])[0]:
        more = link.recv(4096)
        if not more:
            return b""
        blob += more
    return blob


class Hands(threading.Thread):
    """Passes frames on; between two of them the TPM can be reset and extended."""

    def __init__(self, tpm: tpms.Swtpm, path: pathlib.Path):
        super().__init__(daemon=True)
        self.tpm, self.path, self.lock = tpm, path, threading.Lock()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(4)
        self.far = socket.socket(socket.AF_UNIX)
        self.far.connect(str(tpm.path))

    def run(self):
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return
            while command := frame_read(near):
                near.sendall(self.ask(command))
            near.close()

    def ask(self, command: bytes) -> bytes:
        with self.lock:
            self.far.sendall(command)
            return frame_read(self.far)

    def extend(self, pcr: int, digest: bytes) -> None:
        body = struct.pack(">II", pcr, 9) + bytes.fromhex("40000009" "0000" "00" "0000") + \
            struct.pack(">IH", 1, 0xb) + digest
        answer = self.ask(struct.pack(">HII", 0x8002, 10 + len(body), 0x182) + body)
        assert answer[6:10] == bytes(4), answer.hex()

    def reset(self, again: list[bytes]) -> None:
        with self.lock:
            subprocess.run(["swtpm_ioctl", "--unix", self.tpm.control, "-i"], check=True,
                           capture_output=True, timeout=10)
            self.far.sendall(STARTUP)
            assert frame_read(self.far)[6:10] == bytes(4)
        for digest in again:
            self.extend(14, digest)


@pytest.fixture
def node(build, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    tpm = tpms.Swtpm(tmp_path / "swtpm").start()
    hands = Hands(tpm, tmp_path / "hands.sock")
    hands.start()
    node = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(tmp_path / "tiny.gguf", "tiny", tpm=str(hands.path))
    node.start()
    node.hands, node.api_key = hands, node.key("load")
    time.sleep(0.6)
    yield node
    if node.service is not None:
        node.stop()
    hands.listener.close()
    tpm.stop()


def stream(node) -> str:
    """A client under way until the service goes."""
    try:
        for _ in node.client(node.api_key).chat.completions.create(
                model="tiny", stream=True, max_tokens=480, temperature=0,
                messages=[{"role": "user", "content": "x"}], extra_body={"ignore_eos": True}):
            pass
        return "whole"
    except Exception as error:  # the client's classes differ by where the stream broke
        return type(error).__name__


def attested(node) -> int:
    try:
        with urllib.request.urlopen(f"https://{node.address}/v1/attestation?nonce=" + "ab" * 32,
                                    context=node.context(), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ended_by_reset(node) -> str:
    assert node.service.wait(20) == 5, node.tail()
    node.service = None
    log = node.log.read_text()
    assert "CM-SEAL-RESET" in log.splitlines()[-1]
    assert not node.status()["ready"]
    return log


def before(node) -> tuple[list[bytes], bytes]:
    """The digests that the attacker extends again, and the evidence of the start."""
    blob = (node.state / "run/evidence.bin").read_bytes()
    events = evidence_reader.Evidence(blob).events
    return [hashlib.sha256(struct.pack("<I", kind) + data).digest() for kind, data in events], blob


@pytest.mark.parametrize("again", [True, False], ids=["extended-again", "bare"])
def test_quotes_and_readiness_end_with_the_boot(node, again):
    digests, blob = before(node)
    assert attested(node) == 200  # the same question, and the TPM is not reset
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(stream, node) for _ in range(3)]
        time.sleep(0.1)
        node.hands.reset(digests if again else [])
        assert attested(node) != 200
        ended_by_reset(node)
        assert [c.result() for c in clients]
    assert (node.state / "run/evidence.bin").read_bytes() == blob, "evidence after the reset"


@pytest.mark.parametrize("role", ["worker", "gateway"])
def test_a_second_generation_gets_no_key_after_a_reset(node, role):
    digests, _ = before(node)
    first = node.pid(role)
    os.kill(first, signal.SIGKILL)  # the control: without a reset it is replaced
    end = time.monotonic() + 15
    while node.status()["roles"][role]["pid"] in (first, 0) or not node.status()["ready"]:
        assert time.monotonic() < end, node.tail()
        time.sleep(0.05)
    node.hands.reset(digests)
    os.kill(node.pid(role), signal.SIGKILL)
    log = ended_by_reset(node)
    ready = [line for line in log.splitlines() if '"role_ready"' in line and f'"name":"{role}"' in line]
    assert len(ready) == 2, "a third generation was given a page"
    assert log.count('"event":"key_page"') == (2 if role == "worker" else 1)


def test_the_service_finds_out_by_itself(node):
    """Nobody asks: its own refresh does, within its interval."""
    assert node.stop() == 0
    node.start("--evidence_refresh_ms", "1000", "--evidence_lifetime_ms", "3000")
    digests, _ = before(node)
    time.sleep(1.5)
    assert node.get("/readyz")[0] == 200
    node.hands.reset(digests)
    began = time.monotonic()
    ended_by_reset(node)
    assert time.monotonic() - began < 5
