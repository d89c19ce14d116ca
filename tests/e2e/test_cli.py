"""casemate's command line: init without half states, keys, check, status, help, exit codes."""
import base64
import hashlib
import json
import os
import re
import shutil
import sqlite3
import stat
import struct
import subprocess
import time

import pytest

UNCONFINED = {"CASEMATE_TEST_OFF": "all", "CASEMATE_TEST_ACCEPT": "1"}  # doubles write files
ROW = struct.Struct("<8s32sQ40sII512s")
KEEPER = """#!/bin/sh
# A double of casemate-keeper --provision: the TPM lies at descriptor 13, the record goes to stdout.
test -e /proc/$$/fd/13 || exit 6
test -z "$HOME" || exit 70
test "$1 $2" = "--provision --node-name" || exit 2
%s
"""


def run(program, *words, env=None, cwd=None, timeout=20):
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **(env or {})}, cwd=cwd)


def public_key(path, curve="prime256v1"):
    key = subprocess.run(["openssl", "ecparam", "-name", curve, "-genkey", "-noout"], check=True,
                         capture_output=True).stdout
    subprocess.run(["openssl", "ec", "-pubout", "-out", path], input=key, check=True,
                   capture_output=True)
    return path


@pytest.fixture
def casemate(build, tmp_path):
    """A copy of casemate beside doubles of what `init` runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(build / "bin" / "casemate", folder)
    shutil.copy(build / "harness" / "casemate-supervisor-switched", folder / "casemate-supervisor")
    for role in ("devtpm", "gateway", "worker"):
        shutil.copy(build / "harness" / "role_double", folder / f"casemate-{role}")
    keeper = folder / "casemate-keeper"
    keeper.write_text(KEEPER % 'printf "record of %s %s" "$3" "$4"')
    keeper.chmod(0o755)
    return folder / "casemate"


@pytest.fixture
def node(casemate, tmp_path):
    state = tmp_path / "node"
    done = run(casemate, "init", "--state", state, "--tpm", "development", "--node-name", "n1",
               "--owner-key", public_key(tmp_path / "o.pem"),
               "--policy-key", public_key(tmp_path / "p.pem"), "--package", tmp_path / "m.cmpkg")
    assert done.returncode == 0, done.stderr
    return state


def test_init_makes_the_folder(casemate, node):
    assert sorted(p.name for p in node.iterdir()) == [
        "casemate.yaml", "devtpm.state", "enrolment.bin", "owner.pem", "policy.pem"]
    assert stat.S_IMODE(node.stat().st_mode) == 0o700
    assert stat.S_IMODE((node / "devtpm.state").stat().st_mode) == 0o600
    assert stat.S_IMODE((node / "enrolment.bin").stat().st_mode) == 0o644
    assert (node / "enrolment.bin").read_text() == "record of n1 --development"
    assert "m.cmpkg'" in (node / "casemate.yaml").read_text()


def test_init_twice_changes_nothing(casemate, node):
    before = {p.name: p.read_bytes() for p in node.iterdir()}
    again = run(casemate, "init", "--state", node, "--tpm", "development")
    assert again.returncode == 3 and "nothing was changed" in again.stderr
    assert {p.name: p.read_bytes() for p in node.iterdir()} == before


@pytest.mark.parametrize("keeper,code", [("exit 6", 6), ("exit 5", 5), ("exit 0", 9),
                                         ("kill -9 $$", 9), ("head -c 5000 /dev/zero", 70)])
def test_init_that_fails_leaves_nothing(casemate, tmp_path, keeper, code):
    (casemate.parent / "casemate-keeper").write_text(KEEPER % keeper)
    state = tmp_path / "node"
    done = run(casemate, "init", "--state", state, "--tpm", "development")
    assert done.returncode == code, done.stderr
    assert not state.exists()
    state.mkdir()
    (state / "mine").write_text("x")
    assert run(casemate, "init", "--state", state, "--tpm", "development").returncode == code
    assert [p.name for p in state.iterdir()] == ["mine"]


def test_init_without_a_development_tpm_program(casemate, tmp_path):
    (casemate.parent / "casemate-devtpm").unlink()
    done = run(casemate, "init", "--state", tmp_path / "node", "--tpm", "development")
    assert done.returncode == 9 and "casemate-devtpm" in done.stderr
    assert not (tmp_path / "node").exists()


def test_init_refuses_private_and_foreign_keys(casemate, tmp_path):
    private = tmp_path / "private.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt",
                    "ec_paramgen_curve:P-256", "-out", private], check=True, capture_output=True)
    for path, text in ((private, "private key"), (public_key(tmp_path / "x.pem", "secp384r1"), "P-256"),
                       (tmp_path / "none.pem", "cannot open")):
        done = run(casemate, "init", "--state", tmp_path / "node", "--tpm", "development",
                   "--owner-key", path)
        assert done.returncode == 3 and text in done.stderr, done.stderr
        assert not (tmp_path / "node").exists()


def table(node):
    data = (node / "keys.table").read_bytes()
    assert data[:8] == b"CMKEYS2\0"
    return struct.unpack("<Q", data[8:16])[0], list(ROW.iter_unpack(data[16:]))


def test_keys_add_list_revoke(casemate, node):
    made = [run(casemate, "keys", "add", f"user{i}", "--state", node).stdout.strip()
            for i in range(5)]
    for text in made:
        found = re.fullmatch(r"cm-([0-9a-f]{16})-([A-Za-z0-9_-]{43})", text)
        assert found and len(base64.urlsafe_b64decode(found[2] + "=")) == 32
    generation, rows = table(node)
    assert generation == 5 and [r[0] for r in rows] == sorted(r[0] for r in rows)
    for i, text in enumerate(made):
        row = next(r for r in rows if r[0].hex() == text[3:19])
        assert row[1] == hashlib.sha256(text.encode()).digest()
        assert row[2] == 0 and row[3].rstrip(b"\0") == f"user{i}".encode()
    stored = b"".join(p.read_bytes() for p in node.iterdir() if p.is_file())
    assert not any(text[20:].encode() in stored for text in made)
    victim = made[2][3:19]
    assert run(casemate, "keys", "revoke", victim, "--state", node).returncode == 0
    generation, rows = table(node)
    assert generation == 6 and len(rows) == 4 and victim not in [r[0].hex() for r in rows]
    again = run(casemate, "keys", "revoke", victim, "--state", node)
    assert again.returncode == 2 and "no valid key" in again.stderr
    listed = json.loads(run(casemate, "keys", "list", "--json", "--state", node).stdout)
    assert {k["id"]: k["status"] for k in listed}[victim] == "revoked" and len(listed) == 5
    assert stat.S_IMODE((node / "keys.sqlite").stat().st_mode) == 0o600
    assert stat.S_IMODE((node / "keys.table").stat().st_mode) == 0o600


def grants(node, id):
    """What the table says of a key: names, or "all"."""
    row = next(r for r in table(node)[1] if r[0].hex() == id)
    names = [row[6][64 * i:64 * i + 64].rstrip(b"\0").decode() for i in range(8)]
    return "all" if row[4] == 0xffffffff else names[:row[4]]


def test_keys_are_granted_adapters(casemate, node):
    made = {word: run(casemate, "keys", "add", "k", *(["--adapters", word] if word else []), "--state",
                      node).stdout.strip()[3:19] for word in ("", "none", "all", "red", "red,blue,a.b-c_9")}
    assert {word: grants(node, id) for word, id in made.items()} == {
        "": [], "none": [], "all": "all", "red": ["red"], "red,blue,a.b-c_9": ["red", "blue", "a.b-c_9"]}
    told = json.loads(run(casemate, "keys", "list", "--json", "--state", node).stdout)
    assert {k["id"]: k["adapters"] for k in told} == {id: word or "none" for word, id in made.items()}
    generation = table(node)[0]
    for word, wanted in (("blue", ["blue"]), ("none", []), ("all", "all")):
        assert run(casemate, "keys", "grant", made["red"], "--adapters", word, "--state", node).returncode == 0
        generation += 1
        assert grants(node, made["red"]) == wanted and table(node)[0] == generation
    before = (node / "keys.table").read_bytes()
    many, long = ",".join(f"a{i}" for i in range(9)), "x" * 64
    for word in ("", ",", "a,", ",a", "a,,b", "../a", ".a", "a b", many, long, "a," + long):
        for words in (("add", "k"), ("grant", made["red"])):
            done = run(casemate, "keys", *words, "--adapters", word, "--state", node)
            assert done.returncode == 2 and "--adapters" in done.stderr and not done.stdout, (word, done)
    assert run(casemate, "keys", "grant", made["red"], "--state", node).returncode == 2
    assert run(casemate, "keys", "revoke", made["red"], "--adapters", "a", "--state", node).returncode == 2
    unknown = run(casemate, "keys", "grant", "0" * 16, "--adapters", "all", "--state", node)
    assert unknown.returncode == 2 and "no valid key" in unknown.stderr
    assert (node / "keys.table").read_bytes() == before
    assert grants(node, made["all"]) == "all"  # the others are as they were


def test_keys_of_a_store_without_grants_are_granted_nothing(casemate, node):
    """A store of before keys had grants."""
    text = run(casemate, "keys", "add", "old", "--adapters", "all", "--state", node).stdout.strip()
    with sqlite3.connect(node / "keys.sqlite") as store:
        store.execute("ALTER TABLE keys DROP COLUMN adapters")
    assert run(casemate, "keys", "add", "new", "--adapters", "red", "--state", node).returncode == 0
    told = json.loads(run(casemate, "keys", "list", "--json", "--state", node).stdout)
    assert {k["name"]: k["adapters"] for k in told} == {"old": "none", "new": "red"}
    assert grants(node, text[3:19]) == []


def test_keys_expiry_and_names(casemate, node):
    made = json.loads(run(casemate, "keys", "add", "a", "--expires-days", "2", "--json", "--state",
                          node).stdout)
    assert abs(made["expires_unix_s"] - time.time() - 2 * 86400) < 60
    assert table(node)[1][0][2] == made["expires_unix_s"]
    for words in (["x" * 40], ["a b"], [""], ["a", "--expires-days", "0"],
                  ["a", "--expires-days", "1x"]):
        assert run(casemate, "keys", "add", *words, "--state", node).returncode == 2, words
    assert len(table(node)[1]) == 1
    assert run(casemate, "keys", "add", "x" * 39, "--state", node).returncode == 0


def test_keys_added_at_once_all_arrive(casemate, node):
    busy = [subprocess.Popen([casemate, "keys", "add", f"u{i}", "--state", node],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for i in range(8)]
    assert [p.wait(20) for p in busy] == [0] * 8
    generation, rows = table(node)
    assert generation == 8 and len(rows) == 8
    assert sqlite3.connect(node / "keys.sqlite").execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_check_names_each_fault(casemate, node):
    done = run(casemate, "check", "--state", node)
    assert done.returncode == 4 and "cannot open package" in done.stderr
    assert "ok     package owner" in done.stdout and "FAILED package head" in done.stdout
    report = json.loads(run(casemate, "check", "--state", node, "--json").stdout)
    assert not report["ok"] and any(c["id"] == "CM-PKG-OPEN" for c in report["checks"])
    yaml = node / "casemate.yaml"
    text = yaml.read_text()
    yaml.write_text(text.replace("listen: 127.0.0.1:8443", "listn: 127.0.0.1:8443"))
    line = next(i for i, t in enumerate(yaml.read_text().split("\n"), 1) if "listn" in t)
    done = run(casemate, "check", "--config", yaml)
    assert done.returncode == 3
    assert f"casemate.yaml:{line}: unknown key \"listn\"; did you mean \"listen\"?" in done.stderr
    yaml.write_text(text)
    assert run(casemate, "check", "--config", yaml, "--threds", "1").returncode == 2
    assert run(casemate, "check", "--config", yaml, "--threads", "x").returncode == 3
    done = run(casemate, "check", "--config", yaml, env={"CASEMATE_QUEUE_MAX": "0"})
    assert done.returncode == 3 and "CASEMATE_QUEUE_MAX" in done.stderr


def test_check_of_a_busy_address(casemate, node):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as busy:
        done = run(casemate, "check", "--state", node, "--listen",
                   f"127.0.0.1:{busy.getsockname()[1]}")
        assert "FAILED address" in done.stdout and "EADDRINUSE" in done.stdout
    assert "ok     address" in run(casemate, "check", "--state", node, "--listen",
                                   "127.0.0.1:0").stdout


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_state_folder_that_others_may_write(casemate, node, command):
    """`serve` goes on to the next thing that is missing: this node has no package."""
    def said():
        done = run(casemate, command, "--state", node)
        return done.stdout + done.stderr
    for mode in (0o777, 0o770, 0o1702):
        node.chmod(mode)
        assert f"mode {mode:04o}" in said() and f"chmod 700 {node}" in said()
    for mode in (0o755, 0o700):
        node.chmod(mode)
        assert "chmod" not in said()


def test_words_that_are_no_options_are_named(casemate, node, tmp_path):
    for words, text in [(["check", "--bogus"], "--bogus is unknown here, or needs a value"),
                        (["status", "extra"], 'expected --option VALUE, found "extra"'),
                        (["keys", "add", "--state", node], "expected keys add NAME"),
                        (["doctor", "extra"], 'doctor does not know "extra"')]:
        done = run(casemate, *words)
        assert done.returncode == 2 and text in done.stderr, done.stderr
    done = run(casemate, "doctor", "--root", tmp_path / "absent")
    assert done.returncode == 9 and "CM-CLI-OPEN" in done.stderr and done.stdout == ""


def test_a_damaged_key_store_is_named(casemate, node):
    run(casemate, "keys", "add", "a", "--state", node)
    (node / "keys.sqlite").write_bytes(os.urandom(8192))
    done = run(casemate, "keys", "list", "--state", node)
    assert done.returncode == 9 and str(node / "keys.sqlite") in done.stderr


def test_sandbox_report_of_a_killed_supervisor_tells_of_nobody(casemate, node):
    """What it leaves behind names pids that may be anybody's by now."""
    (node / "run").mkdir(exist_ok=True)
    (node / "run" / "status.json").write_text(json.dumps(
        {"roles": {"worker": {"pid": os.getpid(), "state": "ready", "probed": 0}}}))
    done = run(casemate, "sandbox", "report", "--state", node)
    assert done.returncode == 9 and "CM-CLI-STOPPED" in done.stderr and done.stdout == ""


