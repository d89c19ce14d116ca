#!/usr/bin/env python3
"""First light: seal a real model to a node, serve it, and stream an answer through the unmodified openai
client. `./run demo` runs this; --keep leaves the service running."""
import argparse
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import node as nodes  # noqa: E402

QUESTION = "Explain in two sentences why the sky is blue."


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the service running")
    options = parser.parse_args()
    node = nodes.Node(options.build / "bin", ROOT / "node", ROOT / "owner")
    say("owner keys in owner/, node in node/, package sealed to the node's development TPM")
    node.make(options.model, "smollm2-135m-instruct")
    print(node.run("casemate-pack", "inspect", node.package).stdout)
    key = node.key("demo")
    started = time.monotonic()
    say("casemate serve: unseal, decrypt, serve")
    node.start()
    print(f"ready after {1000 * (time.monotonic() - started):.0f} ms on https://{node.address}")
    say(QUESTION)
    client, tokens, first, begun = node.client(key), 0, 0.0, time.monotonic()
    for chunk in client.chat.completions.create(
            model="smollm2-135m-instruct", stream=True, temperature=0, max_tokens=160,
            stream_options={"include_usage": True},
            messages=[{"role": "user", "content": QUESTION}]):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            print(chunk.choices[0].delta.content, end="", flush=True)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    print(f"\n\n{tokens} tokens, first after {1000 * (first - begun):.0f} ms, then "
          f"{(tokens - 1) / (time.monotonic() - first):.0f} tokens per second")
    print("The TPM here is a development TPM: it shows the plumbing and protects nothing.")
    if options.keep:
        say("left running; ask it with")
        print(f"curl --cacert node/run/tls-certificate.pem https://{node.address}/v1/chat/completions "
              f"\\\n  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n"
              "  -d '{\"model\": \"smollm2-135m-instruct\", \"messages\": [{\"role\": \"user\", "
              "\"content\": \"Hello\"}]}'")
        print(f"stop it with: kill {node.service.pid}")
        return 0
    say("stop")
    code = node.stop()
    subprocess.run([node.programs / "casemate", "keys", "revoke", key.split("-")[1], "--state",
                    node.state], check=True, capture_output=True)
    print(f"stopped cleanly, exit {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
