"""Heads and bodies that are wrong, each answered in its own way."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    CHUNKED, GOOD, KEYS, chat, gateway, head, post, shared)


BAD_HEADS = {
    "a head over the limit": (head("GET", "/livez", X_A="x" * 16384), 431),
    "a head over the limit that never ends": (b"GET /" + b"x" * 20000, 431),
    "too many fields": (head("GET", "/livez", **{f"X_{i}": "x" for i in range(64)}), 431),
    "a bare LF": (b"GET /livez HTTP/1.1\nHost: a\n\n", 400),
    "NUL": (b"GET /livez HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 400),
    "a folded field": (b"GET /livez HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
    "no Host": (b"GET /livez HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "an absolute target": (b"GET https://a/livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\nHost: a\r\n\r\n", 505),
    "HTTP/2 without ALPN": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "random bytes": (bytes(range(128, 256)) + b"\r\n\r\n", 400),
    "two lengths": (post(GOOD, Content_length=5), 400),
    "length and coding": (post(GOOD, Transfer_Encoding="chunked"), 400),
    "another coding": (head("POST", "/v1/completions", Transfer_Encoding="gzip"), 501),
    "another expectation": (post(GOOD, Expect="a miracle"), 417),
    "a compressed body": (post(GOOD, Content_Encoding="gzip"), 415),
    "a malformed length": (post(GOOD, Content_Length="1e3"), 400),
}


@pytest.mark.parametrize("what", BAD_HEADS)
def test_bad_heads(gateway, what):
    request, status = BAD_HEADS[what]
    with gateway.connect() as client:
        client.send(request)
        reply = client.reply()
        reply.error(status, "bad_request")
        assert reply.headers["connection"] == "close" and client.closed()
    gateway.well()


BAD_BODIES = {
    "no length": (head("POST", "/v1/completions", KEYS["alice"], Content_Type="application/json"),
                  411, "length_required"),
    "over the limit, as said": (post(b"", Content_Length=65537), 413, "request_too_large"),
    "far over the limit": (post(b"", Content_Length=10**17), 413, "request_too_large"),
    "over the limit, in chunks": (CHUNKED + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 17, 413,
                                  "request_too_large"),
    "a chunk over the limit": (CHUNKED + b"fffffff0\r\n", 413, "request_too_large"),
    "a body on a path without": (head("GET", "/livez", Content_Length=2) + b"{}", 413,
                                 "request_too_large"),
    "a chunk extension": (CHUNKED + b"2;a=b\r\n{}\r\n0\r\n\r\n", 400, "bad_request"),
    "a chunk size that is none": (CHUNKED + b"xyz\r\n", 400, "bad_request"),
    "a trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", 400, "bad_request"),
    "another media type": (post(GOOD, Content_Type="text/plain"), 415, "unsupported_media_type"),
    "a media type that begins well": (post(GOOD, Content_Type="application/jsonx"), 415,
                                      "unsupported_media_type"),
    "no media type": (head("POST", "/v1/completions", KEYS["alice"], Content_Length=2) + b"{}", 415,
                      "unsupported_media_type"),
    "nothing": (post(b""), 400, "invalid_json"),
    "no JSON": (post(b"{model}"), 400, "invalid_json"),
    "half of it": (post(GOOD[:-1]), 400, "invalid_json"),
    "more than it": (post(GOOD + b"{}"), 400, "invalid_json"),
    "a list": (post([]), 400, "invalid_json"),
    "no UTF-8": (post(b'{"model":"\xff"}'), 400, "invalid_json"),
    "NUL in a text": (post(chat("a\0b")), 400, "invalid_json"),
    "a key twice": (post(b'{"n":1,"n":1}'), 400, "invalid_json"),
    "too deep": (post(b"[" * 60000), 400, "invalid_json"),
    "a number too large": (post(b'{"seed":1e999}'), 400, "invalid_json"),
    "another model": (post(chat("x", model="gpt")), 404, "model_not_found"),
    "no model": (post({"messages": []}), 400, "invalid_value"),
    "nothing in it": (post({}), 400, "missing_required_parameter"),
    "an unknown field": (post(chat("x", surprise=1)), 400, "unknown_parameter"),
    "a field that is refused": (post(chat("x", tools=[])), 400, "unsupported_parameter"),
    "a wrong type": (post(chat("x", temperature="1")), 400, "invalid_type"),
    "out of range": (post(chat("x", temperature=3)), 400, "invalid_value"),
    "messages of a wrong type": (post(chat("x", messages="x")), 400, "invalid_type"),
    "a prompt that is too long": (post(chat("refuse context")), 400, "context_length_exceeded"),
    "a prompt without tokens": (post(chat("refuse empty")), 400, "empty_prompt"),
}


@pytest.mark.parametrize("what", BAD_BODIES)
def test_bad_bodies(gateway, what):
    request, status, code = BAD_BODIES[what]
    with gateway.connect() as client:
        client.send(request)
        reply = client.reply()
        reply.error(status, code)
        if reply.headers.get("connection") == "close":
            assert client.closed()
        else:  # the body was read whole: the next request follows it
            client.send(post(chat("echo next")))
            assert client.reply().json["choices"][0]["message"]["content"] == "next"
    gateway.well()


def test_memory_is_bounded_over_bad_connections(gateway):
    """Warm first: what an allocator keeps after a few is no leak."""
    bad = [b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", *(r for r, _ in BAD_HEADS.values()),
           *(r for r, *_ in BAD_BODIES.values())]

    def round_of(count: int):
        for i in range(count):
            if i % len(bad) < 2:
                with gateway.plain() as sock:
                    sock.sendall(bad[i % len(bad)])
                continue
            with gateway.connect() as client:
                client.send(bad[i % len(bad)])
                if i % 3:
                    client.reply()
    round_of(100)
    before = gateway.memory()
    round_of(500)
    gateway.well()
    grown = gateway.memory() - before
    assert grown < 16 * 1024, f"{grown} KiB more"
