"""Make the golden packages again: `make.py CASEMATE_PACK MODEL.gguf`. The model is the fuzz targets'
sample (`pack_gguf --seed MODEL.gguf`). Salts and keys are fresh, so every run gives other bytes."""
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
import package_reader  # noqa: E402

PASSPHRASE = "golden packages protect nothing"


def make(pack: str, model: str, suite: str, folder: pathlib.Path) -> dict:
    out, recovery = HERE / f"{suite}.cmpkg", HERE / f"{suite}.recovery"
    out.unlink(missing_ok=True)
    recovery.unlink(missing_ok=True)
    subprocess.run([pack, "pack", model, "--out", out, "--owner", folder, "--suite", suite,
                    "--revision", "3", "--recovery", recovery,
                    "--passphrase-file", folder / "pass"], check=True)
    package = package_reader.Package(
        out.read_bytes(), package_reader.recovery_key(recovery.read_bytes(), PASSPHRASE))
    return {"core_digest": package.core_digest.hex(), "revision": package.revision,
            "payload_sha256": hashlib.sha256(package.payload).hexdigest(),
            "tensors": len(package.manifest.tensors)}


def main(pack: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        subprocess.run([pack, "keygen", "--owner", folder], check=True)
        (folder / "pass").write_text(PASSPHRASE)
        (folder / "pass").chmod(0o600)
        rows = {suite: make(pack, model, suite, folder) for suite in ("aes-256-gcm",
                                                                      "chacha20-poly1305")}
    (HERE / "expected.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
