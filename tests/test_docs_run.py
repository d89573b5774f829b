"""The commands and the Python of the pages, run as they stand there.

They run in a folder in which the files lie that the pages name, and on the pages' own ports: a test
whose port another program has is skipped. `make test-pages` runs them alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from .test_docs import PAGES, ROOT, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.pages]

# Of a command or of a block of Python, by why it is not run here.
NOT_RUN = {
    "installs, or changes the machine": ("^pip install", "^sudo ", "^make ", "^milvus-lite server"),
    "sets what the lines below it need": ("^export ",),
    "needs containers or a cluster": ("^docker ", "^kubectl "),
    "needs vLLM, see tests/vllm": ("--engine vllm", "^vllm serve", "import LLM", 'engine="vllm"'),
    "is no program of this project": ("^vllm bench serve", "^guidellm "),
    "needs a model hub": ("Qwen/Qwen2.5-VL-3B-Instruct",),
    "needs servers of those names": ("redis://cache:6379", "mooncake://master:50051"),
    "needs prompts that are not shipped": ("bench coverage --data FOLDER",),
    "measuring takes minutes": (
        "bench coverage --requests 400",
        "bench coverage --model tiny-vl",
        "bench audits --requests 120",
        "audit --requests assets/audit/forms.jsonl",
        "simulate --requests 1000000",
        "bench kernels",  # without a GPU
    ),
    "has a test of its own, test_readme_example.py": ("for a bicycle shop",),
}
# What is printed, beyond exit status 0.
PRINTS = {
    "kvshare keys add": r"^kvs-[\w-]{43}\n$",
    "kvshare models check": "reuse +similar and exact",
    "kvshare serve --help": "--api-keys",
    "kvshare route --help": "--replicas",
    "kvshare cache lookup": "capital of France|tokens",
    "kvshare audit": r"\d of 2 answers are the same, letter by letter",
    "curl -s http://127.0.0.1:8000/v1/chat": '"content":"[^"]*Paris',
    "curl -sN": "data: \\[DONE\\]",
}
_PROGRAMS = re.compile(
    r"(?:[A-Z_]+=\S+ )?(?:[\w./-]*/)?"
    r"(?:kvshare|curl|docker|export|guidellm|kubectl|make|milvus-lite|pip|sudo|vllm) "
)
_PORTS = {"serve": 8000, "route": 8080, "desk": 7860}
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_START_S = 600  # the first run on a machine converts the model


@dataclass(frozen=True)
class Command:
    """One command of a page, below others in its block."""

    page: str
    text: str
    above: tuple[Command, ...] = ()

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"

    @property
    def serves_at(self) -> int | None:
        """The port of a server; None: the command ends by itself."""
        match = re.match(r"kvshare (serve|route|desk)\b(?!.*--help)", self.text)
        named = re.search(r"--port (\d+)", self.text)
        return match and int(named[1] if named else _PORTS[match[1]])

    @property
    def paths(self) -> list[str]:
        """What a server that is ready answers."""
        if self.text.startswith("kvshare desk"):
            return ["/"]
        return ["/health", "/ui"] if "--ui" in self.text else ["/health"]

    @property
    def asks(self) -> list[int]:
        """The ports that it wants a server at."""
        found = [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", self.text)]
        return [8000] if self.text.startswith("kvshare cache") else found


def runs(text: str) -> bool:
    return not any(re.search(p, text, re.M) for patterns in NOT_RUN.values() for p in patterns)


def commands(page: Path) -> list[Command]:
    name = str(page.relative_to(ROOT))
    found = [Command(name, code.strip()) for code in blocks(page, "sh")]
    for block in blocks(page, ""):
        above: tuple[Command, ...] = ()
        for line in block.replace("\\\n", " ").splitlines():
            if _PROGRAMS.match(line):
                command = Command(name, re.sub(r"\s+# .*", "", line), above)
                above += (command,) * runs(command.text)
                found.append(command)
    return found


_PAGES = [page for page in PAGES if page.exists()]
ALL = {command.text: command for page in _PAGES for command in commands(page)}
RUN = [command for command in ALL.values() if runs(command.text)]
# Those first that ask others: these run then, and are not started again.
SERVERS = sorted((c for c in RUN if c.serves_at), key=lambda c: (not c.asks, len(c.text)))
PYTHON = {
    str(page.relative_to(ROOT)): code
    for page in _PAGES
    if (code := "\n".join(c for c in blocks(page, "python") if runs(c)))
}


class Place:
    """A folder in which commands run, and the servers that run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._printed: dict[Command, str] = {}
        self._servers: dict[int, tuple[Command, subprocess.Popen[bytes]]] = {}
        (folder / ".curlrc").write_text("fail-with-body\n")
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.endswith("API_KEY")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "XDG_STATE_HOME": str(folder / "state"),
            "CURL_HOME": str(folder),
            "COLUMNS": "200",
        }

    def run(self, command: Command) -> str:
        """Run a command that ends, once, behind those above it; what it printed."""
        if command not in self._printed:
            self._prepare(command)
            self._printed[command] = self.ended("bash", "-c", command.text)
        return self._printed[command]

    def ended(self, *words: str) -> str:
        done = subprocess.run(
            words, cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=_START_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, command: Command) -> str:
        """The URL of a server, started if it does not run."""
        port = command.serves_at
        assert port is not None
        url = f"http://127.0.0.1:{port}"
        if port in self._servers and self._servers[port][0].text == command.text:
            return url
        self.stop(port)
        self._prepare(command)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"another program listens on port {port}")
        log = self.folder / f"{port}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                ["bash", "-c", f"exec {command.text}"], cwd=self.folder, env=self._environment,
                stdout=file, stderr=file,
            )  # fmt: skip
        self._servers[port] = (command, popen)
        deadline = time.monotonic() + _START_S
        desk = command.text.startswith("kvshare desk")  # shows its page before it is ready
        while not (
            all(_answers(url + path) for path in command.paths)
            and (not desk or "is ready after" in log.read_text())
        ):
            assert popen.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return url

    def stop(self, port: int) -> int:
        """Exit status of the server there, behind SIGTERM; 0 if there is none."""
        if port not in self._servers:
            return 0
        _, popen = self._servers.pop(port)
        popen.send_signal(signal.SIGTERM)
        try:
            return popen.wait(90)
        except subprocess.TimeoutExpired:  # its port is wanted again, and others end behind it
            popen.kill()
            return popen.wait()

    def start_at(self, port: int) -> None:
        """The page's plainest server there."""
        self.start(min((s for s in SERVERS if s.serves_at == port), key=lambda s: len(s.text)))

    def _prepare(self, command: Command) -> None:
        for other in command.above:
            if not other.serves_at:
                self.run(other)
        for port in command.asks:
            self.start_at(port)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5, follow_redirects=True).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """With the files that the pages name, and what they put for names."""
    from kvshare_mm import KVShare
    from kvshare_mm.models.gguf import converted, embedded_gguf

    folder = tmp_path_factory.mktemp("pages")
    (folder / "assets").symlink_to(ROOT / "assets")
    (folder / "MODEL").symlink_to(converted(embedded_gguf("smollm2")))
    llama = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    for name in "llama-8b", "meta-llama/Llama-3.1-8B-Instruct":
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(llama))
    forms = (ROOT / "assets" / "audit" / "forms.jsonl").read_text("utf-8").splitlines()
    short = [{**json.loads(form), "max_tokens": 4} for form in forms[:2]]
    (folder / "log.jsonl").write_text("".join(json.dumps(form) + "\n" for form in short))
    questions = (ROOT / "assets" / "banking77-sample.jsonl").read_text("utf-8").splitlines(True)
    (folder / "prompts.jsonl").write_text("".join(questions[:80]), "utf-8")
    with KVShare(str(tiny_folder), embedder=None, store_dir=folder / "FOLDER") as llm:
        llm.chat(_QUESTION, max_tokens=4)
    made = Place(folder)
    yield made
    assert [made.stop(port) for port in (8080, 8002, 8001, 8000, 7860)] == [0] * 5


