"""casemate-verify as its user runs it: a live host, a file, a relay, and one refusal for each reason."""
import hashlib
import json
import os
import pathlib
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import numpy
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import evidence_reader  # noqa: E402
import node as nodes  # noqa: E402
import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def node(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    tiny_model.write(str(folder / "tiny.gguf"))
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    node.make(folder / "tiny.gguf", "tiny")
    node.start()
    node.trust = folder / "trust"
    node.trust.write_text(node.run("casemate-pack", "trust", node.package, "--node",
                                   node.state / "enrolment.bin", "--measurement",
                                   node.state / "node.measure", "--allow-development").stdout)
    yield node
    assert node.stop() == 0


def verify(node, subject, *words, trust=None):
    return node.run("casemate-verify", subject, "--trust", trust or node.trust, *words, check=False)


def test_a_live_host_is_believed(node, tmp_path):
    done = verify(node, f"https://{node.address}", "--last", tmp_path / "last")
    assert done.returncode == 0, done.stderr
    assert "believed" in done.stdout and "development TPM" in done.stdout
    again = verify(node, f"https://{node.address}", "--last", tmp_path / "last", "--json")
    facts = json.loads(again.stdout)
    assert facts["believed"] and facts["kind"] == "session"
    assert [e["name"] for e in facts["events"] if e["type"] == "program"][0] == "casemate-supervisor"


def test_the_start_evidence_is_believed_as_a_file(node):
    done = verify(node, node.state / "run/evidence.bin")
    assert done.returncode == 0 and "proves no connection" in done.stdout, done.stderr


@pytest.mark.parametrize("change,cause", [
    (lambda t: t.replace("development allowed", ""), "CM-EVD-DEVELOPMENT"),
    (lambda t: t.replace("node ", "node " + "0" * 64 + " ak " + "0" * 64 + "\n#"), "CM-EVD-NODE"),
    (lambda t: t[:t.index(" ak ") + 4] + "0" * 64 + t[t.index(" ak ") + 68:], "CM-EVD-AK"),
    (lambda t: t.replace("pcr 14 ", "pcr 14 " + "0" * 64 + "\n#"), "CM-EVD-PCR-VALUE"),
    (lambda t: t + "pcr 7 " + "0" * 64 + "\n", "CM-EVD-PCR-VALUE"),
    (lambda t: t.replace("owner 04", "owner 05"), "CM-EVD-OWNER"),
    (lambda t: t.replace("package ", "package " + "0" * 64 + "\n#"), "CM-EVD-UNKNOWN-PACKAGE"),
])
def test_what_the_trust_file_does_not_say_is_refused(node, tmp_path, change, cause):
    (tmp_path / "trust").write_text(change(node.trust.read_text()))
    done = verify(node, f"https://{node.address}", trust=tmp_path / "trust")
    assert done.returncode == 7 and cause in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "nodes 1\n", "adapter\n", "adapter all\n", "adapter-owner none\n", "pcr 24 " + "0" * 64, "development yes\n",
                                  "x" * 600, "owner 04\n"])
def test_a_malformed_trust_file_names_its_line(node, tmp_path, text):
    (tmp_path / "trust").write_text(text)
    done = verify(node, f"https://{node.address}", trust=tmp_path / "trust")
    assert done.returncode == 3 and "CM-TRUST-LINE" in done.stderr


def test_a_file_answers_for_its_nonce_age_and_clock_alone(node, tmp_path):
    import http.client
    nonce = secrets.token_bytes(32)
    link = http.client.HTTPSConnection(node.address, context=node.context(), timeout=20)
    link.request("GET", "/v1/attestation?nonce=" + nonce.hex())
    file = tmp_path / "evidence"
    file.write_bytes(link.getresponse().read())
    link.close()
    now = int(time.time())
    assert verify(node, file, "--nonce", nonce.hex()).returncode == 0
    for words, cause in [(["--nonce", "0" * 64], "CM-EVD-NONCE"),
                         (["--at", str(now + 700)], "CM-EVD-AGE"),
                         (["--at", str(now - 100)], "CM-EVD-FUTURE")]:
        done = verify(node, file, *words)
        assert done.returncode == 7 and cause in done.stderr
    assert verify(node, file, "--last", tmp_path / "last").returncode == 0
    reset, restart, clock = (tmp_path / "last").read_text().split()
    (tmp_path / "last").write_text(f"{reset} {restart} {int(clock) + 1}\n")
    assert "CM-EVD-CLOCK" in verify(node, file, "--last", tmp_path / "last").stderr
    assert "CM-EVD-KIND" in verify(node, node.state / "run/evidence.bin", "--nonce", "0" * 64).stderr


def test_every_flipped_byte_of_a_file_is_refused(node, tmp_path):
    blob = (node.state / "run/evidence.bin").read_bytes()
    file, causes = tmp_path / "evidence", set()
    for at in range(0, len(blob), 7):
        changed = bytearray(blob)
        changed[at] ^= 1
        file.write_bytes(bytes(changed))
        done = verify(node, file)
        if 20 <= at < 28 and done.returncode == 0:
            continue  # a second more or less
        assert done.returncode == 7, at
        causes.add(done.stderr.split(":")[1].strip())
    assert len(causes) >= 9, causes


