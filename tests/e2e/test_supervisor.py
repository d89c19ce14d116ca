"""The supervisor against doubles of the roles: order of start, descriptors, replacement, failure,
drain and stop. The doubles (tests/harness/role_double.c) write what they see into `events`."""
import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time

import pytest

ROLES = ["gateway", "keeper", "worker", "devtpm"]
UNCONFINED = {"CASEMATE_TEST_OFF": "all", "CASEMATE_TEST_ACCEPT": "1"}  # tests/harness/switches.c


class Service:
    def __init__(self, build, folder):
        self.bin = folder / "bin"
        self.state = folder / "state"
        self.bin.mkdir()
        self.state.mkdir()
        shutil.copy(build / "bin" / "casemate", self.bin)
        # Doubles write files and cannot be confined: a supervisor that lets them be.
        shutil.copy(build / "harness" / "casemate-supervisor-switched",
                    self.bin / "casemate-supervisor")
        for role in ROLES:
            shutil.copy(build / "harness" / "role_double", self.bin / f"casemate-{role}")
        for name in ("owner", "policy"):
            key = subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"],
                                 check=True, capture_output=True).stdout
            subprocess.run(["openssl", "ec", "-pubout", "-out", self.state / f"{name}.pem"],
                           input=key, check=True, capture_output=True)
        (self.state / "model.cmp").write_bytes(b"\0" * 80000)
        (self.state / "enrolment.bin").write_bytes(b"record")
        (self.state / "casemate.yaml").write_text(
            "sealed:\n  package: model.cmp\n  package_owner: owner.pem\n"
            "  policy_authority: policy.pem\nsite:\n  state: .\n  listen: 127.0.0.1:0\n"
            "  drain_timeout_ms: 1500\n")
        self.process = None
        self.errors = folder / "stderr"

    def mode(self, role, word):
        (self.bin / f"{role}.mode").write_text(word)

    def start(self, *more, stdout=subprocess.PIPE):
        self.process = subprocess.Popen(
            [self.bin / "casemate", "serve", "--config", self.state / "casemate.yaml", *more],
            stdout=stdout, stderr=open(self.errors, "wb"),
            env={**os.environ, **UNCONFINED})
        return self

    def events(self):
        path = self.bin / "events"
        return path.read_text().splitlines() if path.exists() else []

    def until(self, check, seconds=10):
        """Wait until check() is true; return its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = check()
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError("not in time:\n" + "\n".join(self.events()) + "\n" + self.log())

    def log(self):
        return self.errors.read_text()

    def status(self):
        path = self.state / "run" / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def ready(self):
        return self.until(lambda: self.status().get("ready") and self.status())

    def pid(self, role):
        starts = [e for e in self.events() if e.startswith(f"{role} ") and " start " in e]
        return int(starts[-1].split()[1]) if starts else 0

    def seen(self, pattern, pid=None):
        return [e for e in self.events()
                if re.search(pattern, e) and (pid is None or e.split()[1] == str(pid))]

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(10)

    def orphans(self):
        pids = {int(e.split()[1]) for e in self.events()}
        alive = []
        for pid in pids:
            try:
                state = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
                alive += [pid] if state not in "ZX" else []
            except OSError:
                pass
        return alive


@pytest.fixture
def service(build, tmp_path):
    if not (build / "harness" / "role_double").exists():
        pytest.fail("role_double is not built")
    it = Service(build, tmp_path)
    yield it
    if it.process and it.process.poll() is None:
        it.process.kill()
        it.process.wait()
    it.until(lambda: not it.orphans(), 3)


def test_start_with_exact_descriptors(service):
    status = service.start().ready()
    order = [e.split()[0] for e in service.events() if " start " in e]
    assert sorted(order) == sorted(ROLES)
    wanted = {"devtpm": "0,1,2,3,4,5,13", "keeper": "0,1,2,3,4,5,13",
              "gateway": "0,1,2,3,4,5,6,7,8,9,10,11", "worker": "0,1,2,3,4,5,6,7,8,9,10,11"}
    for role, fds in wanted.items():
        line = service.seen(f"^{role} .* start ")[0]
        found = sorted(int(n) for n in re.search(r"fds=([\d,]*)", line)[1].split(",") if n)
        assert ",".join(map(str, found)) == fds, line
        assert "env=0 core=0 death=9 leader=1" in line
    assert service.seen("gateway .* listener 1")
    assert service.seen("(gateway|worker) .* rings put=0")
    assert not service.seen("broken")
    assert status["listen"].startswith("127.0.0.1:") and "GPU backend" in status["not_yet"]
    for role in ROLES:
        assert status["roles"][role]["state"] == "serving"
        assert status["roles"][role]["resident_bytes"] > 0
    pem = (service.state / "run" / "tls-certificate.pem").read_text().split("\n")
    import base64
    assert base64.b64decode("".join(pem[1:-2])) == b"\x5a" * 100
    assert '{"role":"double","event":"hello"}\n' in service.log()
    assert service.stop() == 0
    assert service.process.stdout.read().decode().startswith("casemate: ready: model model.cmp")


def test_the_gateway_hears_that_it_is_ready_before_anybody_who_may_ask(service):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    service.start(stdout=write)  # no room for the line that says so
    os.close(write)
    service.until(lambda: service.seen("gateway .* state ready=1"))
    while b"casemate: ready: " not in os.read(read, 4096):
        pass
    assert service.stop() == 0
    os.close(read)


def test_state_follows_the_load_and_loaded_reaches_the_keeper(service):
    service.start().ready()
    states = service.seen("^gateway .* state ")
    assert "ready=0" in states[0] and "reason=loading" in states[0]
    assert any("stage=4" in s for s in states), states
    service.until(lambda: service.seen("gateway .* state ready=1 stage=6"))
    assert service.seen(r"^keeper \d+ frame 11$")  # LOADED
    told = next(json.loads(line) for line in service.log().splitlines() if '"event":"loading"' in line)
    assert 0 < told["done_bytes"] <= told["total_bytes"], told


@pytest.mark.parametrize("role", ["worker", "gateway"])
def test_it_prepares_while_the_tpm_works(service, role):
    service.mode("keeper", "hold")
    service.start()
    service.until(lambda: service.seen(f"{role} .* waits"))
    service.until(lambda: service.status().get("roles", {}).get("keeper", {}).get("state") == "starting")
    assert not service.seen(f"{role} .* key page") and not service.status().get("ready")
    service.mode("keeper", "")
    service.ready()
    assert len(service.seen(f"{role} .* key page")) == 1 and len(service.seen(f"{role} .* start ")) == 1


@pytest.mark.parametrize("role,other", [("worker", "gateway"), ("gateway", "worker")])
def test_one_that_dies_before_its_key_is_replaced_by_one_that_gets_it(service, role, other):
    service.mode("keeper", "hold")
    service.start()
    service.until(lambda: service.seen("worker .* waits") and service.seen("gateway .* waits"))
    first = service.pid(role)
    os.kill(first, signal.SIGKILL)
    service.until(lambda: len(service.seen(f"{role} .* waits")) == 2)
    assert service.seen(f"{other} .* waiting frame 6")  # the new rings
    service.mode("keeper", "")
    service.ready()
    assert [e.split()[1] for e in service.seen(f"{role} .* key page")] == [str(service.pid(role))]
    assert service.pid(role) != first
    assert service.stop() == 0


def test_a_keeper_that_refuses_ends_those_who_wait(service):
    service.mode("keeper", "refuse")
    service.start()
    assert service.process.wait(10) == 5
    assert "CM-SEAL-BOOT" in service.log()
    for role in ("gateway", "worker"):
        assert service.seen(f"{role} .* stop") and not service.seen(f"{role} .* key page")
    assert not service.orphans()


def test_sigterm_while_they_wait_for_their_keys(service):
    service.mode("keeper", "hold")
    service.start()
    service.until(lambda: service.seen("worker .* waits") and service.seen("gateway .* waits"))
    service.process.send_signal(signal.SIGTERM)
    service.until(lambda: service.seen("worker .* stop") and service.seen("gateway .* stop"))
    service.mode("keeper", "")
    assert service.process.wait(10) == 0 and not service.orphans()


def test_gateway_killed_is_replaced_and_the_worker_stays(service):
    service.start().ready()
    worker, gateway = service.pid("worker"), service.pid("gateway")
    os.kill(gateway, signal.SIGKILL)
    service.until(lambda: service.pid("gateway") != gateway)
    service.until(lambda: service.seen("gateway .* state ready=1", service.pid("gateway")))
    assert service.pid("worker") == worker
    assert len(service.seen("rings put=0", worker)) == 2  # the first pair, and the new one
    service.until(lambda: service.status()["roles"]["gateway"]["restarts"] == 1)
    assert service.stop() == 0


def test_worker_killed_is_replaced_and_the_gateway_stays(service):
    service.start().ready()
    worker, gateway = service.pid("worker"), service.pid("gateway")
    begun = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    service.until(lambda: service.seen("reason=worker_gone", gateway))
    assert time.monotonic() - begun < 1
    service.until(lambda: service.seen("rings put=0", gateway)[1:])
    service.until(lambda: service.pid("worker") != worker)
    service.until(lambda: "ready=1" in service.seen("^gateway .* state ")[-1])
    assert service.pid("gateway") == gateway
    # The new pair connects exactly these two.
    assert service.seen(f"from={gateway}", service.pid("worker"))
    assert service.stop() == 0


def test_keeper_killed_is_replaced_and_the_others_keep_serving(service):
    service.start().ready()
    before = {role: service.pid(role) for role in ROLES}
    os.kill(before["keeper"], signal.SIGKILL)
    service.until(lambda: service.pid("keeper") != before["keeper"])
    os.kill(before["worker"], signal.SIGKILL)  # the new keeper serves the next worker
    service.until(lambda: service.pid("worker") != before["worker"])
    assert service.pid("gateway") == before["gateway"]
    assert service.pid("devtpm") == before["devtpm"]


def test_devtpm_death_ends_the_service(service):
    service.start().ready()
    os.kill(service.pid("devtpm"), signal.SIGKILL)
    assert service.process.wait(10) == 6
    assert "CM-SUP-TPM-GONE" in service.log()


@pytest.mark.parametrize("role,mode,code,text", [("worker", "fail_package", 4, "CM-PKG-TAG"),
                                                 ("keeper", "fail_policy", 5, "CM-TPM-POLICY")])
def test_a_refused_package_or_policy_is_final(service, role, mode, code, text):
    service.mode(role, mode)
    service.start()
    assert service.process.wait(10) == code
    assert service.log().splitlines()[-1].startswith(f"casemate: {text}: ")
    assert len(service.seen(f"^{role} .* start")) == 1


def test_back_off_has_a_budget(service):
    service.mode("worker", "crash")
    service.start()
    assert service.process.wait(20) == 9
    assert len(service.seen("^worker .* start")) == 6
    assert "casemate: CM-SUP-LOOP: worker failed 6 times within a minute; last: CM-END-SIGNAL" in service.log()
    assert len(service.seen("^gateway .* start")) == 1


@pytest.mark.parametrize("role,mode", [("worker", "violate"), ("keeper", "unasked")])
def test_a_protocol_violation_kills(service, role, mode):
    service.mode(role, mode)
    service.start()
    first = service.until(lambda: service.pid(role))
    service.until(lambda: "CM-FRAME-PROTOCOL" in service.log())
    service.mode(role, "ok")
    service.until(lambda: service.pid(role) != first)
    service.until(lambda: service.status().get("ready"))


@pytest.mark.parametrize("role,mode,end", [
    ("worker", "raise31", "policy_kill"), ("gateway", "raise11", "signal"),
    ("worker", "raise9", "signal"), ("gateway", "leave", "exit"),
    ("worker", "fail_serving", "failed"), ("worker", "crash", "signal"),
    ("worker", "violate", "protocol"), ("gateway", "raise19", "watchdog"),
    ("keeper", "raise31", "policy_kill")])
def test_each_end_has_its_type(service, role, mode, end):
    """In status, in the log and for the gateway's metrics; and the next one serves."""
    service.mode(role, mode)
    service.start("--watchdog_timeout_ms", "2000") if mode == "raise19" else service.start()
    told = service.until(lambda: service.status().get("ends"))
    service.mode(role, "ok")
    assert (told[0]["role"], told[0]["end"], told[0]["generation"]) == (role, end, 1), told
    assert told[0]["served"] == (mode != "crash") and told[0]["id"].startswith("CM-END-")
    assert told[0]["cause"].startswith("CM-") and role in told[0]["text"] or "double" in told[0]["text"]
    lines = [json.loads(line) for line in service.log().splitlines() if '"role_ended"' in line]
    assert lines[0]["end"] == end and lines[0]["name"] == role and lines[0]["id"] == told[0]["id"]
    service.ready()
    assert service.stop() == 0
    assert [e["end"] for e in service.status()["ends"]][-4:] == ["stopped"] * 4
    assert service.status()["over"] == {"exit_code": 0, "id": "", "text": "stopped"}