@pytest.mark.parametrize("command", [c for c in RUN if not c.serves_at], ids=str)
def test_a_command_does_what_it_says(command: Command, place: Place) -> None:
    printed = place.run(command)
    for start, pattern in PRINTS.items():
        if command.text.startswith(start):
            assert re.search(pattern, printed, re.M), printed


@pytest.mark.parametrize(
    "command", [c for c in RUN if c.text == "kvshare simulate" or "llama-8b" in c.text], ids=str
)
def test_the_table_below_it_is_what_it_prints(command: Command, place: Place) -> None:
    below = (ROOT / command.page).read_text("utf-8").split(command.text, 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", below, re.M)
    assert rows
    printed = [
        [cell.strip() for cell in line.split("│")] for line in place.run(command).split("\n")
    ]
    for row in rows[0].splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert any(set(cells) <= set(line) for line in printed), (cells, printed)


@pytest.mark.parametrize("page", PYTHON)
def test_python_of_a_page_runs(page: str, place: Place) -> None:
    for port in Command(page, PYTHON[page]).asks:
        place.start_at(port)
    (place.folder / "page.py").write_text(f"messages = {_QUESTION}\n{PYTHON[page]}")
    place.ended(sys.executable, "page.py")


@pytest.mark.parametrize("command", SERVERS, ids=str)
def test_a_server_answers_and_ends_in_order(command: Command, place: Place) -> None:
    url = place.start(command)
    if "desk" not in command.text:
        key = place.run(command.above[0]).strip() if "--api-keys" in command.text else "none"
        reply = httpx2.post(
            f"{url}/v1/chat/completions",
            json={"model": "smollm2", "messages": _QUESTION, "max_tokens": 8},
            headers={"Authorization": f"Bearer {key}"},
            timeout=_START_S,
        )
        assert reply.status_code == 200, reply.text
    port = command.serves_at
    assert port is not None
    assert place.stop(port) == 0


def test_what_is_not_run_is_on_the_pages() -> None:
    every = "\n".join([*ALL, *(code for page in _PAGES for code in blocks(page, "python"))])
    patterns = [p for patterns in NOT_RUN.values() for p in patterns]
    assert [p for p in patterns if not re.search(p, every, re.M)] == []