def test_status_of_a_stopped_and_of_a_running_service(casemate, node, build, tmp_path):
    done = run(casemate, "status", "--state", node)
    assert done.returncode == 9 and "no service runs" in done.stderr
    assert json.loads(run(casemate, "status", "--state", node, "--json").stdout) == {
        "running": False, "ready": False}
    (casemate.parent / "casemate-keeper").unlink()
    shutil.copy(build / "harness" / "role_double", casemate.parent / "casemate-keeper")
    (tmp_path / "m.cmpkg").write_bytes(b"\0" * 80000)
    run(casemate, "keys", "add", "a", "--state", node)
    (node / "keys.table").unlink()  # serve writes it again
    serve = subprocess.Popen([casemate, "serve", "--state", node, "--listen", "127.0.0.1:0"],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             env={**os.environ, **UNCONFINED})
    try:
        assert serve.stdout.readline().startswith("casemate: ready: model m.cmpkg, device cpu")
        status = run(casemate, "status", "--state", node)
        assert status.returncode == 0 and "ready" in status.stdout.splitlines()[0]
        for name in ("guard", "GPU backend"):
            assert f"not yet: {name}" in status.stdout
        facts = json.loads(run(casemate, "status", "--state", node, "--json").stdout)
        assert facts["running"] and facts["keys"]["count"] == 1
    finally:
        serve.terminate()
        assert serve.wait(10) == 0
    assert run(casemate, "status", "--state", node).returncode == 9


def test_help_and_usage(casemate):
    whole = run(casemate, "--help")
    assert whole.returncode == 0
    for command in ("init", "serve", "keys", "check", "measure", "policy", "revoke", "answer", "status",
                    "version"):
        assert f"  {command} " in whole.stdout
        one = run(casemate, command, "--help")
        assert one.returncode == 0 and f"example: casemate {command}" in one.stdout
    for words in ([], ["nothing"], ["keys"], ["keys", "add"], ["init", "--what"],
                  ["init", "--tpm", "x"], ["serve", "--"], ["version", "x"]):
        done = run(casemate, *words)
        assert done.returncode == 2 and done.stderr, words
    assert run(casemate, "version").stdout.startswith("casemate 0.")
    assert "0..1024" in run(casemate, "check", "--keys").stdout


def test_the_default_state_is_xdg_for_a_user(casemate, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root has /var/lib/casemate")
    done = run(casemate, "status", env={"XDG_STATE_HOME": str(tmp_path)})
    assert str(tmp_path / "casemate") in done.stderr
