"""Connections to the gateway: TLS, what is no HTTP, pipelining, ids."""
import json
import pathlib
import re
import ssl
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    CHUNKED, Client, GOOD, chat, gateway, head, post, shared)


def test_an_answer(gateway):
    gateway.well()
    assert gateway.client().chat.completions.create(
        model="test-model", messages=[{"role": "user", "content": "echo a b"}],
    ).choices[0].message.content == "a b"


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n"])
def test_plain_http_is_told_to_use_tls(gateway, first):
    with Client(gateway.plain()) as client:
        client.send(first)
        reply = client.reply()
        assert reply.status == 400 and b"https://" in reply.body
        assert reply.headers["connection"] == "close" and client.closed()
    gateway.well()


@pytest.mark.parametrize("first", [b"\0", b"hello\r\n", b"\x80\x2e\x01\x03\x01", b"\xff" * 99,
                                   b"\x16\x03\x01\xff\xff", b"\x16" * 40000])
def test_other_bytes_are_closed(gateway, first):
    with Client(gateway.plain(5)) as client:
        client.send(first)
        while client.more():
            assert not client.rest.startswith(b"HTTP")
    gateway.well()


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_below_1_3_is_refused(gateway, most):
    context = ssl.create_default_context(cafile=gateway.folder / "certificate.pem")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, most
    context.set_ciphers("ALL:@SECLEVEL=0")
    with gateway.plain() as sock, pytest.raises(ssl.SSLError) as refused:
        context.wrap_socket(sock, server_hostname="127.0.0.1")
    assert "PROTOCOL_VERSION" in str(refused.value)
    gateway.well()


@pytest.mark.parametrize("offered,chosen", [(None, None), (["http/1.1"], "http/1.1"),
                                            (["h2", "http/1.1"], "http/1.1"), (["h2"], ssl.SSLError)])
def test_alpn(gateway, offered, chosen):
    context = ssl.create_default_context(cafile=gateway.folder / "certificate.pem")
    if offered:
        context.set_alpn_protocols(offered)
    with gateway.plain() as sock:
        if chosen is ssl.SSLError:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(sock, server_hostname="127.0.0.1")
        else:
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
                assert tls.version() == "TLSv1.3" and tls.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("given,kept", [
    ("a", True), ("order-4711_x.y:z/w+v=", True), ("x" * 64, True), ("x" * 65, False), ("", False),
    ("a b", False), ('a"b', False), ("a\\b", False), ("a%0d%0ab", False), ("\xc3\xa4", False),
    ("a\tb", False)])
def test_the_id_of_a_request(gateway, given, kept):
    for reply in (gateway.get("/livez", X_Request_ID=given),
                  gateway.get("/nowhere", X_Request_ID=given),
                  gateway.post(chat("echo a"), X_Request_ID=given),
                  gateway.post(chat("echo a", stream=True), X_Request_ID=given),
                  gateway.post(b"{", X_Request_ID=given)):
        told = reply.headers["x-request-id"]
        assert told == given if kept else re.fullmatch("req-[0-9a-f]{24}", told)


def test_requests_one_behind_another(gateway):
    with gateway.connect() as client:
        client.send(b"".join([head("GET", "/livez"), post(chat("echo a")), head("GET", "/readyz"),
                              CHUNKED + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
                              post(chat("echo b", stream=True)), head("GET", "/nowhere"),
                              head("GET", "/livez", Connection="close"), head("GET", "/livez")]))
        assert [client.reply().status for _ in range(7)] == [200, 200, 200, 400, 200, 404, 200]
        assert client.closed()


def test_a_flood_behind_a_request_is_closed(gateway):
    with gateway.connect() as client:
        client.send(post(chat("hang")) + head("GET", "/livez") * 1000)
        assert client.closed()
    gateway.event("cancel")
    gateway.well()


def test_expectation(gateway):
    request = post(chat("echo a"), Expect="100-continue")
    size = len(json.dumps(chat("echo a")))
    with gateway.connect() as client:
        client.send(request[:-size])
        assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
        client.send(request[-size:])
        assert client.reply().status == 200
    with gateway.connect() as client:
        client.send(post(chat("echo a"), key=None, Expect="100-continue")[:-size])
        client.reply().error(401)


@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_pieces_of_any_size(gateway, pieces):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(GOOD[i:i + 9]), GOOD[i:i + 9])
                      for i in range(0, len(GOOD), 9)) + b"0\r\n\r\n"
    for request in (post(GOOD), CHUNKED + chunks):
        with gateway.connect() as client:
            for i in range(0, len(request), pieces):
                client.send(request[i:i + pieces])
            assert client.reply().json["choices"][0]["message"]["content"] == "x"
