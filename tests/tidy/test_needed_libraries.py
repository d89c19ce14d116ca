"""What each program links, read from its ELF header: the process split, enforced by the loader."""
import pathlib
import re
import subprocess

import pytest

BASE = {"libc", "libm", "ld-linux-x86-64"}
ALLOWED = {
    "casemate": {"libyaml-0", "libsqlite3", "libjansson", "libcrypto"},
    "casemate-supervisor": {"libyaml-0"},
    "casemate-gateway": {"libssl", "libcrypto", "libevent_core-2", "libevent_openssl-2",
                         "libjansson"},
    "casemate-keeper": {"libcrypto", "libtss2-esys", "libtss2-mu", "libtss2-rc", "libtss2-sys"},
    "casemate-devtpm": {"libtpms"},
    "casemate-worker": {"libcrypto"},
    "casemate-pack": {"libcrypto", "libjansson"},
    "casemate-verify": {"libssl", "libcrypto"},
}


def needed(program: pathlib.Path) -> set[str]:
    text = subprocess.run(["readelf", "-d", program], capture_output=True, text=True,
                          check=True).stdout
    return {re.split(r"[.]", name)[0] for name in re.findall(r"\(NEEDED\).*\[(.+?)\]", text)}


def violations(program: str, libraries: set[str]) -> set[str]:
    return libraries - BASE - ALLOWED[program]


@pytest.mark.parametrize("program", ALLOWED)
def test_a_program_links_only_what_its_role_may_hold(build, program):
    found = needed(build / "bin" / program)
    assert found and not violations(program, found)


def test_every_program_has_its_row(build):
    assert {p.name for p in (build / "bin").iterdir() if p.name.startswith("casemate")} == set(ALLOWED)


def test_a_violation_is_found():
    assert violations("casemate-supervisor", {"libc", "libcrypto"}) == {"libcrypto"}
    assert violations("casemate-gateway", {"libtss2-esys"}) == {"libtss2-esys"}


def test_programs_are_hardened(build):
    for program in ALLOWED:
        path = build / "bin" / program
        header = subprocess.run(["readelf", "-hlW", path], capture_output=True, text=True).stdout
        dynamic = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True).stdout
        assert "DYN" in header, f"{program}: not position-independent"
        assert "GNU_RELRO" in header and "NOW" in dynamic, f"{program}: relocations stay writable"
        stack = next(line for line in header.splitlines() if "GNU_STACK" in line)
        assert "RWE" not in stack, f"{program}: executable stack"


def test_no_program_can_be_killed_from_its_environment(build):
    """Kill points are for build-faults alone; where that is built, its programs are the control."""
    for program in ALLOWED:
        assert b"KILL_POINT" not in (build / "bin" / program).read_bytes(), program
    faults = build.parent / "build-faults" / "bin" / "casemate-worker"
    assert not faults.exists() or b"CASEMATE_KILL_POINT" in faults.read_bytes()
