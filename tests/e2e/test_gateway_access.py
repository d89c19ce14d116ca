"""Who may do what at the gateway: keys, paths, methods, probes; and the page that says so."""
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    GOOD, KEYS, Reply, chat, gateway, head, own, post, shared)


def without_its_own(reply: Reply) -> tuple:
    """All bytes of a reply that do not follow from the time or its id."""
    own = ("date", "x-request-id")
    return reply.status, [(n, v if n not in own else "") for n, v in reply.list], reply.body


WRONG_KEYS = {
    "none": {},
    "an empty one": {"Authorization": ""},
    "another scheme": {"Authorization": "Basic YTpi"},
    "no key's shape": {"Authorization": "Bearer sk-123"},
    "of nobody": {"Authorization": "Bearer cm-" + "f" * 16 + "-" + "A" * 43},
    "a wrong secret": {"Authorization": f"Bearer {KEYS['alice'][:-1]}" + "AB"[KEYS["alice"][-1] == "A"]},
    "expired": {"Authorization": f"Bearer {KEYS['late']}"},
    "too long": {"Authorization": f"Bearer {KEYS['alice']}A"},
    "beyond ASCII": {"Authorization": "Bearer \xc3\xa4"},
}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/test-model", "/v1/chat/completions",
                                  "/v1/completions", "/metrics"])
def test_refused_keys_are_not_told_apart(gateway, path):
    method, body = ("POST", GOOD) if "completions" in path else ("GET", b"")
    fields = {"Content_Type": "application/json", "Content_Length": len(body)} if body else {}
    replies = {}
    for what, credential in WRONG_KEYS.items():
        with gateway.connect() as client:
            client.send(head(method, path, **fields, **credential) + body)
            replies[what] = client.reply()
            if body:
                assert client.closed()
            else:  # one reply, and then that of the next request
                client.send(head("GET", "/livez"))
                assert client.reply().json["alive"]
    replies["none"].error(401, "invalid_api_key")
    assert replies["none"].headers["www-authenticate"] == "Bearer"
    assert {what for what, reply in replies.items()
            if without_its_own(reply) != without_its_own(replies["none"])} == set()
    ids = {reply.headers["x-request-id"] for reply in replies.values()}
    assert len(ids) == len(replies), "an id stands for two requests"


def test_a_revoked_key_looks_like_any_wrong_one(gateway):
    never = gateway.get("/v1/models", "cm-" + "0" * 16 + "-" + "A" * 43)
    assert gateway.get("/v1/models", KEYS["bob"]).status == 200
    gateway.say("keys alice late")
    revoked = gateway.get("/v1/models", KEYS["bob"])
    gateway.say("keys alice bob late")
    assert without_its_own(revoked) == without_its_own(never) and never.status == 401
    assert gateway.get("/v1/models", KEYS["bob"]).status == 200


def test_a_reply_ends_when_its_key_is_revoked(gateway):
    with gateway.connect() as client:
        client.send(post(chat("slow 1000", stream=True), KEYS["bob"]))
        reply = client.head()
        assert reply.status == 200 and client.chunk()
        gateway.say("keys alice late")
        rest = b"".join(iter(client.chunk, b""))
        gateway.event("cancel")
        gateway.say("keys alice bob late")
        assert b"event: error" in rest and b"invalid_api_key" in rest and b"[DONE]" not in rest
        assert client.closed()
    gateway.well()


def test_a_table_of_keys_that_is_not_sound_admits_nobody(gateway):
    gateway.say("disorder")
    gateway.get("/v1/models", KEYS["alice"]).error(503, "keys_missing")
    ready = gateway.get("/readyz")
    assert ready.status == 503 and ready.json["reasons"] == ["keys_missing"]
    gateway.say("keys alice bob late")
    gateway.well()


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models/", "/v1/models/a/b", "/v2/models",
                                  "/v1/embeddings", "/livez/", "/%6civez", "/v1/../livez"])
@pytest.mark.parametrize("key", [None, KEYS["alice"]], ids=["no key", "a key"])
def test_unknown_paths(gateway, path, key):
    gateway.get(path, key).error(404, "not_found")


@pytest.mark.parametrize("method,path,allow", [
    ("GET", "/v1/chat/completions", "POST"), ("GET", "/v1/completions", "POST"),
    ("POST", "/v1/models", "GET"), ("DELETE", "/v1/models/test-model", "GET"),
    ("PUT", "/livez", "GET"), ("OPTIONS", "/readyz", "GET"), ("TRACE", "/metrics", "GET")])
def test_other_methods(gateway, method, path, allow):
    with gateway.connect() as client:
        client.send(head(method, path) + head("GET", "/livez"))
        reply = client.reply()
        reply.error(405, "method_not_allowed")
        assert reply.headers["allow"] == allow and client.reply().status == 200


def test_a_reply_to_head_has_no_body(gateway):
    with gateway.connect() as client:
        client.send(head("HEAD", "/livez"))
        reply = client.head()
        assert reply.status == 405 and int(reply.headers["content-length"]) > 0
        client.send(head("GET", "/livez"))
        assert client.reply().json == {"alive": True, "reasons": []}


def test_probes_and_models(gateway):
    assert gateway.get("/livez").json == {"alive": True, "reasons": []}
    for path in ("/readyz", "/health"):
        assert gateway.get(path).json == {"ready": True, "reasons": []}
    assert gateway.get("/startupz").json["started"] and gateway.get("/version").json
    models = gateway.get("/v1/models", KEYS["alice"]).json
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == ["test-model"]
    one = gateway.get("/v1/models/test%2Dmodel", KEYS["alice"])
    assert one.json == models["data"][0]
    for path in ("other", "test%2fmodel", "%00", "%zz", "a" * 300):
        gateway.get(f"/v1/models/{path}", KEYS["alice"]).error(404, "model_not_found")


def test_metrics_are_open_only_where_configured(own):
    assert own(unauthenticated_metrics=1).get("/metrics").status == 200


def test_the_committed_page_is_what_the_program_prints(build, repo):
    told = subprocess.run([build / "bin" / "casemate-gateway", "--print-api"], capture_output=True,
                          check=True).stdout
    assert (repo / "docs" / "api.md").read_bytes() == told, \
        "casemate-gateway --print-api > docs/api.md"
