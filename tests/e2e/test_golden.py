"""The committed packages: FORMAT.md's vectors, read by two readers that share no code."""
import hashlib
import json
import pathlib
import shutil
import subprocess

import pytest

from tests import package_reader
from tests.golden.package.make import PASSPHRASE

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/package"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def package(suite: str, blob: bytes) -> package_reader.Package:
    key = package_reader.recovery_key((GOLDEN / f"{suite}.recovery").read_bytes(), PASSPHRASE)
    return package_reader.Package(blob, key)


@pytest.mark.parametrize("suite", EXPECTED)
def test_python_reads_what_was_sealed(suite):
    read = package(suite, (GOLDEN / f"{suite}.cmpkg").read_bytes())
    assert {"core_digest": read.core_digest.hex(), "revision": read.revision,
            "payload_sha256": hashlib.sha256(read.payload).hexdigest(),
            "tensors": len(read.manifest.tensors)} == EXPECTED[suite]


@pytest.mark.parametrize("suite", EXPECTED)
def test_casemate_reads_what_was_sealed(build, tmp_path, suite):
    (tmp_path / "pass").write_text(PASSPHRASE)
    (tmp_path / "pass").chmod(0o600)
    shutil.copy(GOLDEN / f"{suite}.recovery", tmp_path / "r")
    (tmp_path / "r").chmod(0o600)
    done = subprocess.run([build / "bin/casemate-pack", "recover", GOLDEN / f"{suite}.cmpkg",
                           "--recovery", tmp_path / "r", "--passphrase-file", tmp_path / "pass"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("offset", [4096 + 40, 4096 + 130, 8192 + 30, 80000, 120000])
def test_python_refuses_a_flip(offset):
    blob = bytearray((GOLDEN / "aes-256-gcm.cmpkg").read_bytes())
    blob[offset] ^= 1
    if 8192 <= offset < 40960:  # a torn slot copy: the other one holds
        package("aes-256-gcm", bytes(blob))
        blob[offset + 32768] ^= 1
    with pytest.raises(Exception):
        package("aes-256-gcm", bytes(blob))