class Relay(threading.Thread):
    """Somebody in between: passes bytes on, with a TLS of its own (key None: plain bytes)."""

    def __init__(self, target: str, certificate: pathlib.Path | None):
        super().__init__(daemon=True)
        self.target, self.certificate = target, certificate
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]

    def run(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        outside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        outside.check_hostname, outside.verify_mode = False, ssl.CERT_NONE
        near = context.wrap_socket(self.listener.accept()[0], server_side=True)
        host, port = self.target.split(":")
        far = outside.wrap_socket(socket.create_connection((host, int(port)), 10))
        far.sendall(near.recv(4096))
        while data := far.recv(65536):
            near.sendall(data)
        near.close()
        far.close()


def relay_verify(node, certificate):
    relay = Relay(node.address, certificate)
    relay.start()
    return verify(node, f"https://{relay.address}")


def test_a_relay_with_a_key_of_its_own_is_refused(node, tmp_path):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:P-256", "-nodes", "-keyout", tmp_path / "key", "-out",
                    tmp_path / "pem", "-subj", "/CN=x", "-days", "1"], check=True,
                   capture_output=True)
    (tmp_path / "both").write_text((tmp_path / "key").read_text() + (tmp_path / "pem").read_text())
    done = relay_verify(node, tmp_path / "both")
    assert done.returncode == 7 and "CM-EVD-TLS-KEY" in done.stderr


def test_a_keeper_dies_and_the_key_stays_the_one_that_connections_were_made_with(node, tmp_path):
    """Twice, so that the second successor takes what the first one took."""
    import http.client
    pinned = node.context()
    certificate = (node.state / "run/tls-certificate.pem").read_bytes()
    key, gateway, worker = node.key("pinned"), node.pid("gateway"), node.pid("worker")
    spki = x509.load_pem_x509_certificate(certificate).public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    old = http.client.HTTPSConnection(node.address, context=pinned, timeout=20)

    def evidence(link) -> evidence_reader.Evidence:
        link.request("GET", "/v1/attestation?nonce=" + secrets.token_hex(32))
        answer = link.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return evidence_reader.Evidence(body)

    nodes.wait(lambda: node.get("/v1/models", key)[0] == 200, 5)
    assert evidence(old).tls_key == hashlib.sha256(spki).digest()
    for _ in range(2):
        keeper = node.pid("keeper")
        os.kill(worker, signal.SIGSTOP)  # the request is under way all the while
        try:
            flying = http.client.HTTPSConnection(node.address, context=pinned, timeout=20)
            flying.request("POST", "/v1/chat/completions", json.dumps(
                {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20,
                 "ignore_eos": True, "stream": True}),
                {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
            nodes.wait(lambda: "casemate_requests_in_flight 1" in node.get("/metrics", key)[1], 3)
            os.kill(keeper, signal.SIGKILL)
            nodes.wait(lambda: node.pid("keeper") not in (0, keeper), 5, node.tail)
            done = nodes.wait(lambda: (d := verify(node, f"https://{node.address}")).returncode != 9 and d, 5)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert done.returncode == 0, done.stderr
        text = flying.getresponse().read().decode()
        assert text.endswith("data: [DONE]\n\n") and "event: error" not in text
        assert evidence(old).tls_key == hashlib.sha256(spki).digest()
        assert (node.state / "run/tls-certificate.pem").read_bytes() == certificate
        assert (node.pid("gateway"), node.pid("worker")) == (gateway, worker)
        test_a_relay_with_a_key_of_its_own_is_refused(node, tmp_path)


def gateway_key(node):
    """The gateway's TLS key as root finds it: four words in its memory that make the certificate's point."""
    certificate = x509.load_pem_x509_certificate(ssl.get_server_certificate(
        tuple(node.address.split(":"))).encode())
    point = certificate.public_key().public_numbers()
    tried, pid = set(), node.status()["roles"]["gateway"]["pid"]
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            start, end = (int(x, 16) for x in span.split("-"))
            if not rights.startswith("rw-p"):
                continue
            memory.seek(start)
            words = numpy.frombuffer(memory.read(end - start), "<u8")
            # Words of a key are large, all four of them; addresses and counts are not.
            large = words >= 1 << 50
            for at in numpy.flatnonzero(large[:-3] & large[1:-2] & large[2:-1] & large[3:]):
                tried.add(words[at:at + 4].tobytes())
    for candidate in tried:
        try:
            key = ec.derive_private_key(int.from_bytes(candidate, "little"), ec.SECP256R1())
        except ValueError:
            continue
        if key.public_key().public_numbers() == point:
            return key, certificate
    raise AssertionError(f"no key among {len(tried)} places")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the gateway's memory")
def test_a_relay_that_stole_the_key_is_refused_by_the_exporter(node, tmp_path):
    key, certificate = gateway_key(node)
    (tmp_path / "both").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                          serialization.NoEncryption()) +
        certificate.public_bytes(serialization.Encoding.PEM))
    done = relay_verify(node, tmp_path / "both")
    assert done.returncode == 7 and "CM-EVD-EXPORTER" in done.stderr
    assert verify(node, f"https://{node.address}").returncode == 0


@pytest.mark.parametrize("subject,code", [("https://127.0.0.1:1", 9), ("http://x:1", 2),
                                          ("https://127.0.0.1", 2), ("/nowhere/file", 9)])
def test_what_cannot_be_reached_is_named(node, subject, code):
    done = verify(node, subject)
    assert done.returncode == code and done.stderr


def test_it_links_no_tpm_library(build):
    needed = subprocess.run(["ldd", build / "bin/casemate-verify"], capture_output=True,
                            text=True).stdout
    assert "libcrypto" in needed and "tss2" not in needed and "tpms" not in needed
