"""Clients that are slow, many, silent, or gone."""
import contextlib
import json
import pathlib
import resource
import select
import socket
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    CHUNKED, Client, GOOD, Reply, chat, gateway, head, held, own, post, shared)


def closed_within(client: Client, least: float, most: float):
    """Closed after the time limit and not before; returns what was said."""
    began = time.monotonic()
    while client.more():
        pass
    assert least <= time.monotonic() - began < most
    return client.rest


def trickle(client: Client, data: bytes, seconds: float = 0.05):
    """A byte now and then, until the other side has enough of it."""
    try:
        for i in range(len(data)):
            client.send(data[i:i + 1])
            client.sock.settimeout(seconds)
            try:
                if not client.more():
                    return
            except TimeoutError:
                pass
    except OSError:
        return


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_stops(gateway, sent):
    with Client(gateway.plain()) as client:
        client.send(sent)
        assert closed_within(client, 0.5, 2) == b""
    gateway.well()


def test_a_connection_without_a_request(gateway):
    with gateway.connect() as client:
        assert closed_within(client, 0.5, 2) == b""
    with gateway.connect() as client:
        client.send(head("GET", "/livez"))
        client.reply()
        assert closed_within(client, 0.5, 2) == b""


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_single_bytes_takes_the_memory_of_its_bytes(own, chunked):
    """One byte to a TLS record: what a record is read into must not be kept for it."""
    gateway = own(body_timeout_ms=20000)
    body = json.dumps(chat("echo " + "x" * 5000)).encode()
    parts = [body[i:i + 1] for i in range(len(body))]
    with gateway.connect() as client:
        if chunked:
            client.send(CHUNKED)
            parts = [b"1\r\n" + part + b"\r\n" for part in parts]
        else:
            client.send(post(body)[:-len(body)])
        before = gateway.memory()
        for part in parts[:-1]:
            client.send(part)
        assert gateway.memory() - before < 2048, "KiB"
        client.send(parts[-1] + (b"0\r\n\r\n" if chunked else b""))
        assert client.reply().json["choices"][0]["message"]["content"] == "x" * 5000


def test_without_memory_for_another_connection_it_is_refused_and_those_before_are_served(own):
    gateway = own(connections_max=2000, header_timeout_ms=20000)
    with gateway.connect() as client, contextlib.ExitStack() as stack:
        most = resource.prlimit(gateway.pid(), resource.RLIMIT_AS)
        size = int(pathlib.Path(f"/proc/{gateway.pid()}/statm").read_text().split()[0]) * 4096
        resource.prlimit(gateway.pid(), resource.RLIMIT_AS, (size, most[1]))
        many = [stack.enter_context(Client(gateway.plain(20))) for _ in range(900)]
        shut = select.select([one.sock for one in many], [], [], 2)[0]
        resource.prlimit(gateway.pid(), resource.RLIMIT_AS, most)
        assert 0 < len(shut) < 900
        client.send(head("GET", "/livez"))
        assert client.reply().status == 200
        assert gateway.figure("casemate_connections_refused_total") >= len(shut)
        gateway.well()


UNFINISHED = {"a head": head("GET", "/livez")[:-2], "a byte": b"G", "a body": post(GOOD)[:-1],
              "a chunk": CHUNKED + b"5\r\nab", "chunks": CHUNKED}


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_request_that_stops(gateway, what):
    with gateway.connect() as client:
        client.send(UNFINISHED[what])
        began = time.monotonic()
        reply = client.reply()
        reply.error(408, "request_timeout")
        assert reply.headers["x-request-id"] and 0.5 <= time.monotonic() - began < 2
        assert client.closed()
    gateway.well()


TRICKLES = {"a head": (b"", head("GET", "/livez", X="x" * 200)), "a body": (post(GOOD)[:-60], GOOD[-60:]),
            "chunks": (CHUNKED, b"1\r\n{\r\n" * 50)}


@pytest.mark.parametrize("what", TRICKLES)
def test_a_request_that_trickles(gateway, what):
    fast, slow = TRICKLES[what]
    began = time.monotonic()
    with gateway.connect() as client:
        client.send(fast)
        trickle(client, slow)
        assert time.monotonic() - began < 3
        assert client.rest.startswith(b"HTTP/1.1 408")
    gateway.well()


