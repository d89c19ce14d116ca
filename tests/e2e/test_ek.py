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
    node.start()
    node.bare, node.folder, node.tpm = bare, folder, tpm
    yield node
    assert node.stop() == 0
    tpm.stop()


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
    done = verify(node, good + line + "\n")
    assert done.returncode in (3, 7) and ("CM-TRUST-LINE" in done.stderr or "CM-EK-FORM" in done.stderr)
    only = "\n".join(row for row in good.splitlines() if not row.startswith("ek-authority"))
    assert verify(node, only).returncode == 3  # an AK without anybody who vouches for its TPM
