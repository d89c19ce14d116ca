"""The gateway beside its worker: limits, refusals, deaths, broken rules, draining."""
import contextlib
import json
import pathlib
import sys
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    KEYS, chat, gateway, held, own, post, shared)


def test_a_full_queue_is_told_with_retry_after(own):
    gateway = own(requests_max=4, requests_per_key_max=3)
    with contextlib.ExitStack() as stack:
        clients = [held(gateway, stack, "alice") for _ in range(3)]
        reply = gateway.post(chat("echo a"))
        assert reply.error(429, "key_limit")["type"] == "rate_limit_error"
        assert int(reply.headers["retry-after"]) >= 1
        held(gateway, stack, "bob")
        for stream in (False, True):
            reply = gateway.post(chat("echo a", stream=stream), KEYS["bob"])
            reply.error(429, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
        assert gateway.get("/readyz").status == 200, "full is not broken"
        clients[0].sock.close()
        gateway.event("cancel")
        gateway.until(lambda: gateway.post(chat("echo a")).status == 200)
    with gateway.client(max_retries=4) as client:
        held_again = contextlib.ExitStack()
        for _ in range(3):
            held(gateway, held_again, "alice")
        threading.Timer(0.5, held_again.close).start()
        assert client.chat.completions.create(
            model="test-model", messages=[{"role": "user", "content": "echo a"}]).id


def test_a_worker_that_ignores_cancel_still_counts(own):
    """Clients that come and go cannot pile work on the worker."""
    gateway = own(requests_max=2)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            held(gateway, stack, "alice", "stubborn")
        gateway.event("cancel")
    assert gateway.post(chat("echo a")).status == 429
    gateway.say("rings")
    gateway.until(lambda: gateway.post(chat("echo a")).status == 200)


@pytest.mark.parametrize("why,status,code", [
    ("context", 400, "context_length_exceeded"), ("queue", 429, "queue_full"),
    ("input", 400, "invalid_prompt"), ("drain", 503, "draining"),
    ("failed", 500, "worker_failed"), ("empty", 400, "empty_prompt")])
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_by_the_worker(gateway, why, status, code, stream):
    reply = gateway.post(chat(f"refuse {why}", stream=stream))
    reply.error(status, code)
    assert ("retry-after" in reply.headers) == (status in (429, 503))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_dies_in_mid_reply(gateway, count, stream):
    """Fresh rings are how the supervisor tells that the old worker is gone."""
    with gateway.connect() as client:
        client.send(post(chat(f"die {count}", stream=stream)))
        died = gateway.event("died")["t"]
        reply = client.reply()
        assert time.monotonic() - died < 1
        if stream and count:
            last = reply.body.decode().split("\n\n")[-2].split("\n")
            assert last[0] == "event: error" and b"[DONE]" not in reply.body
            assert json.loads(last[1][6:])["error"]["code"] == "worker_gone"
            assert client.closed()
        else:
            reply.error(503, "worker_gone")
            assert reply.headers["retry-after"]
    gateway.until(lambda: gateway.get("/readyz").status == 200)
    gateway.well()


@pytest.mark.parametrize("text,status,code", [("fail 0", 500, "worker_failed"),
                                              ("fail 2", 500, "worker_failed"),
                                              ("giveup 2", 503, "cancelled")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_the_worker_ends_badly(gateway, text, status, code, stream):
    reply = gateway.post(chat(text, stream=stream))
    if stream and not text.endswith("0"):
        assert reply.body.split(b"\n\n")[-2].startswith(b"event: error\n")
        assert code.encode() in reply.body and b"[DONE]" not in reply.body
    else:
        reply.error(status, code)
    gateway.well()


@pytest.mark.parametrize("how", ["early", "utf8", "cut", "length", "short", "long", "type", "generate",
                                 "unknown", "finish", "hello", "cursor", "count",
                                 "verdict A", "verdict "])
def test_a_worker_that_breaks_the_rules_is_not_listened_to(gateway, how):
    with contextlib.ExitStack() as stack:
        other = held(gateway, stack, "bob", f"hang beside {how}")  # no second death for one prompt
        reply = gateway.post(chat(f"hostile {how}", stream=how == "count"))
        if how == "count":
            assert b"event: error" in reply.body and b"[DONE]" not in reply.body
        else:
            reply.error(503, "worker_gone")
        other.reply().error(503, "worker_gone")
    gateway.event("broken")
    ready = gateway.get("/readyz")
    assert ready.status == 503 and ready.json["reasons"] == ["worker_protocol"]
    gateway.get("/v1/models", KEYS["alice"]).error(503, "worker_protocol")
    assert gateway.get("/livez").status == 200
    gateway.say("rings")
    gateway.until(lambda: gateway.get("/readyz").status == 200)
    gateway.well()


def test_a_generation_that_takes_too_long(own):
    gateway = own(request_timeout_ms=500)
    for text, stream in (("hang", False), ("silent", True), ("slow 1000", True)):
        with gateway.connect() as client:
            client.send(post(chat(text, stream=stream)))
            reply = client.reply()
            if text == "slow 1000":
                assert b"event: error" in reply.body and b"generation_timeout" in reply.body
            else:
                reply.error(504, "generation_timeout")
                assert reply.headers["x-should-retry"] == "false"
            assert client.closed()
        gateway.event("cancel", 2)
    gateway.well()


def test_loading_and_what_is_not_ready(gateway):
    gateway.say("progress")
    gateway.post(chat("echo a")).error(503, "loading")
    assert gateway.get("/readyz").json == {"ready": False, "reasons": ["loading"]}
    started = gateway.get("/startupz").json
    assert (started["phase"], started["percent"], started["elapsed_seconds"]) == ("weights", 25, 1.5)
    assert started["stages"] == {"head": {"seconds": 0.3, "share": 0.2},
                                 "reserve": {"seconds": 0.45, "share": 0.3},
                                 "weights": {"seconds": 0.75, "share": 0.5},
                                 "bind": {"seconds": 0, "share": 0}}
    assert gateway.get("/livez").status == 200
    gateway.say("state <No Code>")
    assert gateway.get("/readyz").json["reasons"] == ["not_ready"]
    gateway.say("state ready")
    gateway.well()


def test_draining(own):
    gateway = own()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(gateway.connect())
        client.send(post(chat("slow 20", stream=True)))
        assert client.head().status == 200
        late = held(gateway, stack, "bob")
        gateway.say("drain 1500")
        gateway.post(chat("echo a")).error(503, "draining")
        assert gateway.get("/readyz").json["reasons"] == ["draining"]
        rest = b"".join(iter(client.chunk, b""))
        assert b"[DONE]" in rest, "what runs is finished"
        late.reply().error(503, "draining")
    gateway.event("drained", 3)
