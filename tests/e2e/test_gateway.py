"""The gateway alone, between raw TLS clients and a scripted worker (harness/gateway_harness.c)."""
import json
import pathlib
import queue
import re
import secrets
import socket
import ssl
import subprocess
import threading
import time

import openai
import pytest

KEYS = {name: f"cm-{i:016x}-{secrets.token_urlsafe(32)}"
        for i, name in enumerate(("alice", "bob", "late"), 1)}
FRESH = {"header_timeout_ms": 700, "body_timeout_ms": 700, "write_timeout_ms": 1500}


class Gateway:
    """One gateway and its harness. Events that the harness tells are kept in order."""

    def __init__(self, build: pathlib.Path, folder: pathlib.Path, **options):
        keys = [f"key={KEYS[n]}:{n}:{1 if n == 'late' else 0}" for n in KEYS]
        words = keys + [f"{name}={value}" for name, value in options.items()]
        self.folder = folder
        self.harness = subprocess.Popen(
            [build / "harness" / "gateway_harness", build / "bin" / "casemate-gateway", folder,
             *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.events: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = self.event("port")["port"]
        assert self.event("page")["wiped"], "the TLS key is still in its page"
        self.event("ready")
        self.context = ssl.create_default_context(cafile=folder / "certificate.pem")
        self.until(lambda: self.get("/readyz").status == 200)

    def _read(self):
        for line in self.harness.stdout:
            self.events.put(json.loads(line))

    def event(self, name: str, seconds: float = 10, **fields) -> dict:
        """The next event of this name; others before it are dropped."""
        end = time.monotonic() + seconds
        while True:
            try:
                event = self.events.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no event {name} within {seconds} s") from None
            if event["event"] == name and all(event[k] == v for k, v in fields.items()):
                return event

    def until(self, condition, seconds: float = 10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come about"
            time.sleep(0.02)

    def say(self, command: str):
        """A command to the supervisor's double, and until it is done."""
        while not self.events.empty():
            self.events.get()
        self.harness.stdin.write(command + "\n")
        self.harness.stdin.flush()
        self.event("did")

    def memory(self) -> int:
        self.harness.stdin.write("memory\n")
        self.harness.stdin.flush()
        return self.event("memory")["kib"]

    def stop(self) -> dict:
        if self.harness.poll() is None:
            self.harness.stdin.write("stop\n")
            self.harness.stdin.flush()
        told = self.event("exit")
        self.harness.wait(10)
        return told

    def plain(self, seconds: float = 10) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def connect(self, seconds: float = 10) -> "Client":
        return Client(self.context.wrap_socket(self.plain(seconds), server_hostname="127.0.0.1"))

    def get(self, path: str, key: str | None = None, **headers) -> "Reply":
        with self.connect() as client:
            client.send(head("GET", path, key, **headers))
            return client.reply()

    def post(self, body, key: str | None = KEYS["alice"], path="/v1/chat/completions",
             **headers) -> "Reply":
        with self.connect() as client:
            client.send(post(body, key, path, **headers))
            return client.reply()

    def client(self, key: str = KEYS["alice"], **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"https://127.0.0.1:{self.port}/v1", api_key=key,
                             http_client=openai.DefaultHttpxClient(verify=self.context),
                             **{"max_retries": 0, **options})

    def well(self):
        """It answers an honest client as before."""
        reply = self.post(chat("echo all is well"))
        assert reply.status == 200, reply
        assert reply.json["choices"][0]["message"]["content"] == "all is well"


class Reply:
    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes):
        self.status, self.list, self.body = status, headers, body
        self.headers = dict(headers)
        assert len(self.headers) == len(headers), "a field stands twice"

    @property
    def json(self):
        return json.loads(self.body)

    def error(self, status: int, code: str | None = None) -> dict:
        """This is a refusal as the OpenAI SDKs read it."""
        assert self.status == status, self
        assert set(self.json) == {"error"}
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"] and error["code"] == (code or error["code"])
        assert self.headers["content-type"] == "application/json"
        return error

    def __repr__(self):
        return f"{self.status} {self.headers} {self.body[:300]!r}"


class Client:
    """A connection that is written to and read from by the byte."""

    def __init__(self, sock):
        self.sock, self.rest = sock, b""

    def __enter__(self):
        return self

    def __exit__(self, *ignored):
        self.sock.close()

    def send(self, data: bytes):
        self.sock.sendall(data)

    def more(self) -> bool:
        """False: the other side has closed."""
        try:
            data = self.sock.recv(65536)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            return False
        self.rest += data
        return data != b""

    def until(self, end: bytes) -> bytes:
        while end not in self.rest:
            assert self.more(), f"closed after {self.rest[:200]!r}"
        taken, self.rest = self.rest.split(end, 1)
        return taken

    def exactly(self, size: int) -> bytes:
        while len(self.rest) < size:
            assert self.more(), "closed in the middle of a body"
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def chunk(self) -> bytes:
        data = self.exactly(int(self.until(b"\r\n"), 16))
        assert self.exactly(2) == b"\r\n"
        return data

    def head(self) -> Reply:
        lines = self.until(b"\r\n\r\n").decode().split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 \d{3} [A-Za-z ]+", lines[0]), lines[0]
        fields = [line.split(": ", 1) for line in lines[1:]]
        return Reply(int(lines[0][9:12]), [(n.lower(), v) for n, v in fields], b"")

    def reply(self) -> Reply:
        reply = self.head()
        if reply.headers.get("transfer-encoding") == "chunked":
            while data := self.chunk():
                reply.body += data
        else:
            reply.body = self.exactly(int(reply.headers["content-length"]))
        return reply

    def closed(self) -> bool:
        """The other side closes now, and sends nothing before."""
        while self.more():
            assert self.rest == b"", self.rest
        return True


def head(method: str, path: str, key: str | None = None, **headers) -> bytes:
    fields = {"Host": "127.0.0.1", **{n.replace("_", "-"): v for n, v in headers.items()}}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


def post(body, key: str | None = KEYS["alice"], path="/v1/chat/completions", **headers) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content_Type": "application/json", "Content_Length": len(data), **headers}
    return head("POST", path, key, **headers) + data


def chat(text: str, **fields) -> dict:
    return {"model": "test-model", "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture(scope="module")
def gateway(build, tmp_path_factory):
    made = Gateway(build, tmp_path_factory.mktemp("gateway"), **FRESH)
    yield made
    assert made.stop() | {"t": 0} == {"t": 0, "event": "exit", "code": 0, "signal": 0}


@pytest.fixture
def own(build, tmp_path):
    """A gateway for one test, with its own options."""
    made = []

    def make(**options) -> Gateway:
        made.append(Gateway(build, tmp_path, **options))
        return made[-1]
    yield make
    for one in made:
        assert one.stop()["code"] == 0


def test_an_answer(gateway):
    gateway.well()
    assert gateway.client().chat.completions.create(
        model="test-model", messages=[{"role": "user", "content": "echo a b"}],
    ).choices[0].message.content == "a b"


# ---------------------------------------------------------------------- before HTTP

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


# ---------------------------------------------------------------------- bad requests

GOOD = json.dumps(chat("echo x")).encode()
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


CHUNKED = head("POST", "/v1/chat/completions", KEYS["alice"], Content_Type="application/json",
               Transfer_Encoding="chunked")
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
