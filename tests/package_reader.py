"""An independent reader of sealed packages, from loader/package/FORMAT.md alone.

Shares no code with the C readers: `cryptography` for the ciphers, struct for the layout."""
import hashlib
import hmac
import struct

import numpy
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

HEADER_MAC, MANIFEST, DATA, SLOTS = 1, 2, 3, 4


class Package:
    """Everything checked and decrypted on construction; raises on any difference."""

    def __init__(self, blob: bytes, key: bytes):
        self.blob, self.key = blob, key
        assert blob[:16] == b"CASEMATE" + struct.pack("<II", 1, 73728) and not any(blob[16:4096])
        core = blob[4096:8192]
        assert core[:8] == b"CMCORE\0\0" and not any(core[352:])
        (version, self.suite, self.segment_bytes, shards, self.revision, _, reserved) = \
            struct.unpack_from("<IIIIQII", core, 8)
        assert version == 1 and shards == 1 and reserved == 0
        self.salt = core[40:72]
        (m_at, m_bytes, t_at, segments, p_at, p_bytes, file_bytes) = \
            struct.unpack_from("<7Q", core, 72)
        assert file_bytes == len(blob) == p_at + p_bytes
        assert not any(blob[m_at + m_bytes:t_at]) and not any(blob[t_at + 48 * segments:p_at])
        digest = hashlib.sha256(core[:256]).digest()
        self.core_digest = digest
        owner = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + core[192:256])
        r, s = (int.from_bytes(core[at:at + 32], "big") for at in (256, 288))
        owner.verify(utils.encode_dss_signature(r, s), digest,
                     ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        assert hmac.digest(self.derive(HEADER_MAC, 32), digest, "sha256") == core[320:352]
        self.slots_check(digest)
        sealed = blob[m_at:m_at + m_bytes]
        assert hashlib.sha256(sealed).digest() == core[128:160]
        self.manifest = Manifest(self.open(self.derive(MANIFEST, 36), 0, sealed), p_bytes)
        table = blob[t_at:t_at + 48 * segments]
        assert hashlib.sha256(table).digest() == core[160:192]
        data_key = self.derive(DATA, 36)
        parts = []
        for index in range(segments):
            start = p_at + index * self.segment_bytes
            cipher = blob[start:min(start + self.segment_bytes, file_bytes)]
            tag, sha = table[48 * index:48 * index + 16], table[48 * index + 16:48 * index + 48]
            assert hashlib.sha256(cipher).digest() == sha
            parts.append(self.open(data_key, index, cipher + tag))
        self.payload = b"".join(parts)

    def derive(self, purpose: int, size: int, shard: int = 0) -> bytes:
        info = b"casemate/1" + bytes([self.suite, purpose]) + struct.pack("<I", shard)
        return HKDF(hashes.SHA256(), size, self.salt, info).derive(self.key)

    def open(self, key: bytes, index: int, sealed: bytes) -> bytes:
        cipher = AESGCM(key[:32]) if self.suite == 1 else ChaCha20Poly1305(key[:32])
        return cipher.decrypt(key[32:] + struct.pack(">Q", index), sealed, None)

    def slots_check(self, digest: bytes) -> None:
        copies = [self.blob[at:at + 32768] for at in (8192, 40960)]
        whole = [c for c in copies if hashlib.sha256(c[:32736]).digest() == c[32736:]]
        assert whole
        best = max(whole, key=lambda c: struct.unpack_from("<Q", c, 8))
        covered = digest + hashlib.sha256(best[:32704]).digest()
        assert hmac.digest(self.derive(SLOTS, 32), covered, "sha256") == best[32704:32736]
        (count,) = struct.unpack_from("<I", best, 16)
        self.slots = [best[24 + 4000 * i:24 + 4000 * (i + 1)] for i in range(count)]

    def weights(self, tensor: dict) -> numpy.ndarray:
        """A tensor's values, float32 [rows, columns]."""
        rows, columns, kind = tensor["rows"], tensor["columns"], tensor["kind"]
        at = tensor["offset"]
        if kind == 1:
            return numpy.frombuffer(self.payload, "<f4", rows, at)
        if kind == 6:
            padded = (rows + 15) // 16 * 16
            tiles = numpy.frombuffer(self.payload, "<f2", padded * columns, at)
            values = tiles.reshape(-1, columns, 16).transpose(0, 2, 1).reshape(padded, columns)
            assert not values[rows:].any()
            return values[:rows].astype(numpy.float32)
        tiles, blocks = (rows + 31) // 32 * 2, (columns + 31) // 32
        if kind == 5:
            # byte 64*(k/2) + 4*r + 2*(k%2)  ->  [tile, block, k/2, r, k%2]
            high = numpy.frombuffer(self.payload, "<u2", tiles * blocks * 512, at).astype("<u4")
            values = (high << 16).view("<f4").reshape(tiles, blocks, 16, 16, 2)
            return values.transpose(0, 3, 1, 2, 4).reshape(tiles * 16, -1)[:rows, :columns]
        bits, zero = {2: (4, None), 3: (4, 8), 4: (8, 128), 7: (5, None), 8: (5, 16)}[kind]
        quants = numpy.frombuffer(self.payload, numpy.uint8, tiles * blocks * 64 * bits, at)
        scales = numpy.frombuffer(self.payload, "<f2", tiles * blocks * (16 if zero else 32),
                                  tensor["scale_offset"]).astype(numpy.float32)
        lines = quants.reshape(tiles, blocks, bits, 16, 4)
        if bits == 8:
            # byte 64*(k/4) + 4*r + k%4  ->  [tile, block, k/4, r, k%4]
            q = lines
        else:
            q = numpy.concatenate([lines[:, :, :4] & 15, lines[:, :, :4] >> 4], 2)
        if bits == 5:
            # byte 256 + 4*r + k%4, bit k/4
            fifth = numpy.unpackbits(lines[:, :, 4], axis=-1, bitorder="little")
            q = q + 16 * fifth.reshape(tiles, blocks, 16, 4, 8).transpose(0, 1, 4, 2, 3)
        q = q.transpose(0, 3, 1, 2, 4).reshape(tiles * 16, blocks, 32).astype(numpy.float32)
        scales = scales.reshape(tiles, blocks, -1, 16).transpose(2, 0, 3, 1)
        d = scales[0].reshape(tiles * 16, blocks, 1)
        if zero is None:
            values = d * q + scales[1].reshape(tiles * 16, blocks, 1)
        else:
            values = d * (q - zero)
        return values.reshape(tiles * 16, blocks * 32)[:rows, :columns]


class Manifest:
    SHAPE = ("architecture", "vocabulary", "width", "layers", "heads", "kv_heads", "head_width",
             "rope_width", "ffn_width", "context_max", "tied_head")

    def __init__(self, blob: bytes, payload_bytes: int):
        self.tensors, self.records, at = [], {}, 0
        while at < len(blob):
            tag, reserved, size = struct.unpack_from("<HHI", blob, at)
            body = blob[at + 8:at + 8 + size]
            assert reserved == 0 and len(body) == size
            at += 8 + size
            if tag == 32:
                self.tensors.append(self.tensor(body, payload_bytes))
            else:
                assert tag not in self.records
                self.records[tag] = body
        self.name = self.records[1].decode()
        if 7 in self.records:
            self.adapter_read()
            return
        assert [t for t in self.records if t not in (5, 6, 13, 14, 15)] == [1, 2, 3, 4, 8, 9, 10, 11, 12, 16]
        assert list(self.records) == sorted(self.records)
        self.decoder = struct.unpack("<6I6f", self.records[5]) if 5 in self.records else None
        self.loss = struct.unpack("<If", self.records[6]) if 6 in self.records else None
        self.rope_factors = numpy.frombuffer(self.records.get(14, b""), "<f4")
        self.long_context, = struct.unpack_from("<I", self.records.get(15, bytes(4)))
        self.long_factors = numpy.frombuffer(self.records.get(15, b"")[4:], "<f4")
        self.ranks = numpy.frombuffer(self.records.get(13, b""), "<u4")
        self.shape = dict(zip(self.SHAPE, struct.unpack_from("<11I", self.records[4])))
        lengths = struct.unpack(f"<{self.shape['vocabulary']}H", self.records[9])
        self.tokens, start = [], 0
        for length in lengths:
            self.tokens.append(self.records[10][start:start + length])
            start += length
        self.merges = numpy.frombuffer(self.records[12], "<u4").reshape(-1, 2)
        self.chat, = struct.unpack_from("<I", self.records[16])
        self.default_system = self.records[16][4:].decode()

    def adapter_read(self):
        assert list(self.records) == [1, 2, 3, 7] and len(self.records[7]) == 72
        self.base = self.records[7][:32]
        self.rank, self.scale, self.rounding = struct.unpack_from("<Iff", self.records[7], 32)
        names = ("layers", "width", "heads", "kv_heads", "head_width", "rope_width", "ffn_width")
        self.shape = dict(zip(names, struct.unpack_from("<7I", self.records[7], 44)))

    @staticmethod
    def tensor(body: bytes, payload_bytes: int) -> dict:
        names = ("layer", "role", "kind", "rows", "columns", "reserved", "offset", "scale_offset",
                 "bytes")
        tensor = dict(zip(names, struct.unpack_from("<6I3Q", body)))
        tensor["name"] = body[48:].decode()
        assert tensor["offset"] % 4096 == 0 and tensor["offset"] + tensor["bytes"] <= payload_bytes
        return tensor


def recovery_key(blob: bytes, passphrase: str) -> bytes:
    assert blob[:8] == b"CMRECOV\0" and len(blob) == 148
    version, log2_n, r, p = struct.unpack_from("<4I", blob, 8)
    assert version == 1
    kek = Scrypt(blob[24:56], 32, 1 << log2_n, r, p).derive(passphrase.encode())
    return AESGCM(kek).decrypt(blob[56:68], blob[100:], blob[:100])
