"""A TPM that its maker vouches for: certificates of endorsement keys, from enrolment to verification."""
import base64
import pathlib
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import swtpm as tpms  # noqa: E402
import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return tpms.Maker(tmp_path_factory.mktemp("maker") / "ca")


@pytest.fixture(scope="module")
def node(build, maker, tmp_path_factory):
    """A node of which the TPM holds its maker's certificate, serving."""
    folder = tmp_path_factory.mktemp("ek")
    tiny_model.write(str(folder / "tiny.gguf"))
    tpm = tpms.Swtpm(folder / "swtpm").start()
    bare = nodes.Node(build / "bin", folder / "bare", folder / "owner")
    bare.make(folder / "tiny.gguf", "tiny", tpm=str(tpm.path))
    tpm.certificate_put(maker.certify(tpms.ek_point((bare.state / "enrolment.bin").read_bytes())),
                        folder)
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    (folder / "maker.pem").write_text(maker.pem("root", "issuer"))
    node.make(folder / "tiny.gguf", "tiny", "--ek-authority", folder / "maker.pem", tpm=str(tpm.path))
    prove(node)
    node.start()
    node.bare, node.folder, node.tpm = bare, folder, tpm
    yield node
    assert node.stop() == 0
    tpm.stop()


def prove(node, answer=None) -> None:
    """The owner's challenge, and the node's answer, each a file."""
    record = node.state / "enrolment.bin"
    node.run("casemate-pack", "challenge", "--node", record)
    node.run("casemate", "answer", f"{record}.challenge", "--state", (answer or node).state, "--out",
             f"{record}.answer")


def trust(node, pem: str, of=None):
    (node.folder / "some.pem").write_text(pem)
    return node.run("casemate-pack", "trust", node.package, "--node",
                    (of or node).state / "enrolment.bin", "--measurement",
                    node.state / "node.measure", "--ek-authority", node.folder / "some.pem",
                    *node.pcrs, check=False)


def verify(node, text: str, *words, subject=None):
    (node.folder / "trust").write_text(text)
    return node.run("casemate-verify", subject or f"https://{node.address}", "--trust",
                    node.folder / "trust", *words, check=False)


@pytest.mark.parametrize("names", [("root", "issuer"), ("issuer",)])
def test_a_tpm_of_a_believed_maker_is_believed(node, maker, names):
    made = trust(node, maker.pem(*names))
    assert made.returncode == 0 and "ek-authority " in made.stdout and "\nak " in made.stdout
    assert "node " not in made.stdout  # the endorsement key is pinned nowhere
    done = verify(node, made.stdout)
    assert done.returncode == 0 and "believed" in done.stdout, done.stderr


def test_another_maker_and_a_gap_in_the_chain_are_refused(node, maker, tmp_path):
    other = tpms.Maker(tmp_path / "other")
    other.certify(tpms.ek_point((node.state / "enrolment.bin").read_bytes()))
    good = trust(node, maker.pem("root", "issuer")).stdout
    keep = "\n".join(line for line in good.splitlines() if not line.startswith("ek-authority"))
    for pem in (other.pem("root", "issuer"), maker.pem("root")):
        refused = trust(node, pem)
        assert refused.returncode == 5 and "CM-EK-CHAIN" in refused.stderr
        lines = [f"ek-authority {base64.b64encode(der).decode()}" for der in ders(pem)]
        done = verify(node, "\n".join([keep, *lines, ""]))
        assert done.returncode == 7 and "CM-EK-CHAIN" in done.stderr


def ders(pem: str) -> list[bytes]:
    """swtpm_localca writes text before each block."""
    blocks = pem.split("-----BEGIN CERTIFICATE-----")[1:]
    return [base64.b64decode(block.split("-----END")[0]) for block in blocks]


def test_a_chain_outside_its_time_is_refused(node, maker):
    """swtpm_localca's end in the year 9999: before their beginning. After the end: the unit vectors."""
    good = trust(node, maker.pem("root", "issuer")).stdout
    before = str(int(time.time()) - 86400)
    done = verify(node, good, "--at", before, subject=node.state / "run/evidence.bin")
    assert done.returncode == 7 and "CM-EK-EXPIRED" in done.stderr
    assert verify(node, good, subject=node.state / "run/evidence.bin").returncode == 0


def test_a_tpm_without_a_certificate_is_refused(node, maker):
    refused = trust(node, maker.pem("root", "issuer"), of=node.bare)
    assert refused.returncode == 5 and "CM-EK-ABSENT" in refused.stderr


