"""The main job, from nothing: a cluster of a prefill worker, a decode worker, a KV pool, etcd and a router; two questions; and why the
second one was quick. Everything is stopped at the end.

    python examples/demo.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from baton.cli.chat import Conversation

SYSTEM = (
    "You are the friendly demo model of Baton. Baton serves large language models from a cluster of small services. A router takes "
    "each request and chooses the workers for it. A prefill worker computes the KV cache of the prompt, block by block, and saves the "
    "blocks to the KV pool. A decode worker loads the blocks and generates the tokens of the answer. The pool is run by Mooncake and "
    "keeps the blocks in the memory of the kvstore nodes, and etcd holds the membership. Answer in one or two short sentences, and be kind."
)


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="baton-demo-") as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-c", "from baton.cli import main; main()", "up", "--http-port", "0", "--grpc-port", "0"]
        console.rule("baton up: 1 prefill, 1 decode, 1 kvstore, etcd, router")
        cluster = subprocess.Popen([*command, "--ready-file", str(ready)], env={**os.environ})
        try:
            while not ready.exists():
                if cluster.poll() is not None:
                    raise SystemExit(cluster.returncode or 1)
                time.sleep(0.1)
            url = json.loads(ready.read_text())["http"]
            conversation = Conversation(url, SYSTEM, {"temperature": 0, "max_tokens": 80})
            answers = []
            for question in ("What is Baton?", "What does the router do?"):
                console.rule(f"baton chat: {question}")
                answers.append(conversation.ask(question))
            console.rule("baton status")
            subprocess.run([sys.executable, "-c", "from baton.cli import main; main()", "status", "--url", url], check=True)
            cold, warm = answers
            console.print(
                f"\nThe second prompt had {warm['prompt_tokens']} tokens; {warm['cached_tokens']} of them came from cache. "
                f"First token after {cold['ttft_s'] * 1e3:.0f} ms cold, {warm['ttft_s'] * 1e3:.0f} ms cached."
            )
            if not warm["cached_tokens"]:
                raise SystemExit("the second prompt should have come from cache")
        finally:
            cluster.terminate()
            cluster.wait(60)
    console.print("Everything is stopped. Run it yourself: .venv/bin/baton up, then .venv/bin/baton chat")


if __name__ == "__main__":
    main()
