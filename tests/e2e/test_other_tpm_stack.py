"""The sealed key seen by software that is not ours: tpm2-tss's own ESYS and TCTI, through Debian's
tpm2-tools, on a real swtpm. The same object, the same signed state: released in the right one, and
refused in a wrong one. The formats come from FORMAT.md and TPM 2.0 Part 2, by struct."""
import hashlib
import pathlib
import struct
import sys

import pytest
from cryptography.hazmat.primitives import serialization

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import package_reader  # noqa: E402
import swtpm as tpms  # noqa: E402
import tiny_model  # noqa: E402

COUNTER = "0x0180CA5E"


def sized(blob: bytes) -> bytes:
    return struct.pack(">H", len(blob)) + blob


def slot_parts(package: bytes) -> list[bytes]:
    """Public area, duplicate, seed, policy reference: each u16-prefixed, in the first slot."""
    kind, size = struct.unpack_from("<II", package, 8192 + 24)
    payload = package[8192 + 24 + 104:][:size]
    parts, at = [], 0
    while at < size:
        length, = struct.unpack_from(">H", payload, at)
        parts.append(payload[at + 2:at + 2 + length])
        at += 2 + length
    assert kind == 1 and len(parts) == 4
    return parts


def states(policy: bytes) -> list[dict]:
    """The signed states of a policy list (loader/tpm/policy.c)."""
    assert policy[:8] == b"CMPOLCY\0"
    found, at = [], 16
    for _ in range(struct.unpack_from("<I", policy, 12)[0]):
        count, = struct.unpack_from("<I", policy, at)
        pcrs = [struct.unpack_from("<I", policy, at + 4 + 36 * i)[0] for i in range(count)]
        at += 4 + 36 * count
        found.append({"pcrs": pcrs, "most": struct.unpack_from("<Q", policy, at)[0],
                      "signature": policy[at + 8 + 34 + 64:at + 8 + 34 + 128]})
        at += 8 + 34 + 128
    return found


class Reader:
    """One try to unseal, step by step, as TPM 2.0 Part 3 has it."""

    def __init__(self, tpm: tpms.Swtpm, folder: pathlib.Path, node: nodes.Node):
        self.tpm, self.folder, self.node = tpm, folder, node
        folder.mkdir()
        self.state = states(node.package.with_name(node.package.name + ".policy").read_bytes())[0]
        public, duplicate, seed, ref = slot_parts(node.package.read_bytes())
        self.put("object.pub", public)
        self.put("duplicate", sized(duplicate))
        self.put("seed", sized(seed))
        self.put("ref", ref)
        self.put("most", struct.pack(">Q", self.state["most"]))

    def put(self, name: str, blob: bytes) -> None:
        (self.folder / name).write_bytes(blob)

    def tool(self, name: str, *words, check=True):
        """Without a resource manager: what a tool leaves in the TPM goes at once."""
        done = self.tpm.tool(name, *words, check=check)
        self.tpm.tool("flushcontext", "-t")
        return done

    def session(self, name: str) -> str:
        path = self.folder / name
        self.tool("startauthsession", "--policy-session", "-S", path)
        return str(path)

    def endorsed(self, name: str, command: str, *words) -> None:
        """A command under the endorsement key, whose policy is PolicySecret(endorsement)."""
        session = self.session(name)
        self.tool("policysecret", "-S", session, "-c", "e")
        self.tool(command, "-C", self.folder / "ek", "-P", f"session:{session}", *words)
        self.tool("flushcontext", session)

    def load(self) -> None:
        f = self.folder
        self.tool("createek", "-G", "ecc", "-c", f / "ek", "-u", f / "ek.pub")
        record = (self.node.state / "enrolment.bin").read_bytes()
        assert tpms.ek_point(record) == (f / "ek.pub").read_bytes()[-66:-34] + \
            (f / "ek.pub").read_bytes()[-32:]
        self.endorsed("s1", "import", "-u", f / "object.pub", "-i", f / "duplicate", "-s", f / "seed",
                      "-r", f / "object.priv")
        self.endorsed("s2", "load", "-u", f / "object.pub", "-r", f / "object.priv", "-c", f / "object")

    def authority(self) -> None:
        pem = (self.node.owner / "policy.pub").read_bytes()
        numbers = serialization.load_pem_public_key(pem).public_numbers()
        x, y = (n.to_bytes(32, "big") for n in (numbers.x, numbers.y))
        area = struct.pack(">HHIHHHHHH", 0x23, 0xb, 0x40040, 0, 0x10, 0x18, 0xb, 3, 0x10)
        self.put("authority.pub", sized(area + sized(x) + sized(y)))
        f = self.folder
        self.tool("loadexternal", "-C", "o", "-u", f / "authority.pub", "-c", f / "authority", "-n",
                  f / "authority.name")

    def unseal(self, approved: bytes = b"") -> tuple[str, bytes]:
        """(the command that refused, or "") and the key. approved: claim this state's digest."""
        f = self.folder
        self.load()
        self.authority()
        session = self.session("policy")
        pcrs = ",".join(map(str, self.state["pcrs"]))
        steps = [("policypcr", ["-S", session, "-l", f"sha256:{pcrs}"]),
                 ("policynv", ["-S", session, "-i", f / "most", "-C", COUNTER, COUNTER, "ule"]),
                 ("policycommandcode", ["-S", session, "-L", f / "approved", "TPM2_CC_Unseal"])]
        for name, words in steps:
            if self.tool(name, *words, check=False).returncode != 0:
                return name, b""
        approved = approved or (f / "approved").read_bytes()
        self.put("approved", approved)
        self.put("digest", hashlib.sha256(approved + (f / "ref").read_bytes()).digest())
        signature = self.state["signature"]
        self.put("signature", struct.pack(">HH", 0x18, 0xb) + sized(signature[:32]) +
                 sized(signature[32:]))
        steps = [("verifysignature", ["-c", f / "authority", "-d", f / "digest", "-s", f / "signature",
                                      "-t", f / "ticket"]),
                 ("policyauthorize", ["-S", session, "-i", f / "approved", "-q", f / "ref", "-n",
                                      f / "authority.name", "-t", f / "ticket"]),
                 ("unseal", ["-c", f / "object", "-p", f"session:{session}", "-o", f / "key"])]
        for name, words in steps:
            if self.tool(name, *words, check=False).returncode != 0:
                return name, b""
        return "", (f / "key").read_bytes()


