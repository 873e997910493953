"""`make serve-demo`: the server with a small pool, and eight clients that share a system prompt."""

import json
import subprocess
import sys
import urllib.request
import webbrowser
from concurrent.futures import ThreadPoolExecutor

SYSTEM = "You are a kind guide in a museum of computing. You answer briefly, in plain words, and with one example."
QUESTIONS = ("page tables", "caches", "the first computers", "punched cards", "tape", "compilers", "disks", "networks")


def ask(url: str, subject: str) -> str:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Tell me of {subject}."}]
    body = json.dumps({"messages": messages, "max_tokens": 96, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return f"{subject}: {json.load(answer)['choices'][0]['message']['content']}"


def main() -> None:
    command = [sys.executable, "-m", "minipaged", "serve", "--num-blocks", "48", "--max-model-len", "256"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        line = server.stdout.readline()
        if not line:
            sys.exit(server.wait())
        print(line, end="", flush=True)
        url = "http://127.0.0.1:8000"
        webbrowser.open(url)
        try:
            with ThreadPoolExecutor(len(QUESTIONS)) as pool:
                for said in pool.map(lambda subject: ask(url, subject), QUESTIONS):
                    print(f"\n{said}")
            server.wait()
        except KeyboardInterrupt:  # the server got it too
            server.wait()


if __name__ == "__main__":
    main()