def test_a_second_policy_kill_ends_the_service(service):
    service.mode("worker", "raise31")
    service.start()
    assert service.process.wait(10) == 8
    assert [e["end"] for e in service.status()["ends"]
            if e["role"] == "worker"] == ["policy_kill", "policy_kill"]
    assert service.log().splitlines()[-1].startswith("casemate: CM-END-POLICY: ")
    assert service.status()["over"]["exit_code"] == 8 and not service.orphans()


@pytest.mark.parametrize("role", ["gateway", "worker", "keeper"])
def test_a_role_that_stands_still_is_replaced(service, role):
    """The watchdog sees what no exit shows."""
    service.start("--watchdog_timeout_ms", "2000").ready()
    before = service.pid(role)
    os.kill(before, signal.SIGSTOP)
    service.until(lambda: service.pid(role) != before, 5)
    service.until(lambda: [e["end"] for e in service.status()["ends"]] == ["watchdog"])
    service.ready()
    assert "CM-SUP-WATCHDOG" in service.log()


@pytest.mark.parametrize("accuser,accused", [("gateway", "worker"), ("worker", "gateway")])
def test_who_breaks_the_rings_is_replaced(service, accuser, accused):
    """A neighbour that is not listened to any more would never come back by itself."""
    service.mode(accuser, "accuse")
    service.start()
    told = service.until(lambda: service.status().get("ends"))
    service.mode(accuser, "ok")
    assert (told[0]["role"], told[0]["end"], told[0]["cause"]) == (accused, "protocol", "CM-SUP-WIRE")
    service.ready()
    assert len(service.seen(f"^{accuser} .* start")) == 1 and service.stop() == 0


