"""Replies of the gateway: streams, whole ones, verdicts, errors, and what reaches the log."""
import json
import pathlib
import re
import sys

import openai
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    KEYS, Reply, chat, gateway, own, shared)


def events_of(reply: Reply) -> list:
    """The stream's events; each is one line of data, the last one [DONE]."""
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store" and reply.body.endswith(b"\n\n")
    events = reply.body.decode().split("\n\n")[:-1]
    assert all(re.fullmatch(r"data: [^\n]+", event) for event in events), events
    assert events[-1] == "data: [DONE]"
    return [json.loads(event[6:]) for event in events[:-1]]


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
         "prompt_tokens_details": {"cached_tokens": 3}}
COMMON = {"id", "object", "created", "model", "system_fingerprint", "choices"}


@pytest.mark.parametrize("options", [{}, {"stream_options": {}},
                                     {"stream_options": {"include_usage": False}},
                                     {"stream_options": {"include_usage": True}},
                                     {"stream_options": {"continuous_usage_stats": True}}],
                         ids=["none", "empty", "off", "usage", "running usage"])
def test_a_stream_of_chat(gateway, options):
    events = events_of(gateway.post(chat("echo one two three", stream=True, **options)))
    wanted = options.get("stream_options", {})
    usage, running = wanted.get("include_usage"), wanted.get("continuous_usage_stats")
    if usage:
        last = events.pop()
        assert last["choices"] == [] and last["usage"] == USAGE
    assert len({event["id"] for event in events}) == 1 and events[0]["id"].startswith("chatcmpl-")
    for event in events:
        assert set(event) == COMMON | ({"usage"} if usage or running else set())
        assert event["object"] == "chat.completion.chunk" and event["model"] == "test-model"
        assert not usage or event["usage"] is None
    choices = [event["choices"][0] for event in events]
    assert all(len(event["choices"]) == 1 and event["choices"][0]["index"] == 0 for event in events)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["delta"]["content"] for c in choices[1:-1]] == ["one", " two", " three"]
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert all(c["finish_reason"] is None for c in choices[:-1])
    if running:
        assert [e["usage"]["completion_tokens"] for e in events] == [1, 1, 2, 3, 3]


def test_a_stream_of_text(gateway):
    body = {"model": "test-model", "prompt": "echo one two three", "stream": True,
            "stream_options": {"include_usage": True}}
    events = events_of(gateway.post(body, path="/v1/completions"))
    assert events.pop()["usage"] == USAGE and events[0]["id"].startswith("cmpl-")
    assert {event["object"] for event in events} == {"text_completion"}
    assert [event["choices"][0]["text"] for event in events] == ["one", " two", " three", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 3 + ["stop"]


def test_whole_replies(gateway):
    reply = gateway.post(chat("echo one two three")).json
    assert set(reply) == COMMON | {"usage"} and reply["usage"] == USAGE
    assert reply["object"] == "chat.completion" and reply["system_fingerprint"] == "fp_" + "a" * 12
    assert reply["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "one two three", "refusal": None}}]
    reply = gateway.post({"model": "test-model", "prompt": "echo a"}, path="/v1/completions").json
    assert reply["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize("text,finish", [("echo a", "stop"), ("slow 9", "length"),
                                         ("filter", "content_filter")])
@pytest.mark.parametrize("stream", [False, True])
def test_finish_reasons(gateway, text, finish, stream):
    reply = gateway.post(chat(text, stream=stream, max_tokens=2))
    last = events_of(reply)[-1] if stream else reply.json
    assert last["choices"][0]["finish_reason"] == finish


def moderation_of(raw: dict):
    """As the openai package's types read it."""
    return openai.types.chat.chat_completion.Moderation.model_validate(raw, strict=True)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_the_guard_refuses(gateway, path, stream):
    text = "refuse filter zebra-canary"
    body = (chat(text, stream=stream) if path.endswith("chat/completions") else
            {"model": "test-model", "prompt": text, "stream": stream})
    before = gateway.figure("casemate_guard_verdicts_total")
    reply = gateway.post(body, path=path)
    assert reply.status == 400 and set(reply.json) == {"error", "moderation"}
    assert reply.headers["content-type"] == "application/json" and b"zebra" not in reply.body
    assert reply.json["error"] == {
        "code": "content_filter", "type": "invalid_request_error",
        "param": "prompt" if path == "/v1/completions" else "messages[0].content",
        "message": "The prompt was refused by the guard: test/one (rule a-refusal)."}
    told = moderation_of(reply.json["moderation"])
    assert told.input.results[0].flagged and not told.output.results[0].flagged
    assert told.input.results[0].categories == {"test/one": True}
    assert [v["action"] for v in told.input.results[0].verdicts] == ["report", "refuse"]
    assert gateway.figure("casemate_guard_verdicts_total") == before + 2
    assert gateway.figure('casemate_generations_total{end="content_filter"}') > 0
    gateway.well()


def test_verdicts_are_logged_without_text(own):
    gateway = own()
    assert gateway.post(chat("refuse filter zebra-canary")).status == 400
    lines = [json.loads(x) for x in (gateway.folder / "gateway.log").read_text().splitlines()]
    told = [x for x in lines if x["event"] == "verdict"]
    assert [(x["rule"], x["category"], x["action"], x["stage"], x["offset"], x["bytes"])
            for x in told] == [("a-report", "test/one", "report", "input", 7, 5),
                               ("a-refusal", "test/one", "refuse", "input", 7, 5)]
    assert "zebra" not in str(lines)


def test_the_client_is_told_of_a_refused_prompt(gateway):
    with gateway.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="test-model", stream=True, messages=[
            {"role": "system", "content": "x"}, {"role": "user", "content": "refuse filter"}])
    assert refused.value.code == "content_filter" and "test/one" in refused.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_verdicts_of_a_reply(gateway, stream):
    def ask(text, **fields):
        made = client.chat.completions.create(
            model="test-model", messages=[{"role": "user", "content": text}], stream=stream, **fields)
        return [c for c in made if c.choices and c.choices[0].finish_reason][-1] if stream else made

    asked = {"model": "casemate-guard", "policy": {"output": {"mode": "block"}}}
    with gateway.client() as client:
        ended = ask("filter")
        assert ended.choices[0].finish_reason == "content_filter"
        assert ended.moderation.output.results[0].flagged
        assert ended.moderation.output.results[0].category_scores == {"test/one": 1.0}
        assert not ended.moderation.input.results[0].flagged
        assert ask("echo a").moderation is None
        clean = ask("echo a", moderation=asked).moderation
        assert clean.output.type == "moderation_results" and not clean.output.results[0].flagged


