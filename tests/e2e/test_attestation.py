"""Evidence of a running host, read by a reader that shares no code with it."""
import hashlib
import os
import pathlib
import secrets
import signal
import sys
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import evidence_reader  # noqa: E402
import node as nodes  # noqa: E402
import tiny_model  # noqa: E402


@pytest.fixture(scope="module", params=["restartable", "strict"])
def node(request, build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attest")
    tiny_model.write(str(folder / "tiny.gguf"))
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    node.make(folder / "tiny.gguf", "tiny", mode=request.param)
    node.mode = request.param
    node.start()
    yield node
    assert node.stop() == 0


def key_digest(node) -> bytes:
    certificate = x509.load_pem_x509_certificate(
        (node.state / "run/tls-certificate.pem").read_bytes())
    return hashlib.sha256(certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)).digest()


def fetch(node, nonce: bytes) -> bytes:
    import http.client
    link = http.client.HTTPSConnection(node.address, context=node.context(), timeout=20)
    link.request("GET", "/v1/attestation?nonce=" + nonce.hex())
    answer = link.getresponse()
    body = answer.read()
    link.close()
    assert answer.status == 200, body
    assert answer.getheader("Content-Type") == "application/octet-stream"
    return body


def test_the_service_keeps_its_own_evidence(node):
    evidence = evidence_reader.Evidence((node.state / "run/evidence.bin").read_bytes())
    assert evidence.kind == 1 and not any(evidence.nonce) and not any(evidence.exporter)
    assert evidence.mode == {"strict": 1, "restartable": 2}[node.mode]
    assert abs(evidence.made - time.time()) < 60 and evidence.tls_key == key_digest(node)
    kinds = [kind for kind, _ in evidence.events]
    prefix = [1] * 5 + [2, 3, 4, 5, 6]
    assert kinds == (prefix + [7, 8] if node.mode == "strict" else prefix)
    assert evidence.events[9][1] == evidence.core


def test_evidence_for_a_nonce_is_bound_to_key_and_connection(node):
    nonces = [secrets.token_bytes(32) for _ in range(2)]
    first, second = (evidence_reader.Evidence(fetch(node, nonce)) for nonce in nonces)
    assert first.kind == second.kind == 2 and [first.nonce, second.nonce] == nonces
    assert first.tls_key == key_digest(node)
    assert any(first.exporter) and first.exporter != second.exporter
    same = evidence_reader.Evidence(fetch(node, nonces[0]))
    assert same.exporter != first.exporter, "another connection, the same exporter"


@pytest.mark.parametrize("query", ["", "?nonce=", "?nonce=" + "0" * 63, "?nonce=" + "g" * 64,
                                   "?nonce=" + "0" * 64 + "&x=1", "?once=" + "0" * 64])
def test_a_malformed_nonce_is_refused(node, query):
    status, body = node.get("/v1/attestation" + query)
    assert status == 400 and "bad_nonce" in body


def test_every_flipped_byte_breaks_the_evidence(node):
    blob = fetch(node, secrets.token_bytes(32))
    evidence_reader.Evidence(blob)
    loose = [range(16, 28)]  # mode and time are not quoted: the verifier ties them to log and clock
    for at in range(len(blob)):
        if any(at in part for part in loose):
            continue
        changed = bytearray(blob)
        changed[at] ^= 1
        with pytest.raises(Exception):
            evidence_reader.Evidence(bytes(changed))


def test_readiness_falls_with_the_evidence(build, node, tmp_path):
    other = nodes.Node(build / "bin", tmp_path / "node", node.owner)
    other.make(node.state.parent / "tiny.gguf", "tiny")
    other.start("--evidence_refresh_ms", "1000", "--evidence_lifetime_ms", "2500")
    time.sleep(3)
    assert other.get("/readyz")[0] == 200, "it quotes again in time"
    keeper = other.pid("keeper")
    os.kill(keeper, signal.SIGSTOP)
    try:
        end = time.monotonic() + 6
        while other.get("/readyz")[0] == 200 and time.monotonic() < end:
            time.sleep(0.1)
        status, body = other.get("/readyz")
        assert status == 503 and "evidence_stale" in body
    finally:
        os.kill(keeper, signal.SIGCONT)
    end = time.monotonic() + 6
    while other.get("/readyz")[0] != 200 and time.monotonic() < end:
        time.sleep(0.1)
    assert other.get("/readyz")[0] == 200 and other.stop() == 0
