"""The whole way: a sealed package answers the unmodified openai client through every process."""
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import openai
import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import tiny_model  # noqa: E402

PROMPT = "The quick brown fox says something secret-looking: zebra-canary-4711"


@pytest.fixture(scope="module")
def tiny(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("way")
    tiny_model.write(str(folder / "tiny.gguf"))
    node = nodes.Node(build / "bin", folder / "node", folder / "owner")
    node.make(folder / "tiny.gguf", "tiny")
    node.start("--kv_pages", "40", "--sequences_max", "8")
    node.api_key = node.key("test")
    time.sleep(0.6)
    yield node
    assert node.stop() == 0


def ask(node, text, **options):
    options = {"max_tokens": 24, "temperature": 0, "model": "tiny", **options}
    options.setdefault("extra_body", {"ignore_eos": True})
    return node.client(node.api_key).chat.completions.create(
        messages=[{"role": "user", "content": text}], **options)


def test_whole_and_stream_agree_with_usage(tiny):
    whole = ask(tiny, "hello there")
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    chunks = list(ask(tiny, "hello there", stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completions(tiny):
    reply = tiny.client(tiny.api_key).completions.create(model="tiny", prompt="the and the",
                                                         max_tokens=8, temperature=0)
    assert reply.object == "text_completion" and reply.usage.completion_tokens <= 8


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 5},
                                      {"temperature": 1.2, "seed": 6, "top_p": 0.8,
                                       "frequency_penalty": 0.5}])
def test_same_request_same_tokens_alone_and_in_a_batch(tiny, sampling):
    texts = [f"request number {i} {'x ' * (7 * i)}" for i in range(8)]
    alone = [ask(tiny, t, max_tokens=60, **sampling).choices[0].message.content for t in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda t: ask(tiny, t, max_tokens=60, **sampling), texts))
    assert [r.choices[0].message.content for r in together] == alone


def test_an_equal_prefix_is_reused_by_its_own_key_alone(tiny):
    """Told in the usage; the reply is the same to the last token."""
    other = tiny.client(tiny.key("other"))
    time.sleep(1.1)
    text = "a long beginning that is sent again " * 6
    first, again = ask(tiny, text, max_tokens=40), ask(tiny, text, max_tokens=40)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens % 32 == 0
    own = tiny.client
    try:
        tiny.client = lambda key: other
        foreign = ask(tiny, text, max_tokens=40)
    finally:
        tiny.client = own
    assert foreign.usage.prompt_tokens_details.cached_tokens == 0
    assert (first.choices[0].message.content == again.choices[0].message.content
            == foreign.choices[0].message.content)


def test_preemption_changes_no_token(tiny):
    """Forty pages of 32 positions are too few for six long replies at once."""
    texts = [f"long {i}" for i in range(6)]
    alone = [ask(tiny, t, max_tokens=380).choices[0].message.content for t in texts]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda t: ask(tiny, t, max_tokens=380), texts))
    time.sleep(1.2)  # the worker tells its figures once a second
    metrics = tiny.get("/metrics", tiny.api_key)[1].splitlines()
    preempted = [line for line in metrics if line.startswith("casemate_worker_preemptions_total")]
    assert float(preempted[0].split()[-1]) > 0
    assert [r.choices[0].message.content for r in together] == alone


