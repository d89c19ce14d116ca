"""Make the golden evidence again: `make.py FOLDER-OF-PROGRAMS MODEL.gguf`. Serves the model once from a
development TPM; keys are fresh, so every run gives other bytes."""
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
import node as nodes  # noqa: E402


def main(programs: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        node = nodes.Node(pathlib.Path(programs), folder / "node", folder / "owner")
        node.make(pathlib.Path(model), "golden")
        node.start()
        shutil.copy(node.state / "run/evidence.bin", HERE / "evidence.bin")
        shutil.copy(node.package.with_name("model.cmpkg.policy"), HERE / "model.policy")
        (HERE / "trust").write_text(node.run(
            "casemate-pack", "trust", node.package, "--node", node.state / "enrolment.bin",
            "--measurement", node.state / "node.measure", "--allow-development").stdout)
        assert node.stop() == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
