"""One part of the golden evidence, for the fuzz target: `part.py evidence|log|attest|enrolment|policy|
trust|boot_log`. The byte before it chooses the parser. Made by `./run vectors` from a served tiny model."""
import pathlib
import struct
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
import boot_log  # noqa: E402


def parts() -> dict[str, bytes]:
    blob, at = (HERE / "evidence.bin").read_bytes(), 28 + 4 * 32 + 65 + 64
    found = {"evidence": blob}
    for name in ("enrolment", "log", "attest"):
        size, = struct.unpack_from("<I", blob, at)
        found[name] = blob[at + 4:at + 4 + size]
        at += 4 + size
    found["policy"] = (HERE / "model.policy").read_bytes()
    found["trust"] = (HERE / "trust").read_bytes()
    found["boot_log"] = boot_log.Log().boot().blob
    return found


if __name__ == "__main__":
    order = ["evidence", "log", "attest", "enrolment", "policy", "trust", "boot_log"]
    name = sys.argv[1]
    sys.stdout.buffer.write(bytes([order.index(name)]) + parts()[name])