@pytest.fixture
def node(build, tmp_path):
    """A node on swtpm whose PCR stands where a start has left it."""
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    (tmp_path / "pass").write_text("a passphrase\n")
    (tmp_path / "pass").chmod(0o600)
    tpm = tpms.Swtpm(tmp_path / "swtpm").start()
    node = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(tmp_path / "tiny.gguf", "tiny", "--recovery", tmp_path / "recovery", "--passphrase-file",
              tmp_path / "pass", tpm=str(tpm.path))
    node.start()
    assert node.stop() == 0
    node.tpm, node.folder = tpm, tmp_path
    yield node
    tpm.stop()


def test_it_is_released_in_the_signed_state_and_refused_in_others(node):
    key = package_reader.recovery_key((node.folder / "recovery").read_bytes(), "a passphrase")
    assert Reader(node.tpm, node.folder / "right", node).unseal() == ("", key)
    # No session, and a session that proves nothing: the object has no other way.
    reader = Reader(node.tpm, node.folder / "none", node)
    reader.load()
    assert reader.tool("unseal", "-c", reader.folder / "object", check=False).returncode != 0
    session = reader.session("empty")
    assert reader.tool("unseal", "-c", reader.folder / "object", "-p", f"session:{session}",
                       check=False).returncode != 0
    node.tpm.tool("flushcontext", session)
    # Another PCR of the machine: nothing changes. Ours: the signature is over another state.
    node.tpm.tool("pcrextend", "13:sha256=" + "11" * 32)
    assert Reader(node.tpm, node.folder / "other", node).unseal() == ("", key)
    node.tpm.tool("pcrextend", "14:sha256=" + "11" * 32)
    assert Reader(node.tpm, node.folder / "pcr", node).unseal()[0] == "verifysignature"
    # With the signed state's digest the signature is good, and the TPM sees that it is not its own.
    signed = (node.folder / "right" / "approved").read_bytes()
    assert Reader(node.tpm, node.folder / "claim", node).unseal(signed)[0] == "policyauthorize"


def refused(node, cause: str) -> None:
    node.start(wait=False)
    assert node.service.wait(20) == 5 and cause in node.tail()
    node.service = None


def test_a_revoked_state_is_refused_by_the_tpm(node):
    assert Reader(node.tpm, node.folder / "right", node).unseal()[0] == ""
    node.tpm.tool("nvincrement", "-C", "o", COUNTER)
    assert Reader(node.tpm, node.folder / "stepped", node).unseal()[0] == "policynv"
    # Deleted and defined again it does not go back: the old state stays revoked.
    node.tpm.tool("nvundefine", "-C", "o", COUNTER)
    (node.folder / "policy").write_bytes((node.state / "enrolment.bin").read_bytes()[80:112])
    node.tpm.tool("nvdefine", "-C", "o", "-s", "8", "-a", "nt=counter|ownerwrite|authread|ownerread|no_da",
                  "-L", node.folder / "policy", COUNTER)
    node.tpm.tool("nvincrement", "-C", "o", COUNTER)
    refused(node, "CM-SEAL-COUNTER")  # the same name as before, and a greater value
    assert Reader(node.tpm, node.folder / "again", node).unseal()[0] == "policynv"


def test_a_signature_of_another_authority_is_refused(node):
    reader = Reader(node.tpm, node.folder / "forged", node)
    reader.state["signature"] = bytes([reader.state["signature"][0] ^ 1]) + reader.state["signature"][1:]
    assert reader.unseal()[0] == "verifysignature"
