"""Clients that go away at each byte of a request and of its reply, in each manner, alone and while the worker, the
keys and the state change beneath them. Nothing of it may end the gateway, or leave a request behind."""
import json
import pathlib
import random
import socket
import struct
import sys
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from gateway_scene import (  # noqa: E402, F401
    CHUNKED, GOOD, KEYS, Client, chat, gateway, head, own, post, shared)

STREAM = post(chat("echo a b c", stream=True))
REQUESTS = {
    "a probe": head("GET", "/readyz"),
    "a quote that nobody makes": head("GET", "/v1/attestation?nonce=" + "0" * 63),
    "a body": post(GOOD),
    "an announced body": post(GOOD, Expect="100-continue"),
    "a chunked body": CHUNKED + b"%x\r\n%s\r\n1\r\n \r\n0\r\n\r\n" % (len(GOOD), GOOD),
    "a stream": STREAM,
    "two at once": STREAM + post(GOOD),
    "a refused one": post(chat("refuse filter")),
    "one that fails": post(chat("fail 1", stream=True)),
    "one that hangs": post(chat("hang")),
}


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def goodbye(sock):
    """close_notify, and the end only after the other side's."""
    try:
        sock.settimeout(2)
        sock.unwrap()
    except OSError:
        pass
    sock.close()


def half(sock):
    """FIN, and then whatever comes."""
    try:
        sock.settimeout(2)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    except OSError:
        pass
    sock.close()


AWAY = {"reset": reset, "close": lambda sock: sock.close(), "half": half, "goodbye": goodbye}


def gone(gateway: "Gateway"):  # noqa: F821
    """No request is left, and an honest one is served."""
    gateway.until(lambda: gateway.figure("casemate_requests_in_flight") == 0)
    gateway.well()


@pytest.mark.parametrize("what", REQUESTS)
def test_away_at_each_byte_of_a_request(gateway, what):
    data = REQUESTS[what]
    for cut in range(len(data) + 1):
        client = gateway.connect()
        client.send(data[:cut])
        AWAY["reset" if cut % 7 else list(AWAY)[cut // 7 % 4]](client.sock)
    gone(gateway)


def test_away_at_each_byte_of_a_reply(gateway):
    with gateway.connect() as client:
        client.send(STREAM)
        client.reply()
        client.send(STREAM)
        whole = len(client.exactly(600))
    for cut in range(0, whole, 5):
        client = gateway.connect()
        client.send(STREAM)
        client.exactly(cut)
        AWAY["reset" if cut % 7 else list(AWAY)[cut // 7 % 4]](client.sock)
    gone(gateway)


def test_each_byte_in_a_record_of_its_own(gateway):
    """Three requests in a row, and what follows one is there before it is answered."""
    with gateway.connect() as client:
        for byte in STREAM + REQUESTS["a chunked body"] + post(GOOD):
            client.send(bytes([byte]))
        assert [client.reply().status for _ in range(3)] == [200, 200, 200]


def test_a_storm(own):
    """Four clients that go away anywhere, while everything beneath them changes. By a seed: what was met is met again."""
    gateway = own(requests_max=16, requests_per_key_max=16, header_timeout_ms=500, body_timeout_ms=300)
    over = time.monotonic() + 6

    def client(seed: int):
        draw = random.Random(seed)
        while time.monotonic() < over:
            try:
                one = gateway.connect(2)
                data = REQUESTS[draw.choice(list(REQUESTS))]
                at, end = 0, draw.choice([len(data), draw.randrange(len(data) + 1)])
                while at < end:
                    size = draw.choice([1, 16, 300, 5000])
                    one.send(data[at:min(at + size, end)])
                    at += size
                one.sock.settimeout(0.05)
                if draw.random() < 0.5:
                    one.sock.recv(draw.choice([1, 100, 5000]))
                AWAY[draw.choice(list(AWAY))](one.sock)
            except OSError:
                one.sock.close()
    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    draw = random.Random(9)
    while time.monotonic() < over:
        gateway.say(draw.choice(["rings", "keys bob", "keys alice bob late", "state loading", "state ready", "hello off",
                                 "hello on", "disorder"]))
        time.sleep(draw.choice([0, 0.003, 0.03]))
    for thread in threads:
        thread.join()
    for command in ("hello on", "state ready", "keys alice bob late", "rings"):
        gateway.say(command)
    gateway.until(lambda: gateway.get("/readyz").status == 200)
    gone(gateway)
