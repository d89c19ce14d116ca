"""A request that kills workers kills two, whoever sends it and however often; the others are served."""
import collections
import secrets
import threading
import time

import pytest
from gateway_scene import KEYS, Gateway, chat, post

SOURCES = {f"source{i}": f"cm-{0x100 + i:016x}-{secrets.token_urlsafe(32)}" for i in range(10)}


@pytest.fixture
def gateway(build, tmp_path, monkeypatch):
    monkeypatch.setattr("gateway_scene.KEYS", KEYS | SOURCES)
    made = Gateway(build, tmp_path, requests_max=64, connections_max=64)
    yield made
    assert made.stop()["code"] == 0


def deaths(gateway: Gateway) -> int:
    """How often the worker has died since the last look."""
    count = 0
    while not gateway.events.empty():
        count += gateway.events.get()["event"] == "died"
    return count


def test_a_thousand_poisons_of_ten_sources(gateway):
    """Of ten keys, a hundred each, in their own pace, beside a client that only wants an echo."""
    told, echoes = collections.Counter(), []
    over = threading.Event()

    def poison(key):
        for _ in range(100):
            reply = gateway.post(chat("die 0"), key)
            told[reply.status, reply.json["error"]["code"]] += 1

    def honest():
        while not over.is_set():
            echoes.append(gateway.post(chat(f"echo number {len(echoes)}")).status)

    threads = [threading.Thread(target=poison, args=(key,)) for key in SOURCES.values()]
    witness = threading.Thread(target=honest)
    for thread in (witness, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    over.set()
    witness.join(10)
    assert sum(told.values()) == 1000
    assert deaths(gateway) <= 2, told
    assert told[422, "request_quarantined"] >= 900, told
    assert set(told) <= {(422, "request_quarantined"), (503, "worker_gone"), (429, "queue_full"),
                         (503, "loading")}, told
    # At each death at most the one echo that was under way is lost.
    assert echoes.count(200) > 20 and echoes.count(503) <= 2 and len(set(echoes)) <= 2, echoes
    assert gateway.figure("casemate_quarantined") == 1
    assert gateway.figure("casemate_quarantine_refusals_total") == told[422, "request_quarantined"]


def test_who_was_only_beside_it_is_served_again(gateway):
    """Bystanders of the first death are suspects. The poison's second death is its own."""
    threads = [threading.Thread(target=gateway.post, args=(chat(f"slow 40 b{i}"), key))
               for i, key in enumerate(list(SOURCES.values())[:5])]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    gateway.post(chat("die 1")).error(503, "worker_gone")
    for thread in threads:
        thread.join(10)
    assert gateway.figure("casemate_suspects") == 6
    again = [threading.Thread(target=gateway.post, args=(chat("slow 40 b0"),))]
    again[0].start()
    time.sleep(2.3)  # it has outlived its probation; its second death is not its fault …
    gateway.post(chat("die 1")).error(503, "worker_gone")
    again[0].join(10)
    # … and is not laid on it, since there was a suspect on probation beside it.
    gateway.post(chat("die 1")).error(422, "request_quarantined")
    assert gateway.figure("casemate_quarantined") == 1
    for i in range(5):
        assert gateway.post(chat(f"slow 40 b{i}", max_tokens=3)).status == 200
    assert gateway.figure("casemate_suspects") == 0


def test_a_suspect_waits_for_another_and_nobody_for_both(gateway):
    def hang(text):
        try:
            gateway.post(chat(text), list(SOURCES.values())[0])
        except OSError:
            pass
    first = [threading.Thread(target=hang, args=(text,)) for text in ("hang a", "hang b")]
    for thread in first:
        thread.start()
    gateway.event("generate"), gateway.event("generate")
    gateway.say("rings")
    for thread in first:
        thread.join(10)
    second = [threading.Thread(target=hang, args=(text,)) for text in ("hang a", "hang b")]
    began = time.monotonic()
    for thread in second:
        thread.start()
    gateway.event("generate")
    assert gateway.post(chat("echo me")).status == 200 and time.monotonic() - began < 1
    gateway.event("generate")  # the echo's
    gateway.event("generate", 4)
    assert 1.5 < time.monotonic() - began < 4
    gateway.say("rings")
    for thread in second:
        thread.join(10)
    assert gateway.figure("casemate_quarantined") == 1  # the one on probation


def test_what_the_client_cut_short_is_not_cleared(gateway):
    with gateway.connect() as client:
        client.send(post(chat("hang up", stream=True)))
        gateway.event("generate")
        gateway.say("rings")
        client.reply().error(503, "worker_gone")
    with gateway.connect() as client:
        client.send(post(chat("hang up", stream=True)))
        gateway.event("generate")
    gateway.event("cancel")
    assert gateway.figure("casemate_suspects") == 1