def test_a_gateway_that_asks_for_quotes_without_end_harms_nobody(service):
    service.mode("gateway", "flood")
    service.mode("keeper", "slow_quote")
    service.start()
    service.until(lambda: "gateway: control socket full" in service.log())
    service.mode("gateway", "ok")
    service.ready()
    assert len(service.seen("^keeper .* start")) == 1 and "keeper: control" not in service.log()
    assert service.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_then_stop_in_order(service, number):
    service.start().ready()
    assert service.stop(number) == 0
    events = [e for e in service.events() if e.endswith((" drain", " stop"))]
    assert [(e.split()[0], e.split()[2]) for e in events] == [
        ("gateway", "drain"), ("worker", "drain"), ("gateway", "stop"), ("worker", "stop"),
        ("keeper", "stop"), ("devtpm", "stop")]
    assert service.seen("gateway .* state ready=0 .*reason=draining")
    assert not service.orphans()


def test_drain_ends_at_its_deadline(service):
    service.mode("gateway", "hold_drain")
    service.start().ready()
    begun = time.monotonic()
    assert service.stop() == 0
    assert 1.4 < time.monotonic() - begun < 4
    # The worker is drained only after the gateway: what that has accepted must still be answered.
    assert service.seen("^gateway .* drain") and not service.seen("^worker .* drain")