AWKWARD = ['"\\/', "\b\f\n\r\t\x7f", "data: x", "\u2028\u2029", "äöü€😀", "\x1b[31m", "[DONE]"]


@pytest.mark.parametrize("stream", [False, True])
def test_texts_arrive_as_they_are(gateway, stream):
    text = "-".join(AWKWARD)
    with gateway.client() as client:
        made = client.chat.completions.create(
            model="test-model", messages=[{"role": "user", "content": f"echo {text}"}], stream=stream)
        told = ("".join(c.choices[0].delta.content or "" for c in made) if stream
                else made.choices[0].message.content)
    assert told == text


def test_what_the_worker_is_told(gateway):
    gateway.post({"model": "test-model", "prompt": "echo ä", "temperature": 0.5, "top_p": 0.25,
                  "seed": 5, "max_tokens": 3, "stop": ["x", "€"], "top_k": 4, "ignore_eos": True},
                 KEYS["bob"], path="/v1/completions")
    told = gateway.event("generate")
    assert told["exact"] and told["kind"] == 2 and told["parts"] == [[0, "echo ä".encode().hex()]]
    assert told["stops"] == ["78", "e282ac"] and told["tenant"] == "0200000000000000"
    assert (told["temperature"], told["top_p"], told["top_k"], told["seed"], told["max_tokens"],
            told["ignore_eos"]) == (0.5, 0.25, 4, 5, 3, 1)


@pytest.mark.parametrize("status,raised", [
    (400, openai.BadRequestError), (401, openai.AuthenticationError), (404, openai.NotFoundError),
    (413, openai.APIStatusError), (429, openai.RateLimitError), (500, openai.InternalServerError)])
def test_the_openai_client_understands_errors(gateway, status, raised):
    text, key, options = {
        400: ("echo a", "alice", {"temperature": 9}), 401: ("echo a", "late", {}),
        404: ("echo a", "alice", {"model": "other"}), 413: ("x" * 70000, "alice", {}),
        429: ("refuse queue", "alice", {}), 500: ("refuse failed", "alice", {})}[status]
    with gateway.client(KEYS[key]) as client, pytest.raises(raised) as refused:
        client.chat.completions.create(messages=[{"role": "user", "content": text}],
                                       **{"model": "test-model", **options})
    assert refused.value.status_code == status and refused.value.code and refused.value.type
    assert refused.value.request_id and (status != 400 or refused.value.param == "temperature")


def test_no_text_reaches_the_log(gateway):
    secret = "zebra-canary-4711"
    for stream in (False, True):
        gateway.post(chat(f"echo {secret}", stream=stream))
    gateway.post(chat("x", **{secret: 1}))
    gateway.post(b'{"' + secret.encode())
    gateway.get(f"/{secret}", KEYS["alice"])
    gateway.get(f"/v1/models/{secret}", KEYS["alice"])
    gateway.get("/livez", Authorization=secret, X=secret)
    log = (gateway.folder / "gateway.log").read_bytes()
    assert secret.encode() not in log and KEYS["alice"].encode() not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"request", "keys", "worker_hello"} <= {line["event"] for line in lines}