def test_stop_strings_never_show(tiny):
    text = ask(tiny, "stop", max_tokens=120).choices[0].message.content
    stop = text[40:43]
    cut = ask(tiny, "stop", max_tokens=120, stop=[stop])
    assert cut.choices[0].message.content == text[:text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_refusals(tiny):
    with pytest.raises(openai.NotFoundError):
        ask(tiny, "x", model="another")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(tiny, "y " * 3000)
    assert refused.value.code == "context_length_exceeded" and "512" in str(refused.value)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(tiny, "x", extra_body={"tools": []})
    assert refused.value.param == "tools"
    for key in ("cm-0000000000000000-" + "A" * 43, "nonsense"):
        with pytest.raises(openai.AuthenticationError):
            tiny.client(key).models.list()
    assert tiny.get("/v1/models")[0] == 401 and tiny.get("/nowhere", tiny.api_key)[0] == 404


def test_probes(tiny):
    assert tiny.get("/livez")[0] == 200 and tiny.get("/readyz")[0] == 200
    assert tiny.get("/startupz")[0] == 200 and tiny.get("/health")[0] == 200
    assert json.loads(tiny.get("/version")[1])["version"]
    metrics = tiny.get("/metrics", tiny.api_key)[1]
    assert "casemate_" in metrics and "vllm:num_requests_running" in metrics


def test_a_revoked_key_is_refused_within_a_second(tiny):
    key = tiny.key("short-lived")
    time.sleep(0.6)
    assert tiny.get("/v1/models", key)[0] == 200
    tiny.run("casemate", "keys", "revoke", key.split("-")[1], "--state", tiny.state)
    time.sleep(1.0)
    assert tiny.get("/v1/models", key)[0] == 401


def test_a_client_that_leaves_frees_its_sequence(tiny):
    stream = ask(tiny, "long", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 3
    while "vllm:num_requests_running" in (text := tiny.get("/metrics", tiny.api_key)[1]):
        running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        if float(running[0].split()[-1]) == 0:
            return
        assert time.monotonic() < end, "generation goes on without its client"
        time.sleep(0.1)


@pytest.mark.parametrize("role,other", [("worker", "gateway"), ("gateway", "worker")])
def test_a_killed_role_is_replaced_without_the_other(tiny, role, other):
    before, kept, keeper = tiny.pid(role), tiny.pid(other), tiny.pid("keeper")
    stream = ask(tiny, "long", max_tokens=450, stream=True)
    iterator = iter(stream)
    next(iterator)
    os.kill(before, signal.SIGKILL)
    killed = time.monotonic()
    finish = None
    try:
        for chunk in iterator:
            finish = chunk.choices[0].finish_reason if chunk.choices else finish
        ended_well = True
    except Exception:  # the client's error classes differ by where the stream broke
        ended_well = False
    assert not ended_well and finish is None, "the client was not told that its reply was cut"
    assert time.monotonic() - killed < 1.0
    end = time.monotonic() + 10
    while time.monotonic() < end:
        status = tiny.status()
        if status["ready"] and status["roles"][role]["pid"] not in (before, 0):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    assert tiny.pid(role) != before and tiny.pid(other) == kept and tiny.pid("keeper") == keeper
    assert ask(tiny, "again").usage.completion_tokens == 24


def test_no_prompt_text_in_the_log(tiny):
    reply = ask(tiny, PROMPT, max_tokens=40).choices[0].message.content
    log = tiny.log.read_bytes()
    assert b"zebra-canary" not in log and tiny.api_key.encode() not in log
    assert len(reply) < 8 or reply.encode() not in log
    assert b'"event"' in log


def test_sigterm_under_load_finishes_what_runs(build, tiny, tmp_path):
    node = nodes.Node(build / "bin", tmp_path / "node", tiny.owner)
    node.make(tiny.state.parent / "tiny.gguf", "tiny")
    node.start()
    node.api_key = node.key("load")
    time.sleep(0.6)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, node, f"drain {i}", max_tokens=300) for i in range(4)]
        time.sleep(0.05)
        assert node.stop() == 0
        replies = [future.exception() or future.result() for future in running]
    done = [r for r in replies if not isinstance(r, Exception)]
    assert all(r.usage.completion_tokens == 300 for r in done)
    assert all(isinstance(r, (openai.APIStatusError, openai.APIConnectionError))
               for r in replies if isinstance(r, Exception))
    node.start()
    assert node.stop() == 0


@pytest.mark.parametrize("where,part", [(-1, "payload segment"), (74000, "manifest"),
                                        (4200, "core header"), (0, "prologue")])
def test_a_flipped_byte_serves_nothing(build, tiny, tmp_path, where, part):
    node = nodes.Node(build / "bin", tmp_path / "node", tiny.owner)
    shutil.copytree(tiny.state, node.state, ignore=shutil.ignore_patterns("run", "service.log"))
    (node.state / "service.log").write_bytes(b"")
    text = (node.state / "casemate.yaml").read_text().replace(str(tiny.state), str(node.state))
    (node.state / "casemate.yaml").write_text(text)
    blob = bytearray(node.package.read_bytes())
    blob[where] ^= 1
    node.package.write_bytes(blob)
    node.start(wait=False)
    assert node.service.wait(20) == 4, node.tail()
    log = node.log.read_text()
    assert part in log and "offset" in log and "CM-PKG-" in log
    assert '"worker_hello"' not in log


def child_of(parent: int, program: str) -> int:
    """pid of the child that runs `program`, as soon as there is one."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for pid in pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            try:
                if program in pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    return int(pid)
            except OSError:
                continue
    raise AssertionError(f"{program} never came")


@pytest.mark.parametrize("role", ["worker", "gateway"])
def test_a_role_killed_while_it_starts_is_started_again(build, tiny, tmp_path, role):
    node = nodes.Node(build / "bin", tmp_path / "node", tiny.owner)
    node.make(tiny.state.parent / "tiny.gguf", "tiny")
    node.start(wait=False)
    pid = child_of(node.service.pid, f"casemate-{role}")
    os.kill(pid, signal.SIGKILL)
    node.ready(pid_not=pid)
    assert node.status()["roles"][role]["restarts"] == 1
    node.api_key = node.key("after")
    time.sleep(0.6)
    assert ask(node, "hello").usage.completion_tokens == 24
    assert node.stop() == 0


def test_what_runs_is_sealed_memory(tiny):
    """No role, and not the supervisor, maps code of a file that somebody could exchange."""
    pids = {role: tiny.pid(role) for role in ("gateway", "worker", "keeper", "devtpm")}
    for role, pid in {**pids, "supervisor": tiny.service.pid}.items():
        code = [line.split(maxsplit=5) for line in
                pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()]
        names = {line[5] for line in code if "x" in line[1] and len(line) > 5}
        assert any("casemate-" + role in name for name in names)
        assert all(name.startswith(("/memfd:", "[vdso]", "[vsyscall]")) for name in names), names