def test_a_certificate_of_another_tpm_is_refused(node, maker, tmp_path):
    """An operator copies a real TPM's certificate into a TPM of his own."""
    mine = tpms.Swtpm(tmp_path / "mine").start()
    try:
        mine.certificate_put(maker.certify(tpms.ek_point((node.state / "enrolment.bin").read_bytes())),
                             tmp_path)
        node.run("casemate", "init", "--state", tmp_path / "state", "--tpm", mine.path, "--owner-key",
                 node.owner / "owner.pub", "--policy-key", node.owner / "policy.pub", "--package",
                 node.package, "--node-name", "liar", "--attest-mode", "restartable")
    finally:
        mine.stop()
    liar = nodes.Node(node.programs, tmp_path / "state", node.owner)
    refused = trust(node, maker.pem("root", "issuer"), of=liar)
    assert refused.returncode == 5 and "CM-EK-KEY" in refused.stderr
    packed = node.run("casemate-pack", "pack", node.folder / "tiny.gguf", "--out", tmp_path / "p",
                      "--owner", node.owner, "--node", liar.state / "enrolment.bin", "--measurement",
                      node.state / "node.measure", "--ek-authority", node.folder / "maker.pem",
                      *node.pcrs, check=False)
    assert packed.returncode == 5 and "CM-EK-KEY" in packed.stderr and not (tmp_path / "p").exists()


@pytest.mark.parametrize("line", ["ek-authority AAAA", "ek-authority !", "ak 12", "ek-authority"])
def test_a_malformed_line_is_named(node, maker, line):
    good = trust(node, maker.pem("root", "issuer")).stdout
    assert good
    done = verify(node, good + line + "\n")
    assert done.returncode in (3, 7) and ("CM-TRUST-LINE" in done.stderr or "CM-EK-FORM" in done.stderr)
    only = "\n".join(row for row in good.splitlines() if not row.startswith("ek-authority"))
    assert verify(node, only).returncode == 3  # an AK without anybody who vouches for its TPM


def record_with_own_ak(record: bytes) -> bytes:
    """What a liar sends: the certified endorsement key of a real TPM, and an attestation key that he
    holds as a file. Everything in it checks."""
    import hashlib
    import struct
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    key, at = ec.generate_private_key(ec.SECP256R1()), 8 + 4 + 4 + 64 + 32
    for _ in range(2):
        at += 4 + struct.unpack_from("<I", record, at)[0]
    size, = struct.unpack_from("<I", record, at)
    numbers = key.public_key().public_numbers()
    x, y = (n.to_bytes(32, "big") for n in (numbers.x, numbers.y))
    end = at + 4 + size
    made = record[:end - 66] + x + record[end - 34:end - 32] + y
    signed = end + 34 + 2 + 4 + 8 + 8 + 32 + 36
    made += record[end:signed]
    r, s = utils.decode_dss_signature(key.sign(
        hashlib.sha256(made).digest(), ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
    return made + r.to_bytes(32, "big") + s.to_bytes(32, "big") + record[signed + 64:]


def test_keys_of_two_tpms_are_refused_by_the_challenge(node, maker, tmp_path):
    """A maker's certificate says nothing of who signs the quotes: the challenge ties the two."""
    record = (node.state / "enrolment.bin").read_bytes()
    liar = nodes.Node(node.programs, tmp_path, node.owner)
    (tmp_path / "enrolment.bin").write_bytes(record_with_own_ak(record))
    refused = trust(node, maker.pem("root", "issuer"), of=liar)
    assert refused.returncode == 5 and "CM-PACK-UNPROVEN" in refused.stderr
    node.run("casemate-pack", "challenge", "--node", tmp_path / "enrolment.bin")
    assert node.stop() == 0  # one swtpm answers one at a time
    try:
        done = node.run("casemate", "answer", tmp_path / "enrolment.bin.challenge", "--state", node.state,
                        "--out", tmp_path / "enrolment.bin.answer", check=False)
        assert done.returncode == 5 and "CM-SEAL-CHALLENGE" in done.stderr
        # The answer to the true record's challenge is no answer for the false one.
        for name in ("answer", "expected"):
            (tmp_path / f"enrolment.bin.{name}").write_bytes(
                (node.state / f"enrolment.bin.{name}").read_bytes())
        refused = trust(node, maker.pem("root", "issuer"), of=liar)
        assert refused.returncode == 5 and "CM-PACK-UNPROVEN" in refused.stderr
        prove(node)
        assert trust(node, maker.pem("root", "issuer")).returncode == 0
    finally:
        node.start()