def test_a_client_that_does_not_read(gateway):
    """Its stream is ended, the worker is told, and the memory comes back."""
    with gateway.plain(20) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tls = gateway.context.wrap_socket(sock, server_hostname="127.0.0.1")
        tls.sendall(post(chat("flood 100000", stream=True)))
        began = time.monotonic()
        gateway.event("cancel", 10)
        assert time.monotonic() - began < 8
        gateway.well()
        tls.close()


def test_a_whole_reply_that_is_not_read(own):
    """More than the sockets hold, less than the limit of a stream: the time limit ends it."""
    gateway = own(header_timeout_ms=9000, write_timeout_ms=1000)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", gateway.port))
        tls = gateway.context.wrap_socket(sock, server_hostname="127.0.0.1")
        tls.sendall(post(chat("flood 4000", max_tokens=9000)))
        gateway.event("generate")
        gateway.until(lambda: gateway.figure("casemate_connections") == 2, 3)
        gateway.until(lambda: gateway.figure("casemate_connections") == 1, 4)
        tls.close()


def test_the_size_of_whole_replies(gateway):
    def flood(count: int, **fields) -> Reply:
        return gateway.post(chat(f"flood {count}", max_tokens=9000, **fields))
    assert flood(3500).json["choices"][0]["message"]["content"] == "x" * 3500000
    reply = flood(5000)
    reply.error(500, "reply_too_large")
    assert reply.headers["x-should-retry"] == "false"
    assert flood(700, stream=True).body.count(b"x" * 1000) == 700
    gateway.well()


def test_a_closed_half_ends_the_request(gateway):
    with gateway.connect() as client:
        client.send(post(chat("hang")))
        gateway.event("generate")
        client.sock.shutdown(socket.SHUT_WR)
        gateway.event("cancel", 3)
    gateway.well()


@pytest.mark.parametrize("text,stream", [("hang", False), ("silent", False), ("slow 1000", True)])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_cancels_its_request(gateway, text, stream, how):
    with gateway.connect() as client:
        client.send(post(chat(text, stream=stream)))
        made = gateway.event("generate")
        if stream:
            assert client.chunk if client.head().status == 200 else None
        if how == "reset":
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gateway.event("cancel", 3, id=made["id"])
    gateway.well()


def test_an_unfinished_body_never_reaches_the_worker(gateway):
    with gateway.connect() as client:
        client.send(post(chat("echo a"))[:-1])
        time.sleep(0.05)
    gateway.well()
    assert gateway.event("generate")["parts"] == [[2, b"echo all is well".hex()]]


def test_at_the_limit_of_connections_those_without_a_request_give_way(own):
    gateway = own(connections_max=4, header_timeout_ms=20000)
    gateway.until(lambda: gateway.figure("casemate_connections") == 1)
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(gateway.connect())
        busy.send(post(chat("hang")))
        gateway.event("generate")
        silent = stack.enter_context(gateway.plain())
        slow = stack.enter_context(gateway.connect())
        slow.send(head("GET", "/livez")[:-2])
        idle = stack.enter_context(gateway.connect())
        idle.send(head("GET", "/livez"))
        assert idle.reply().status == 200
        for gone in (silent.recv, lambda size: slow.sock.recv(size)):
            one = stack.enter_context(gateway.connect())
            one.send(head("GET", "/livez"))
            assert one.reply().status == 200
            assert gone(1) == b"", "who is without a request for longest gives way"
        idle.send(head("GET", "/livez"))
        assert idle.reply().status == 200
        gateway.well()


def test_over_the_limit_while_each_connection_has_a_request(own):
    gateway = own(connections_max=4)
    gateway.until(lambda: gateway.figure("casemate_connections") == 1)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            busy = stack.enter_context(gateway.connect())
            busy.send(post(chat("hang")))
            gateway.event("generate")
        with gateway.plain() as one_more:
            assert one_more.recv(1) == b""
    gateway.well()


def test_sockets_that_send_nothing_keep_nobody_out(own):
    gateway = own(connections_max=16, header_timeout_ms=20000)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            for _ in range(20):
                stack.enter_context(gateway.plain())
            with gateway.connect() as client:
                client.send(head("GET", "/livez"))
                assert client.reply().status == 200
