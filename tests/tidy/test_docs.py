"""Pages that are generated from tables are as the code says. `./run docs` makes them again."""
import pathlib
import subprocess

import pytest

POLICIES = [str(pathlib.Path(__file__).resolve().parents[2] / "policies/seccomp" / f"{name}.policy")
            for name in ("supervisor", "gateway", "keeper", "worker-serve", "devtpm", "gateway-start",
                         "keeper-start", "worker-load", "devtpm-start")]


@pytest.mark.parametrize("page,command", [
    ("docs/wire.md", ["harness/print_wire"]),
    ("docs/api.md", ["bin/casemate-gateway", "--print-api"]),
    ("docs/sandbox.md", ["harness/policy_compile", "--table", *POLICIES]),
])
def test_page_is_as_generated(build, repo, page, command):
    made = subprocess.run([build / command[0], *command[1:]], capture_output=True, text=True,
                          check=True, timeout=20).stdout
    assert (repo / page).read_text() == made, f"{page} is old: ./run docs"
