"""Too much of everything: KV pages run out, queues fill, clients leave; nothing crashes, grows or is
mixed up, and what is refused is refused by name."""
import concurrent.futures
import contextlib
import json
import os
import pathlib
import socket
import sys
import time

import openai
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
sys.path.insert(0, str(TESTS / "soak"))
import node as nodes  # noqa: E402
import soak  # noqa: E402
import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pressure")
    tiny_model.write(str(folder / "tiny.gguf"))
    return folder


@pytest.fixture
def started(build, folder):
    """start(options …): a node of its own; ended, and ended well, by the test's end."""
    running = []

    def start(*options):
        node = nodes.Node(build / "bin", folder / "node", folder / "owner")
        node.make(folder / "tiny.gguf", "soak")
        node.start(*options)
        running.append(node)
        node.api_key = node.key(f"key-{time.monotonic_ns()}")
        time.sleep(1.1)
        return node
    yield start
    for node in running:
        assert node.stop() == 0


def ask(node, text, **options):
    return node.client(node.api_key).chat.completions.create(
        model="soak", messages=[{"role": "user", "content": text}], temperature=0,
        extra_body={"ignore_eos": True}, **options)


def test_a_small_soak(started):
    """The same program as `./run soak`, for seconds: 24 clients, few pages, so that it preempts."""
    node = started("--kv_pages", "48", "--sequences_max", "6", "--queue_max", "64",
                   "--requests_max", "64")
    result = soak.run(node, soak.catalogue(20, 30, 90), 6, 24)
    assert soak.faults(result, 1 << 20) == [], json.dumps(result, indent=1)
    assert result["abandoned"] > 0 and result["cached_prompt_tokens"] > 0


def test_a_mixed_up_reply_would_be_seen():
    """The soak's judge itself: each kind of fault is one."""
    good = {"wrong": 0, "lost": 0, "stuck_clients": 0, "left_in_flight": 0, "same_processes": True,
            "same_alone_after": True, "growth_bytes": {"worker": 0, "gateway": 1 << 20},
            "whole": 9, "clients": 4, "faults": []}
    assert soak.faults(good) == []
    for change in ({"wrong": 1}, {"lost": 1}, {"stuck_clients": 1}, {"left_in_flight": 1}, {"same_processes": False},
                   {"same_alone_after": False}, {"growth_bytes": {"worker": 4096}},
                   {"growth_bytes": {"worker": 0, "gateway": 5 << 20}}, {"whole": 3}):
        assert soak.faults({**good, **change}) != []


def test_pages_and_queue_exhausted_is_429_and_passes(started):
    node = started("--kv_pages", "16", "--sequences_max", "2", "--queue_max", "2",
                   "--requests_max", "64")
    alone = ask(node, "long", max_tokens=380).choices[0].message.content

    def one(_):
        try:
            return ask(node, "long", max_tokens=380).choices[0].message.content
        except openai.RateLimitError as refused:
            assert int(refused.response.headers["retry-after"]) >= 1
            return None
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(one, range(16)))
    assert replies.count(None) >= 4 and replies.count(alone) == 16 - replies.count(None) >= 4
    worker = node.pid("worker")
    assert ask(node, "long", max_tokens=380).choices[0].message.content == alone
    assert node.pid("worker") == worker and node.status()["roles"]["worker"]["restarts"] == 0


