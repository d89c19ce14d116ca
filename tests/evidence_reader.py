"""An independent reader of evidence, from loader/evidence/FORMAT.md alone. Shares no code with the C
verifier: `cryptography` for the signatures, struct for the layout."""
import hashlib
import struct

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils


def public_point(public: bytes) -> bytes:
    """The P-256 point at the end of a TPM2B_PUBLIC."""
    assert struct.unpack(">H", public[:2])[0] == len(public) - 2
    assert public[-68:-66] == public[-34:-32] == b"\0\x20"
    return b"\4" + public[-66:-34] + public[-32:]


def ecdsa_check(point: bytes, signature: bytes, digest: bytes) -> None:
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    r, s = (int.from_bytes(signature[at:at + 32], "big") for at in (0, 32))
    key.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


class Evidence:
    """Every internal tie checked on construction; raises on any difference."""

    def __init__(self, blob: bytes):
        self.blob, self.at = blob, 0
        assert self.take(8) == b"CMEVID\0\0" and self.number() == 3
        self.kind, self.mode = self.number(), self.number()
        self.made = struct.unpack("<Q", self.take(8))[0]
        self.nonce, self.tls_key, self.exporter, self.core = (self.take(32) for _ in range(4))
        self.owner, self.owner_signature = self.take(65), self.take(64)
        self.enrolment, self.log, self.attest = (self.take(self.number()) for _ in range(3))
        self.signature = self.take(64)
        self.pcrs = {self.number(): self.take(32) for _ in range(self.number())}
        start = self.at
        self.adapters = [self.adapter() for _ in range(self.number())]
        self.adapters_part = blob[start:]
        assert self.at == len(blob)
        ecdsa_check(self.owner, self.owner_signature, self.core)
        self.enrolment_read()
        self.quote_check()
        self.log_check()

    def take(self, size: int) -> bytes:
        part = self.blob[self.at:self.at + size]
        assert len(part) == size
        self.at += size
        return part

    def adapter(self) -> dict:
        serial, name = struct.unpack("<Q", self.take(8))[0], self.take(64).rstrip(b"\0").decode()
        core, owner, signature = self.take(32), self.take(65), self.take(64)
        ecdsa_check(owner, signature, core)
        return {"serial": serial, "name": name, "core": core, "owner": owner}

    def number(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def enrolment_read(self) -> None:
        e, at, keys = self.enrolment, 16 + 64 + 32, []
        assert e[:8] == b"CMENROL\0"
        self.node = e[80:112]
        for _ in range(3):
            size = struct.unpack_from("<I", e, at)[0]
            keys.append(e[at + 4:at + 4 + size])
            at += 4 + size
        at += 34 + 2 + 4 + 8
        self.pcr, _ = struct.unpack_from("<II", e, at)
        self.pcr_start = e[at + 8:at + 40]
        at += 40
        size, wanted = struct.unpack_from("<I", e, at)[0], e[at + 4:at + 36]
        at += 36
        self.certificate = e[at + 64:]
        assert len(self.certificate) == size
        assert wanted == (hashlib.sha256(self.certificate).digest() if size else bytes(32))
        assert hashlib.sha256(keys[0][2:]).digest() == self.node
        self.ak = public_point(keys[2])
        ecdsa_check(self.ak, e[at:at + 64], hashlib.sha256(e[:at]).digest())

    def quote_check(self) -> None:
        a, at = self.attest, 6
        assert a[:6] == b"\xffTCG\x80\x18"
        size = struct.unpack_from(">H", a, at)[0]
        at += 2 + size
        size = struct.unpack_from(">H", a, at)[0]
        extra = a[at + 2:at + 2 + size]
        at += 2 + size + 8 + 4 + 4 + 1 + 8
        assert a[at:at + 7] == b"\0\0\0\1\0\x0b\3"
        bits = int.from_bytes(a[at + 7:at + 10], "little")
        assert [i for i in range(24) if bits >> i & 1] == sorted(self.pcrs)
        assert a[at + 10:at + 12] == b"\0\x20" and len(a) == at + 44
        assert a[at + 12:] == hashlib.sha256(b"".join(self.pcrs[i] for i in sorted(self.pcrs))).digest()
        assert extra == hashlib.sha256(b"casemate-quote-v2" + bytes([self.kind]) + self.nonce +
                                       self.tls_key + self.exporter + self.core +
                                       hashlib.sha256(self.adapters_part).digest()).digest()
        ecdsa_check(self.ak, self.signature, hashlib.sha256(a).digest())

    def log_check(self) -> None:
        log, at, pcr, self.events = self.log, 16, self.pcr_start, []
        assert log[:8] == b"CMLOG\0\0\0" and struct.unpack_from("<I", log, 8)[0] == 1
        for _ in range(struct.unpack_from("<I", log, 12)[0]):
            kind, size = struct.unpack_from("<II", log, at)
            data = log[at + 8:at + 8 + size]
            at += 8 + size
            self.events.append((kind, data))
            digest = hashlib.sha256(struct.pack("<I", kind) + data).digest()
            pcr = hashlib.sha256(pcr + digest).digest()
        assert at == len(log) and pcr == self.pcrs[self.pcr]