def test_a_second_signal_ends_at_once(service):
    service.mode("gateway", "hold_drain")
    service.start().ready()
    service.process.send_signal(signal.SIGTERM)
    service.until(lambda: service.seen("gateway .* drain"))
    assert service.stop() == 9
    assert not service.orphans()


def test_a_role_that_ignores_stop_is_killed(service):
    service.mode("keeper", "ignore_stop")
    service.start().ready()
    assert service.stop() == 0
    assert "CM-SUP-STUCK" in service.log() and not service.orphans()


def test_sigterm_before_ready(service):
    service.start()
    service.until(lambda: service.pid("worker"))
    assert service.stop() == 0
    assert not service.orphans()


def test_no_orphans_when_the_supervisor_is_killed(service):
    service.start().ready()
    service.process.kill()
    service.process.wait()
    service.until(lambda: not service.orphans(), 2)


def test_key_table_changes_reach_the_gateway_within_a_second(service):
    service.start().ready()
    row = struct.pack("<8s32sQ40sII512s", b"\1" * 8, b"\2" * 32, 0, b"name", 0, 0, b"")
    table = service.state / "keys.table"
    for generation, rows in ((5, row), (6, b"")):
        (service.state / "new").write_bytes(b"CMKEYS2\0" + struct.pack("<Q", generation) + rows)
        os.rename(service.state / "new", table)
        service.until(lambda: service.seen(f"keys generation={generation} count={len(rows) // 608}"), 1)


