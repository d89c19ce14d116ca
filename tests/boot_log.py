"""Writes firmware event logs as a PC's firmware does (TCG PC Client Platform Firmware Profile, sections 9 and
10), and replays them: the other side of loader/evidence/boot_log.c, sharing nothing with it."""
import hashlib
import struct

NO_ACTION, SEPARATOR, POST_CODE, ACTION = 3, 4, 1, 0x80000007
BOOT_APPLICATION, DRIVER_CONFIG, AUTHORITY = 0x80000003, 0x80000001, 0x800000E0


class Log:
    def __init__(self, algorithms=((4, 20), (11, 32))):
        body = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms))
        body += b"".join(struct.pack("<HH", *row) for row in algorithms) + b"\0"
        self.blob = struct.pack("<II", 0, NO_ACTION) + bytes(20) + struct.pack("<I", len(body)) + body
        self.algorithms, self.pcrs = algorithms, {pcr: bytes(32) for pcr in range(24)}

    def raw(self, pcr: int, kind: int, digest: bytes, data: bytes) -> "Log":
        digests = b"".join(struct.pack("<H", name) + (digest if name == 11 else b"\x11" * size)
                           for name, size in self.algorithms)
        self.blob += struct.pack("<III", pcr, kind, len(self.algorithms)) + digests + \
            struct.pack("<I", len(data)) + data
        return self

    def event(self, pcr: int, kind: int, data: bytes, measured: bytes | None = None) -> "Log":
        digest = hashlib.sha256(data if measured is None else measured).digest()
        self.pcrs[pcr] = hashlib.sha256(self.pcrs[pcr] + digest).digest()
        return self.raw(pcr, kind, digest, data)

    def locality(self, number: int) -> "Log":
        self.pcrs[0] = bytes(31) + bytes([number])
        return self.raw(0, NO_ACTION, bytes(32), b"StartupLocality\0" + bytes([number]))

    def boot(self) -> "Log":
        """A whole one: firmware, secure-boot variables, separators, loader, exit."""
        self.event(0, POST_CODE, b"firmware volume", b"the firmware itself")
        self.event(7, DRIVER_CONFIG, b"SecureBoot=1").event(1, POST_CODE, b"setup", b"its settings")
        self.event(2, POST_CODE, b"option ROM", b"its code")
        for pcr in range(8):
            self.event(pcr, SEPARATOR, bytes(4))
        self.event(7, AUTHORITY, b"db: the vendor's key").event(4, BOOT_APPLICATION, b"path", b"loader")
        return self.event(5, ACTION, b"Exit Boot Services Invocation")
