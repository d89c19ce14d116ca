"""A whole service whose processes die, stop and are asked about: what clients lose and operators read."""
import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
sys.path.insert(0, str(TESTS / "faults"))
import node as nodes  # noqa: E402
import tiny_model  # noqa: E402
from kill_points import alive, descendants  # noqa: E402

ROLES = ("gateway", "worker", "keeper", "devtpm")


@pytest.fixture
def node(build, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    made = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    made.make(tmp_path / "tiny.gguf", "tiny")
    made.api_key = made.key("test")
    made.start()
    yield made
    if made.service is not None and made.service.poll() is None:
        made.stop()


def status(node) -> subprocess.CompletedProcess:
    return node.run("casemate", "status", "--state", node.state, check=False)


def back(node, role: str, pid: int) -> None:
    end = time.monotonic() + 10
    while node.pid(role) in (0, pid) or not node.status()["ready"]:
        assert time.monotonic() < end, node.tail()
        time.sleep(0.02)


def test_streams_under_way_are_finished_before_the_stop(node):
    def stream(number):
        chunks = node.client(node.api_key).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"stream {number}"}], max_tokens=300,
            temperature=0, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True})
        first = next(chunks)
        begun.append(number)
        rest = [first, *chunks]
        return rest[-1].usage.completion_tokens, [c.choices[0].finish_reason for c in rest if c.choices][-1]
    begun: list = []
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(stream, i) for i in range(6)]
        while len(begun) < 6:
            time.sleep(0.005)
        node.service.send_signal(signal.SIGTERM)
        assert [future.result() for future in running] == [(300, "length")] * 6
    assert node.service.wait(10) == 0


@pytest.mark.parametrize("when", ["serving", "starting"])
def test_no_process_outlives_the_supervisor(node, when):
    if when == "starting":
        node.stop()
        node.start(wait=False)
        end = time.monotonic() + 10
        while len(descendants(node.service.pid)) < 2:
            assert time.monotonic() < end
    pids = descendants(node.service.pid)
    assert len(pids) >= (4 if when == "serving" else 2)
    node.service.kill()
    node.service.wait()
    end = time.monotonic() + 1
    while any(map(alive, pids)):
        assert time.monotonic() < end, [p for p in pids if alive(p)]
        time.sleep(0.01)
    told = status(node)
    assert told.returncode == 9 and "killed from outside" in told.stderr
    node.start()
    assert node.stop() == 0


def test_an_operator_reads_who_ended_how_and_what_to_do(node):
    pid = node.pid("worker")
    os.kill(pid, signal.SIGKILL)
    back(node, "worker", pid)
    told = status(node)
    assert told.returncode == 0 and told.stdout.startswith("casemate "), told
    line = [text for text in told.stdout.splitlines() if text.startswith("ended:")][0]
    assert "worker signal after " in line and "CM-END-SIGNAL: worker was ended by signal 9 (SIGKILL)" in line
    assert "report it" in told.stdout
    metrics = node.get("/metrics", node.api_key)[1]
    assert 'casemate_role_ends_total{role="worker",end="signal"} 1' in metrics
    assert 'casemate_role_ends_total{role="gateway",end="signal"} 0' in metrics
    assert node.stop() == 0
    told = status(node)
    assert told.returncode == 9 and "stopped as it was told" in told.stderr and "ended:" not in told.stdout


@pytest.mark.parametrize("role,code,words", [("devtpm", 6, "CM-SUP-TPM-GONE")])
def test_the_last_word_of_a_service_that_ended_stays(node, role, code, words):
    os.kill(node.pid(role), signal.SIGKILL)
    assert node.service.wait(10) == code
    told = status(node)
    assert words in told.stderr and f"exit {code}" in told.stderr and "casemate serve --state" in told.stderr
    assert f"{role} signal after" in told.stdout
    node.service = None


def test_a_development_tpm_with_a_damaged_state_says_so(node):
    assert node.stop() == 0
    os.truncate(node.state / "devtpm.state", 1000)
    node.start(wait=False)
    assert node.service.wait(10) == 6
    told = status(node).stderr
    assert "both copies of its state are damaged" in told and "restore the file" in told
    node.service = None


def test_in_strict_mode_the_keeper_ends_the_service_with_its_own_code(build, tmp_path):
    tiny_model.write(str(tmp_path / "tiny.gguf"))
    node = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(tmp_path / "tiny.gguf", "tiny", mode="strict")
    node.start()
    pids = descendants(node.service.pid)
    os.kill(node.pid("keeper"), signal.SIGKILL)
    assert node.service.wait(10) == 6 and not any(map(alive, pids))
    assert "CM-SUP-TPM-GONE" in status(node).stderr
    node.service = None
