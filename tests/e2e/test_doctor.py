"""casemate doctor over a made-up host: each row passes on a good one, and tells what is wrong on a bad one."""
import json
import pathlib
import shutil
import subprocess

import pytest

FLAGS = "fpu aes avx2 fma f16c pclmulqdq sha_ni vaes avx512_vnni"
GOOD = {
    "proc/sys/kernel/osrelease": "6.1.0-28-amd64\n",
    "proc/sys/kernel/seccomp/actions_avail": "kill_process kill_thread trap errno user_notif trace log allow\n",
    "proc/self/cgroup": "0::/system.slice/casemate.service\n",
    "proc/self/status": "Name:\tcasemate\nCapEff:\t0000000000000000\n",
    "proc/self/limits": "Max locked memory         unlimited            unlimited            bytes\n",
    "proc/self/ns/pid": "", "proc/self/ns/net": "",
    "proc/sys/user/max_user_namespaces": "96365\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
    "proc/cpuinfo": f"processor\t: 0\nmicrocode\t: 0xa10114c\nflags\t\t: {FLAGS}\n",
    "sys/fs/cgroup/system.slice/casemate.service/cgroup.controllers": "cpuset cpu io memory pids\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/devices/system/cpu/vulnerabilities/meltdown": "Not affected\n",
    "sys/devices/system/cpu/vulnerabilities/spectre_v2": "Mitigation: Enhanced / Automatic IBRS\n",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
    "dev/tpmrm0": "", "sys/class/tpm/tpm0/tpm_version_major": "2\n",
    "probes": "uid 1000\nlandlock 2\nmdwe 0\nmemfd_secret 1\nclock_synchronised 1\ntpm_access 0\n",
}
SWAP = GOOD["proc/swaps"] + "/dev/sda2 partition 1000 0 -2\n"
LITTLE = {"proc/self/limits": "Max locked memory         8388608              8388608              bytes\n"}


def probes(**changes):
    lines = dict(line.split() for line in GOOD["probes"].splitlines())
    return {"probes": "".join(f"{k} {v}\n" for k, v in {**lines, **changes}.items())}


