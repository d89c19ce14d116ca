"""A firmware's event log beside evidence: believed where it leads to the quoted PCRs, and refused for its own
reason where it does not. The TPM is a real swtpm that was extended as the log says."""
import pathlib
import struct
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import boot_log  # noqa: E402
import node as nodes  # noqa: E402
import swtpm as tpms  # noqa: E402
import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def node(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("boot")
    tiny_model.write(str(folder / "tiny.gguf"))
    tpm = tpms.Swtpm(folder / "swtpm").start()
    log = boot_log.Log().boot()
    at = len(boot_log.Log().blob)
    while at < len(log.blob):  # what the firmware does while it writes the log
        pcr, _, _ = struct.unpack_from("<III", log.blob, at)
        digest = log.blob[at + 12 + 2 + 20 + 2:][:32]
        tpm.tool("pcrextend", f"{pcr}:sha256={digest.hex()}")
        size, = struct.unpack_from("<I", log.blob, at + 12 + 22 + 34)
        at += 12 + 22 + 34 + 4 + size
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    node.chain = {pcr: log.pcrs[pcr].hex() for pcr in (0, 2, 4, 7)}
    node.make(folder / "tiny.gguf", "tiny", tpm=str(tpm.path))
    node.start()
    node.folder, node.log_bytes = folder, log.blob
    (folder / "trust").write_text(node.run(
        "casemate-pack", "trust", node.package, "--node", node.state / "enrolment.bin", "--measurement",
        node.state / "node.measure", *node.pcrs).stdout)
    yield node
    assert node.stop() == 0
    tpm.stop()


def verify(node, blob: bytes, subject=None):
    (node.folder / "log").write_bytes(blob)
    return node.run("casemate-verify", subject or node.state / "run/evidence.bin", "--trust",
                    node.folder / "trust", "--boot-log", node.folder / "log", check=False)


def test_the_log_of_this_boot_is_believed(node):
    for subject in (None, f"https://{node.address}"):
        done = verify(node, node.log_bytes, subject)
        assert done.returncode == 0 and "believed" in done.stdout, done.stderr


def separator_twice():
    return boot_log.Log().boot().event(4, boot_log.SEPARATOR, bytes(4))


def option_rom_late():
    return boot_log.Log().boot().event(2, boot_log.POST_CODE, b"late", b"code")


def separator_with_other_data():
    return boot_log.Log().event(4, boot_log.SEPARATOR, bytes(4), b"other")


@pytest.mark.parametrize("log,cause", [
    (lambda: boot_log.Log().boot().event(4, boot_log.BOOT_APPLICATION, b"path", b"evil"), "CM-BOOT-REPLAY"),
    (lambda: boot_log.Log(), "CM-BOOT-REPLAY"),  # values without events
    (lambda: boot_log.Log().locality(3).boot(), "CM-BOOT-REPLAY"),  # another start of PCR 0
    (lambda: boot_log.Log().boot().locality(3), "CM-BOOT-LOCALITY"),
    (lambda: boot_log.Log().locality(3).locality(3).boot(), "CM-BOOT-LOCALITY"),
    (lambda: boot_log.Log().locality(2).boot(), "CM-BOOT-LOCALITY"),
    (separator_twice, "CM-BOOT-SEPARATOR"),
    (option_rom_late, "CM-BOOT-SEPARATOR"),
    (separator_with_other_data, "CM-BOOT-DIGEST"),
    (lambda: boot_log.Log(((4, 20),)).boot(), "CM-BOOT-ALGORITHMS"),
    (lambda: boot_log.Log(((4, 20), (11, 20))), "CM-BOOT-ALGORITHMS"),
    (lambda: boot_log.Log(((11, 32), (11, 32))), "CM-BOOT-ALGORITHMS"),
    (lambda: boot_log.Log(((11, 32), (99, 32))), "CM-BOOT-ALGORITHMS"),
])
def test_another_log_is_refused_for_its_own_reason(node, log, cause):
    done = verify(node, log().blob)
    assert done.returncode == 7 and cause in done.stderr, done.stderr


def test_every_changed_digest_or_type_and_every_cut_is_refused(node):
    """All bytes but those that no digest covers: other banks, and descriptions of what was measured."""
    blob, free, causes = node.log_bytes, 0, set()
    for at in range(0, len(blob), 5):
        changed = bytearray(blob)
        changed[at] ^= 1
        done = verify(node, bytes(changed))
        free += done.returncode == 0
        causes.add(done.stderr.split(":")[1].strip() if done.returncode else "")
    assert free < len(blob) / 5 * 0.6 and {"CM-BOOT-FORM", "CM-BOOT-REPLAY", "CM-BOOT-DIGEST"} <= causes
    for size in range(0, len(blob), 37):
        assert verify(node, blob[:size]).returncode == 7


def test_lengths_that_lie_are_refused(node):
    start = len(boot_log.Log().blob)
    for at in (28, start + 8, start + 12 + 22 + 34):  # header's size, digest count, event's size
        changed = bytearray(node.log_bytes)
        changed[at:at + 4] = b"\xff\xff\xff\xff"
        done = verify(node, bytes(changed))
        assert done.returncode == 7 and "CM-BOOT-FORM" in done.stderr
