"""The gateway alone, between raw TLS clients and a scripted worker (harness/gateway/): what the tests of it,
`e2e/test_gateway_*.py`, share."""
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

from node import no_bug, wait

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
        wait(condition, seconds)

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

    def pid(self) -> int:
        """Of the gateway itself, the harness's one child."""
        me = self.harness.pid
        return int(pathlib.Path(f"/proc/{me}/task/{me}/children").read_text())

    def stop(self) -> dict:
        if self.harness.poll() is None:
            self.harness.stdin.write("stop\n")
            self.harness.stdin.flush()
        told = self.event("exit")
        self.harness.wait(10)
        no_bug((self.folder / "gateway.log").read_text(errors="replace"))
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


GOOD = json.dumps(chat("echo x")).encode()
CHUNKED = head("POST", "/v1/chat/completions", KEYS["alice"], Content_Type="application/json",
               Transfer_Encoding="chunked")


def held(gateway: Gateway, stack: contextlib.ExitStack, key: str, text: str = "hang") -> Client:
    client = stack.enter_context(gateway.connect())
    client.send(post(chat(text), KEYS[key]))
    gateway.event("generate")
    return client