# name of the row, what differs (None: the file is missing), level, words that the row or its advice has
BAD = [
    ("kernel", {"proc/sys/kernel/osrelease": "5.10.0\n"}, "fail", "5.14"),
    ("kernel", {"proc/sys/kernel/osrelease": "5.15.0-generic\n"}, "warn", "6.1"),
    ("kernel", {"proc/sys/kernel/osrelease": None}, "fail", "unknown"),
    ("seccomp", {"proc/sys/kernel/seccomp/actions_avail": "kill_thread errno\n"}, "fail", "CONFIG_SECCOMP"),
    ("landlock", probes(landlock=-1), "warn", "lsm=landlock"),
    ("mdwe", probes(mdwe=-1), "warn", "6.3"),
    ("secret_memory", probes(memfd_secret=0), "warn", "secretmem.enable"),
    ("namespaces", {"proc/self/ns/pid": None}, "fail", "CONFIG_PID_NS"),
    ("namespaces", {"proc/sys/user/max_user_namespaces": "0\n"}, "warn", "ordinary user"),
    ("namespaces", {"proc/sys/kernel/unprivileged_userns_clone": "0\n"}, "warn", "userns_clone=1"),
    ("namespaces", {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}, "warn", "apparmor"),
    ("cgroup", {"sys/fs/cgroup/system.slice/casemate.service/cgroup.controllers": "cpu\n"}, "warn",
     "Delegate=yes"),
    ("cgroup", {"sys/fs/cgroup/system.slice/casemate.service/cgroup.controllers": None}, "warn", "mount cgroup2"),
    ("swap", {"proc/swaps": SWAP}, "warn", "swapoff"),
    ("swap", {"proc/swaps": SWAP} | LITTLE, "fail", "reach the disk"),
    ("memlock", LITTLE, "warn", "8192 KiB"),
    # CAP_IPC_LOCK alone is no help: the worker has lost it when it locks
    ("memlock", {**LITTLE, "proc/self/status": "CapEff:\t0000000000004000\n"}, "warn", "8192 KiB"),
    ("page_merging", {"sys/kernel/mm/ksm/run": "1\n"}, "warn", "ksm"),
    ("huge_pages", {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"}, "warn", "madvise"),
    ("huge_pages", {"sys/kernel/mm/transparent_hugepage/enabled": None}, "warn", "madvise"),
    ("cpu", {"proc/cpuinfo": "microcode\t: 0xa1\nflags\t\t: fpu aes pclmulqdq sse4_2\n"}, "warn", "AVX2"),
    ("cpu", {"proc/cpuinfo": "microcode\t: 0xa1\nflags\t\t: avx2 fma f16c\n"}, "warn", "ChaCha20"),
    ("microcode", {"proc/cpuinfo": f"microcode\t: 0xffffffff\nflags : {FLAGS}\n"}, "warn", "hypervisor"),
    ("microcode", {"proc/cpuinfo": f"flags : {FLAGS}\n"}, "warn", "no microcode"),
    ("vulnerabilities", {"sys/devices/system/cpu/vulnerabilities/meltdown": "Vulnerable\n"}, "warn", "meltdown"),
    ("vulnerabilities", {"sys/devices/system/cpu/vulnerabilities/mds":
                         "Mitigation: Clear CPU buffers; SMT vulnerable\n"}, "warn", "mds"),
    ("clock", {"sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n"}, "warn", "hpet"),
    ("clock", probes(clock_synchronised=0), "warn", "chrony"),
    ("tpm", {"dev/tpmrm0": None}, "warn", "development TPM"),
    ("tpm", {"sys/class/tpm/tpm0/tpm_version_major": "1\n"}, "fail", "2.0"),
    ("tpm", probes(tpm_access=13), "fail", "Permission denied"),
    ("gpu", {"dev/nvidiactl": ""}, "warn", "CUDA"),
]
CODES = {"kernel": 9, "seccomp": 8, "namespaces": 8, "swap": 9, "tpm": 6}


def host(folder: pathlib.Path, **_) -> pathlib.Path:
    for name, text in GOOD.items():
        put(folder, name, text)
    return folder


def put(folder: pathlib.Path, name: str, text: str | None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True) if text is None else path.write_text(text)


def doctor(build, *words):
    done = subprocess.run([build / "bin" / "casemate", "doctor", *map(str, words)], capture_output=True,
                          text=True, timeout=20)
    return done


def rows(done) -> dict:
    return {row["check"]: row for row in json.loads(done.stdout)["checks"]}


def test_a_good_host_passes_each_row(build, tmp_path):
    done = doctor(build, "--root", host(tmp_path), "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert {name: row["level"] for name, row in rows(done).items()} == dict.fromkeys(rows(done), "pass")
    assert set(rows(done)) == {name for name, *_ in BAD}, "each row has a bad host below"
    assert all(row["next"] == "" and row["found"] for row in rows(done).values())
    report = json.loads(done.stdout)
    assert report["ok"] and (report["warn"], report["fail"]) == (0, 0)


@pytest.mark.parametrize("name,changes,level,words", BAD,
                         ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BAD)])
def test_a_bad_host_is_told_with_what_to_do(build, tmp_path, name, changes, level, words):
    host(tmp_path)
    for path, text in changes.items():
        put(tmp_path, path, text)
    done = doctor(build, "--root", tmp_path, "--json")
    row = rows(done)[name]
    assert row["level"] == level and words in row["found"] + row["next"], row
    assert row["next"], "a warning says what to do"
    others = {n for n, r in rows(done).items() if r["level"] != "pass"} - {name}
    assert others <= {"memlock"}, "nothing else is wrong with this host"
    assert done.returncode == (CODES[name] if level == "fail" else 0)
    if level == "fail":
        assert done.stderr.startswith(f"casemate: CM-CLI-DOCTOR: {name}: ")


@pytest.mark.parametrize("changes,found", [
    ({"proc/self/status": "CapEff:\t000001ffffffffff\n"} | LITTLE, "without limit"),
    ({"sys/fs/cgroup/system.slice": None, "sys/fs/cgroup/memory/memory.limit_in_bytes": "1\n",
      "sys/fs/cgroup/pids/tasks": "", "sys/fs/cgroup/unified/cgroup.procs": ""}, "v1 memory and pids, v2 beside"),
])
def test_other_ways_to_be_good(build, tmp_path, changes, found):
    host(tmp_path)
    for path, text in changes.items():
        if text is None:
            shutil.rmtree(tmp_path / path)
        else:
            put(tmp_path, path, text)
    done = doctor(build, "--root", tmp_path, "--json")
    assert found in " ".join(row["found"] for row in rows(done).values()), done.stdout
    assert {row["level"] for row in rows(done).values()} == {"pass"}


def test_this_host_is_looked_at_and_read_by_people(build):
    done = doctor(build)
    lines = done.stdout.splitlines()
    assert done.returncode in (0, 6, 8, 9) and len([x for x in lines if x[:4] in ("pass", "warn", "FAIL")]) == 17
    assert lines[-1].endswith("fail") and "kernel " in lines[0]
    assert doctor(build, "extra").returncode == 2


def test_an_empty_host_fails_and_does_not_crash(build, tmp_path):
    done = doctor(build, "--root", tmp_path, "--json")
    assert done.returncode == 9 and rows(done)["kernel"]["level"] == "fail"
