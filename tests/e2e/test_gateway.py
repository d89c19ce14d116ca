"""The gateway alone, between raw TLS clients and a scripted worker (harness/gateway_harness.c)."""
import contextlib
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
FRESH = {"header_timeout_ms": 1000, "body_timeout_ms": 700, "write_timeout_ms": 1500}


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
        """A command to the supervisor's double; what was told before it is done is dropped."""
        self.harness.stdin.write(command + "\n")
        self.harness.stdin.flush()
        self.event("did", command=command)

    def forget(self):
        """What was told so far, also what is still on its way here."""
        self.say("memory")

    def figure(self, name: str) -> float:
        """Of /metrics, over all labels; -1 while no connection is to be had."""
        try:
            lines = self.get("/metrics", KEYS["alice"]).body.decode().splitlines()
        except OSError:
            return -1
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))

    def memory(self) -> int:
        self.harness.stdin.write("memory\n")
        self.harness.stdin.flush()
        told = self.event("memory")["kib"]
        self.event("did", command="memory")
        return told

    def stop(self) -> dict:
        if self.harness.poll() is None:
            self.harness.stdin.write("stop\n")
            self.harness.stdin.flush()
        told = self.event("exit")
        self.harness.wait(10)
        return told

    def plain(self, seconds: float = 10) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

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
        """The other side closes now, not at a time limit, and sends nothing before."""
        began = time.monotonic()
        while self.more():
            assert self.rest == b"", self.rest
        return time.monotonic() - began < 0.8


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
def shared(build, tmp_path_factory):
    made = Gateway(build, tmp_path_factory.mktemp("gateway"), **FRESH)
    yield made
    assert made.stop() | {"t": 0} == {"t": 0, "event": "exit", "code": 0, "signal": 0}


@pytest.fixture
def gateway(shared):
    """One for most tests: so each also tests what those before it left behind."""
    shared.forget()
    return shared


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


# ---------------------------------------------------------------------- who may do what

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


# ---------------------------------------------------------------------- ids and connections

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


# ---------------------------------------------------------------------- slow and many clients

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


def test_at_the_limit_of_connections_idle_ones_give_way(own):
    gateway = own(connections_max=4, header_timeout_ms=5000)
    gateway.until(lambda: gateway.figure("casemate_connections") == 1)
    held = [gateway.plain() for _ in range(3)]
    with gateway.connect() as busy:
        busy.send(post(chat("hang")))
        gateway.event("generate")
        with gateway.plain() as one_more:
            assert one_more.recv(1) == b"", "over the limit, and nobody is idle"
        held.pop().close()
        held.pop().close()
        gateway.until(lambda: gateway.figure("casemate_connections") == 3)
        idle = []
        for _ in range(2):
            idle.append(gateway.connect())
            idle[-1].send(head("GET", "/livez"))
            assert idle[-1].reply().status == 200
        gateway.well()
        assert idle[0].closed(), "the one that was idle for longest gives way"
        idle[1].send(head("GET", "/livez"))
        assert idle[1].reply().status == 200
    for client in idle:
        client.sock.close()
    held[0].close()


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


# ---------------------------------------------------------------------- replies

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


# ---------------------------------------------------------------------- limits and the worker

def held(gateway: Gateway, stack: contextlib.ExitStack, key: str, text: str = "hang") -> Client:
    client = stack.enter_context(gateway.connect())
    client.send(post(chat(text), KEYS[key]))
    gateway.event("generate")
    return client


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


# ---------------------------------------------------------------------- the page

def test_the_committed_page_is_what_the_program_prints(build, repo):
    told = subprocess.run([build / "bin" / "casemate-gateway", "--print-api"], capture_output=True,
                          check=True).stdout
    assert (repo / "docs" / "api.md").read_bytes() == told, \
        "casemate-gateway --print-api > docs/api.md"