def test_what_the_limits_permit_fits_into_the_gateways_memory(started):
    """Sixty bodies but for their last byte, and beside them the one whose parsed form is largest: 81 times its bytes."""
    most = 8 << 20
    node = started("--body_bytes_max", most, "--requests_max", "64", "--requests_per_key_max", "64")
    host, port = node.address.split(":")
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {node.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {most}\r\n\r\n").encode()
    gateway, context = node.pid("gateway"), node.context()

    def begin(body):
        link = context.wrap_socket(socket.create_connection((host, int(port)), 20), server_hostname=host)
        link.sendall(head + body)
        return link
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(begin(b" " * (most - 1)))
        body = b'{"x":[' + b"{}," * ((most - 10) // 3) + b"{}]}"
        link = stack.enter_context(begin(body.ljust(most)))
        reply = b""
        while more := link.recv(4096):
            reply += more
            if b"}}" in reply:
                break
        assert reply.startswith(b"HTTP/1.1 400 ") and b"unknown_parameter" in reply, reply
        assert ask(node, "well", max_tokens=4).choices[0].finish_reason == "length"
    assert node.pid("gateway") == gateway


def test_too_long_a_prompt_names_both_lengths(started):
    node = started("--kv_pages", "8")  # 256 positions, fewer than the model's context
    with pytest.raises(openai.BadRequestError) as refused:
        ask(node, "y " * 400, max_tokens=4)
    assert refused.value.code == "context_length_exceeded"
    numbers = [int(word.strip(".,")) for word in str(refused.value.message).split()
               if word.strip(".,").isdigit()]
    assert 256 in numbers and max(numbers) > 400, refused.value.message


def test_without_the_prefix_cache_the_tokens_are_the_same(started):
    text = "a beginning that comes again and again " * 5
    replies = []
    for switch in ("true", "false"):
        node = started("--prefix_cache", switch)
        pair = [ask(node, text, max_tokens=60) for _ in range(2)]
        cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in pair]
        assert (cached[0] == 0 and cached[1] > 0) if switch == "true" else cached == [0, 0]
        replies += [reply.choices[0].message.content for reply in pair]
        assert node.stop() == 0
    assert len(set(replies)) == 1


def test_keys_and_values_as_int8_are_measured_and_take_half_the_memory(build, folder, tmp_path):
    node = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(folder / "tiny.gguf", "soak")
    found = {}
    for kind in ("fp16", "int8"):
        yaml = node.state / "casemate.yaml"
        if kind == "int8":
            yaml.write_text(yaml.read_text().replace("sealed:\n", "sealed:\n  kv_kind: int8\n"))
            node.start("--kv_bytes", 8 << 20, wait=False)
            assert node.service.wait(30) == 5 and "CM-SEAL-PCR" in node.tail()  # the owner did not sign this
            node.sign()
        node.start("--kv_bytes", 8 << 20)
        node.api_key = node.key(kind)
        time.sleep(1.1)
        replies = [ask(node, "a beginning that comes again and again " * 5, max_tokens=60) for _ in range(2)]
        assert replies[0].choices[0].message.content == replies[1].choices[0].message.content
        assert replies[1].usage.prompt_tokens_details.cached_tokens > 0
        metrics = node.get("/metrics", node.api_key)[1]
        assert f'cache_dtype="{kind}"' in metrics and f'"kv_kind":"{kind}"' in node.log.read_text()
        found[kind] = {line.split()[0]: int(line.split()[1]) for line in metrics.splitlines()
                       if line.startswith(("casemate_kv_pages ", "casemate_kv_page_bytes "))}
        assert node.stop() == 0
    for kind, figures in found.items():
        assert figures["casemate_kv_pages"] == (8 << 20) // figures["casemate_kv_page_bytes"], found
    assert 1.6 < found["int8"]["casemate_kv_pages"] / found["fp16"]["casemate_kv_pages"] <= 1.9, found


def test_prompts_in_bf16_are_measured_and_said_or_refused(build, folder, tmp_path):
    node = nodes.Node(build / "bin", tmp_path / "node", tmp_path / "owner")
    node.make(folder / "tiny.gguf", "soak")
    yaml = node.state / "casemate.yaml"
    yaml.write_text(yaml.read_text().replace("sealed:\n", "sealed:\n  prompts: bf16\n"))
    if "amx_bf16" not in pathlib.Path("/proc/cpuinfo").read_text():
        node.start(wait=False)
        assert node.service.wait(30) == 3 and "CM-DEV-PROMPTS" in node.tail() and "prompts: exact" in node.tail()
        return
    node.start(wait=False)
    assert node.service.wait(30) == 5 and "CM-SEAL-PCR" in node.tail()  # the owner did not sign this
    node.sign()
    node.start()
    node.api_key = node.key("bf16")
    time.sleep(1.1)
    replies = [ask(node, "a beginning that comes again and again " * 5, max_tokens=60) for _ in range(2)]
    assert replies[0].choices[0].message.content == replies[1].choices[0].message.content
    assert replies[1].usage.prompt_tokens_details.cached_tokens > 0
    assert "amx-bf16 prompts" in node.log.read_text()
    assert node.stop() == 0


def test_more_memory_than_there_is_is_refused_with_both_numbers(build, folder):
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    node.make(folder / "tiny.gguf", "soak")
    node.log.write_text("")
    node.start("--kv_bytes", 1 << 40, wait=False)
    assert node.service.wait(20) == 3, node.tail()
    node.service = None
    line = next(line for line in node.log.read_text().splitlines() if "CM-WRK-MEMORY" in line)
    text = json.loads(line)["text"] if line.startswith("{") else line
    numbers = [int(word.strip("(),:")) for word in text.split() if word.strip("(),:").isdigit()]
    total = int(next(row for row in open("/proc/meminfo") if row.startswith("MemTotal")).split()[1])
    assert numbers[0] > numbers[-1]  # MiB: what is needed, what is allowed
    assert numbers[-1] <= total >> 10


def group_of_ours(version2: bool) -> pathlib.Path:
    """Where the tests run, and go back to."""
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" if version2 else "cpu" in controllers.split(","):
            return pathlib.Path("/sys/fs/cgroup" if version2 else "/sys/fs/cgroup/cpu") / path[1:]
    pytest.skip("no control group of the cpu controller is ours")


@pytest.fixture
def quota():
    """quota(percent): from now on we, and whom we start, have so much of a CPU, by a control group."""
    version2 = pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists()
    above = pathlib.Path("/sys/fs/cgroup" if version2 else "/sys/fs/cgroup/cpu")
    home = group_of_ours(version2)
    if not (home / "cgroup.procs").exists():
        pytest.skip(f"our control group is not shown as {home}")
    folder = above / f"casemate-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as why:
        pytest.skip(f"no control group can be made: {why}")
    if not (folder / ("cpu.max" if version2 else "cpu.cfs_quota_us")).exists():
        folder.rmdir()
        pytest.skip("the cpu controller is not given to groups")

    def give(percent):
        if version2:
            (folder / "cpu.max").write_text(f"{1000 * percent} 100000")
        else:
            (folder / "cpu.cfs_quota_us").write_text(str(1000 * percent))
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    yield give
    (home / "cgroup.procs").write_text(str(os.getpid()))
    nodes.wait(lambda: not (folder / "cgroup.procs").read_text().split())
    folder.rmdir()


def threads(started, *options) -> int:
    node = started(*options)
    count = len(os.listdir(f"/proc/{node.pid('worker')}/task"))
    assert node.stop() == 0 and f", {count} threads" in node.log.read_text()
    return count


def test_threads_are_those_of_affinity(started):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        one = threads(started)
    finally:
        os.sched_setaffinity(0, allowed)
    assert one == 1 and threads(started) == len(allowed)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU is all there is")
def test_threads_are_no_more_than_a_quota_allows(started, quota):
    """The worker cannot see its control group; the supervisor can, and tells it."""
    quota(160)
    assert threads(started) == 1
    assert threads(started, "--threads", "2") == 2  # who says a number gets it
    quota(100 * len(os.sched_getaffinity(0)))
    assert threads(started) == len(os.sched_getaffinity(0))


def test_the_worker_holds_weights_cache_and_little_else(started):
    node = started("--kv_bytes", 64 << 20)
    for i in range(3):
        ask(node, f"hello {i} " * 20, max_tokens=100)
    payload = node.package.stat().st_size
    held = soak.resident(node)["worker"]
    assert held <= payload + (64 << 20) + (64 << 20), held
    assert held >= 64 << 20  # the cache is there from the start, not when it is first used
