"""A real swtpm in a process of its own, Debian's tpm2-tools beside it, and a local maker of TPMs."""
import pathlib
import struct
import subprocess
import time


class Swtpm:
    """It is reset only when we say so; its state stays in `folder`."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.path, self.process = folder, folder / "tpm.sock", None
        self.control = folder / "tpm.sock.ctrl"  # where tss2's swtpm TCTI looks for it
        folder.mkdir()

    def start(self):
        for path in (self.path, self.control):
            path.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.folder}", "--server",
             f"type=unixio,path={self.path}", "--ctrl", f"type=unixio,path={self.control}",
             "--flags", "not-need-init,startup-clear"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 5
        while not (self.path.exists() and self.control.exists()):
            assert time.monotonic() < end and self.process.poll() is None, "swtpm does not start"
            time.sleep(0.02)
        return self

    def stop(self):
        self.process.terminate()
        self.process.wait(10)

    def tool(self, name: str, *words, check=True) -> subprocess.CompletedProcess:
        """One of tpm2-tools, over tss2's own TCTI."""
        done = subprocess.run([f"tpm2_{name}", "-T", f"swtpm:path={self.path}", *map(str, words)],
                              capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"tpm2_{name} {words}: {done.stderr}"
        return done

    def certificate_put(self, der: bytes, folder: pathlib.Path) -> None:
        """As its maker does: into the index of the P-256 endorsement key, longer than needed."""
        file = folder / "certificate"
        file.write_bytes(der + b"\xff" * 100)
        self.tool("nvundefine", "-C", "p", "0x01C0000A", check=False)
        self.tool("nvdefine", "-C", "p", "-s", len(der) + 100, "-a",
                  "ppwrite|ppread|ownerread|authread|no_da|platformcreate|writedefine", "0x01C0000A")
        self.tool("nvwrite", "-C", "p", "-i", file, "0x01C0000A")


class Maker:
    """swtpm_localca: a root, an authority below it, and certificates of endorsement keys."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir()
        (folder / "conf").write_text(
            f"statedir = {folder}\nsigningkey = {folder}/signkey.pem\n"
            f"issuercert = {folder}/issuercert.pem\ncertserial = {folder}/certserial\n")
        (folder / "options").write_text("--platform-manufacturer X\n--platform-version 1\n"
                                        "--platform-model Y\n")

    def certify(self, point: bytes) -> bytes:
        subprocess.run(
            ["swtpm_localca", "--type", "ek", "--ek",
             f"x={point[:32].hex()},y={point[32:].hex()},id=secp256r1", "--dir", self.folder,
             "--vmid", "node", "--tpm-spec-family", "2.0", "--tpm-spec-level", "0",
             "--tpm-spec-revision", "138", "--tpm-manufacturer", "id:00001014", "--tpm-model",
             "swtpm", "--tpm-version", "id:20191023", "--configfile", self.folder / "conf",
             "--optsfile", self.folder / "options", "--tpm2"],
            check=True, capture_output=True, timeout=60)
        return (self.folder / "ek.cert").read_bytes()

    def pem(self, *names) -> str:
        files = {"root": "swtpm-localca-rootca-cert.pem", "issuer": "issuercert.pem"}
        return "".join((self.folder / files[name]).read_text() for name in names)


def ek_point(record: bytes) -> bytes:
    """x ‖ y of the endorsement key in an enrolment record (loader/tpm/enrolment.c)."""
    at = 8 + 4 + 4 + 64 + 32
    size, = struct.unpack_from("<I", record, at)
    public = record[at + 4:at + 4 + size]  # TPM2B_PUBLIC: it ends with u16 32, x, u16 32, y
    return public[-66:-34] + public[-32:]