def test_one_service_per_state(service, tmp_path):
    service.start().ready()
    second = subprocess.run(service.process.args, capture_output=True, timeout=10)
    assert second.returncode == 9 and b"another casemate serves" in second.stderr


@pytest.mark.parametrize("change,code,text", [
    (lambda s: (s / "model.cmp").unlink(), 4, "cannot open package"),
    (lambda s: (s / "model.cmp").write_bytes(b"x"), 4, "shorter than a package's head"),
    (lambda s: (s / "owner.pem").write_text("x"), 3, "PUBLIC KEY"),
    (lambda s: (s / "enrolment.bin").unlink(), 3, "casemate init"),
    (lambda s: (s / "casemate.yaml").write_text("site:\n  threds: 1\n"), 3, ":2: unknown key"),
])
def test_what_is_missing_is_named(service, change, code, text):
    change(service.state)
    service.start()
    assert service.process.wait(10) == code
    assert text in service.log() and not service.events()


def image_exec(service, seal=True, preload=()):
    """Execute the supervisor as `casemate serve` does, but with what an attacker would change."""
    import fcntl
    program = service.bin / "casemate-supervisor"
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", subprocess.run(
        ["readelf", "-d", program], capture_output=True, text=True, check=True).stdout)
    libraries = [f"/lib/x86_64-linux-gnu/{name}" for name in needed if not name.startswith("ld-")]
    files = [program, "/lib64/ld-linux-x86-64.so.2", *libraries]
    pid = os.fork()
    if pid == 0:
        try:
            error = os.open(service.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(error, 2)
            os.dup2(os.open(service.bin, os.O_PATH | os.O_DIRECTORY), 31)
            for i, file in enumerate(files):
                fd = os.memfd_create(os.path.basename(file), os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
                os.write(fd, open(file, "rb").read())
                if seal:
                    fcntl.fcntl(fd, 1033, 15)  # F_ADD_SEALS: all
                os.dup2(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), 32 + i)
            os.closerange(32 + len(files), 256)
            listed = ":".join([f"/proc/self/fd/{34 + i}" for i in range(len(libraries))] +
                              [str(p) for p in preload])
            os.execve("/proc/self/fd/33", ["casemate-supervisor", "--inhibit-cache", "--preload",
                                           listed, "--argv0", "casemate-supervisor",
                                           "/proc/self/fd/32", "--config",
                                           str(service.state / "casemate.yaml")], UNCONFINED)
        finally:
            os._exit(99)
    return pid


def ended(pid):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it serves")


def test_a_supervisor_that_does_not_run_from_its_sealed_image_refuses(service):
    """By its path; with code beside the image; from memory that could still change. And a control."""
    done = subprocess.run([service.bin / "casemate-supervisor", "--config",
                           service.state / "casemate.yaml"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and "casemate serve" in done.stderr
    extra = "/lib/x86_64-linux-gnu/libm.so.6"
    assert ended(image_exec(service, preload=[extra])) == 5
    assert "CM-IMAGE-OWN" in service.log() and "libm.so.6" in service.log()
    assert ended(image_exec(service, seal=False)) == 5
    assert "not sealed" in service.log()
    assert not service.events()
    pid = image_exec(service)  # the same way, unchanged: it serves
    service.until(lambda: service.status().get("ready"))
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0


def test_what_a_caller_preloads_does_not_reach_the_supervisor(service):
    os.environ["LD_PRELOAD"] = "/lib/x86_64-linux-gnu/libm.so.6"
    try:
        service.start()
    finally:
        del os.environ["LD_PRELOAD"]
    service.ready()
    names = open(f"/proc/{service.process.pid}/environ").read()
    assert "LD_" not in names and service.stop() == 0


def adapters_allow(service):
    state = service.state
    (state / "owners.pem").write_text((state / "owner.pem").read_text() + (state / "policy.pem").read_text())
    text = (state / "casemate.yaml").read_text()
    (state / "casemate.yaml").write_text(text.replace(
        "sealed:\n", "sealed:\n  adapters_max: 2\n  adapter_owners: owners.pem\n"))
    (state / "adapters").mkdir()
    (state / "adapters" / "red.cmpkg").write_bytes(b"\3" * 90000)
    (state / "adapters" / "red.cmpkg.policy").write_bytes(b"\1" * 100)
    adapters_want(service, (7, b"red"))


def adapters_want(service, *rows):
    partial = service.state / "partial"
    partial.write_bytes(b"CMADAP1\0" + struct.pack("<Q", 9) +
                        b"".join(struct.pack("<Q64s", serial, name) for serial, name in rows))
    partial.rename(service.state / "adapters.table")


def adapter_states(service):
    return [(row["name"], row["state"], row["id"]) for row in service.status().get("adapters", [])]


def test_an_adapters_way_head_to_the_keeper_bytes_to_the_worker(service):
    """Nobody gets the file; what they get of it they can read, and nobody can write."""
    adapters_allow(service)
    service.start().ready()
    service.until(lambda: adapter_states(service) == [("red", "serving", "")])
    head = 73728 * 3 + 100
    assert service.seen(f"keeper .* open serial=7 bytes=73828 sum={head} writes=0 sealed=1")
    assert service.seen("worker .* load red serial=7 bytes=90000")
    assert service.seen("worker .* bytes serial=7 bytes=90000 sum=270000 writes=0 sealed=1")
    service.until(lambda: service.seen("keeper .* close how=0"))
    adapters_want(service)
    service.until(lambda: adapter_states(service) == [])
    assert service.seen("worker .* unload") and service.seen("keeper .* close how=2")
    # The same name with another serial is another adapter; a table that is no table changes nothing.
    adapters_want(service, (8, b"red"))
    service.until(lambda: adapter_states(service) == [("red", "serving", "")] and service.seen("load red serial=8"))
    for bad in (b"x", b"CMADAP1\0" + bytes(8) + bytes(72), b"CMADAP1\0" + bytes(8) + struct.pack("<Q64s", 9, b"../x"),
                b"CMADAP1\0" + bytes(8) + b"\1" * 72 * 9, b"CMADAP1\0" + bytes(8) + bytes(71)):
        before = service.log().count("adapters_refused")
        (service.state / "adapters.table").write_bytes(bad)
        service.until(lambda: service.log().count("adapters_refused") > before)
        assert adapter_states(service) == [("red", "serving", "")]
    assert service.stop() == 0


@pytest.mark.parametrize("word", ["read_beyond", "read_wide"])
def test_a_worker_that_asks_for_bytes_that_no_adapter_has_is_ended(service, word):
    adapters_allow(service)
    service.mode("worker", word)
    service.start()
    told = service.until(lambda: [e for e in service.status().get("ends", []) if e["role"] == "worker"])
    assert told[0]["end"] == "protocol" and "adapter" in told[0]["text"]
    assert not service.seen("worker .* bytes serial=")
    service.mode("worker", "")
    service.until(lambda: adapter_states(service) == [("red", "serving", "")], 20)
    assert service.stop() == 0


def test_a_worker_gets_bytes_of_the_adapter_that_is_loaded_and_of_no_other(service):
    adapters_allow(service)
    service.mode("worker", "read_other")
    service.start().ready()
    service.until(lambda: service.seen("worker .* load red serial=7"))
    time.sleep(0.5)
    assert not service.seen("worker .* bytes serial=") and adapter_states(service) == [("red", "loading", "")]
    adapters_want(service)
    service.until(lambda: adapter_states(service) == [])
    assert service.stop() == 0


def test_an_adapter_that_the_keeper_refuses_leaves_the_service_as_it_is(service):
    adapters_allow(service)
    service.mode("keeper", "no_adapter")
    service.start().ready()
    service.until(lambda: adapter_states(service) == [("red", "refused", "CM-SEAL-PCR")])
    adapters_want(service, (1, b"blue"), (7, b"red"))  # no file of that name
    service.until(lambda: ("blue", "refused", "CM-PKG-OPEN") in adapter_states(service))
    assert service.status()["ready"] and not service.seen("worker .* load")
    time.sleep(2.5)  # no reason that passes
    assert sum("open serial=7" in line for line in service.events()) == 1
    assert service.stop() == 0


def test_an_adapter_that_was_refused_for_a_passing_reason_is_tried_again(service):
    adapters_allow(service)
    service.mode("keeper", "busy_adapter")
    service.start().ready()
    service.until(lambda: adapter_states(service) == [("red", "refused", "CM-KEEPER-PAGE")])
    refused = time.monotonic()
    service.until(lambda: adapter_states(service) == [("red", "serving", "")])
    assert time.monotonic() - refused > 1 and sum("open serial=7" in line for line in service.events()) == 2
    adapters_want(service)
    service.until(lambda: adapter_states(service) == [])
    assert service.log().count('"adapter_refused"') == 1  # what is over does not come up again
    assert service.stop() == 0
