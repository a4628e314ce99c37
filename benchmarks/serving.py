"""The server under load, on loopback: what batching gains, what HTTP costs, what waiting is like, what breaks.

    python benchmarks/serving.py all
    python benchmarks/serving.py batching overhead load overload
    python benchmarks/serving.py soak --minutes 10

Each part starts a server of its own (`latteflow serve`, emoji-64) and writes its table into
benchmarks/results/serving.md. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import httpx
import torch
from open_loop import NO_ANSWER, Answer, keep_busy, offer, percentile
from pages import table, write_between
from served import Served, is_alive, served

from latteflow import LatteFlowPipeline, __version__
from latteflow.benchmark.report import processor_name

PAGE = Path("benchmarks/results/serving.md")
THINGS = ("heart", "umbrella", "apple", "automobile", "cat face", "evergreen tree", "star", "book")
STYLES = ("noto", "twemoji", "fluent 3d", "openmoji")
_TURN = 10
_SETTLING = 300.0
"""Seconds of load before memory is looked at: oneDNN compiles a kernel for every shape it meets, and keeps 1,024."""
SHARES = (0.25, 0.5, 0.75, 0.9)


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak")
    parser.add_argument("--seconds", type=float, default=30.0, help="of every offered load")
    parser.add_argument("--threads", type=int, help="of the server's forwards (its own choice)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=60, help="pictures of the overhead's median")
    options = parser.parse_args()
    for part in PARTS if "all" in options.parts else options.parts:
        lines = PARTS[part](options)
        write_between(PAGE, part, [_conditions(part, options), "", *lines])
        print("\n".join(lines), flush=True)


def batching(options: argparse.Namespace) -> list[str]:
    """Return pictures a second of one client after the other, and with as many at a time as the server takes."""
    rates = {}
    with _server(options, "--queue", "512") as server:
        for clients in (1, 2, 4, 8, 16, 32, 64):
            answers = asyncio.run(_busy(server, clients, 24 + 6 * clients))
            rates[clients] = len(answers) / max(answer.ended for answer in answers)
            _all_answered(answers, {200})
    rows = [(str(clients), f"{rate:.1f}", f"{rate / rates[1]:.2f}x") for clients, rate in rates.items()]
    return table(("clients at a time", "pictures a second", "over one client"), rows)


def overhead(options: argparse.Namespace) -> list[str]:
    """Return what a picture takes over HTTP and by the pipeline's call, in turns of ten."""
    pipe = LatteFlowPipeline.from_pretrained("emoji-64", dtype=getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    seconds: dict[str, list[float]] = {"pipeline": [], "HTTP": []}
    with _server(options) as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def here(i: int) -> None:
            pipe(_prompt(i), generator=torch.Generator().manual_seed(i))

        def there(i: int) -> None:
            client.post("/v1/images/generations", json=_body(i)).raise_for_status()

        # By turns of several: just after the other's turn, caches and idle threads are the other's.
        for turn in range(options.rounds // _TURN + 1):
            for name, draw in (("pipeline", here), ("HTTP", there)):
                for i in range(_TURN + 2):
                    begin = time.perf_counter()
                    draw(i + _TURN * turn)
                    if turn > 0 and i >= 2:
                        seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        (name, f"{medians[name]:.4f}", f"{percentile(values, 0.1):.4f} to {percentile(values, 0.9):.4f}")
        for name, values in seconds.items()
    ]
    difference = medians["HTTP"] / medians["pipeline"] - 1
    return [*table(("one client", "s a picture", "10% to 90%"), rows), "", f"Over the pipeline: {difference:+.1%}."]


def load(options: argparse.Namespace) -> list[str]:
    """Return latencies at shares of what the server can do."""
    rows = []
    with _server(options) as server:
        most = _capacity(server)
        for share in SHARES:
            answers = asyncio.run(_offered(server, share * most, options.seconds))
            drawn = [answer.latency for answer in answers if answer.status == 200]
            refused = sum(answer.status == 429 for answer in answers)
            _all_answered(answers, {200, 429})
            rows.append(
                (
                    f"{share:.0%} ({share * most:.1f} a second)",
                    str(len(answers)),
                    f"{len(drawn) / max(answer.ended for answer in answers):.1f}",
                    *(f"{percentile(drawn, part):.3f}" for part in (0.5, 0.95, 0.99)),
                    str(refused),
                )
            )
    header = ("offered", "requests", "pictures a second", "p50, s", "p95, s", "p99, s", "429")
    return [f"Capacity, 64 clients at a time: {most:.1f} pictures a second.", "", *table(header, rows)]


def overload(options: argparse.Namespace) -> list[str]:
    """Return what becomes of five times as much as the server can do, and of what comes after."""
    with _server(options) as server:
        most = _capacity(server)
        answers = asyncio.run(_offered(server, 5 * most, options.seconds))
        after = asyncio.run(_busy(server, 1, 20))
        _all_answered(answers, {200, 429})
        _all_answered(after, {200})
        ready = server.is_ready()
    counts = Counter(answer.status for answer in answers)
    drawn = [answer.latency for answer in answers if answer.status == 200]
    turned_away = [answer.latency for answer in answers if answer.status == 429]
    rows = [
        ("offered", f"{5 * most:.0f} a second for {options.seconds:.0f} s: {len(answers)} requests"),
        ("drawn (200)", f"{counts[200]}, {counts[200] / max(answer.ended for answer in answers):.1f} a second"),
        ("refused (429)", f"{counts[429]}, p99 {percentile(turned_away, 0.99):.3f} s"),
        ("lost, hung or answered otherwise", str(len(answers) - counts[200] - counts[429])),
        ("p50 / p99 of the drawn", f"{percentile(drawn, 0.5):.2f} / {percentile(drawn, 0.99):.2f} s"),
        ("20 requests afterwards, one by one", f"all 200, p99 {percentile([a.latency for a in after], 0.99):.3f} s"),
        ("/readyz afterwards", "200" if ready else "503"),
    ]
    return table(("five times the capacity", ""), rows)


def soak(options: argparse.Namespace) -> list[str]:
    """Return memory and descriptors over minutes of mixed requests, one in ten of which is given up half-way."""
    samples: list[tuple[float, int, int, int]] = []

    async def watch(server: Served) -> None:
        begin = time.perf_counter()
        while True:
            samples.append((time.perf_counter() - begin, server.resident(), server.descriptors(), server.threads()))
            await asyncio.sleep(5)

    async def run(server: Served, rate: float) -> list[Answer]:
        watching = asyncio.create_task(watch(server))
        try:
            return await _offered(server, rate, 60 * options.minutes, _mixed)
        finally:
            watching.cancel()

    with _server(options) as server:
        ready = server.resident()
        rate = 0.6 * _capacity(server)
        asyncio.run(_offered(server, rate, _SETTLING, _mixed))
        answers = asyncio.run(run(server, rate))
        time.sleep(2)
        metrics, idle = server.metrics(), server.descriptors()
    _all_answered(answers, {200, 429, GIVEN_UP})
    minutes = [at / 60 for at, *_ in samples]
    memory = [resident / 1e6 for _, resident, _, _ in samples]
    slope = statistics.linear_regression(minutes, memory).slope
    counts = Counter(answer.status for answer in answers)
    rows = [
        ("requests", f"{len(answers)} in {options.minutes:g} minutes, {rate:.1f} a second"),
        ("answered 200 / 429 / given up by the client", f"{counts[200]} / {counts[429]} / {counts[GIVEN_UP]}"),
        ("lost, hung or answered otherwise", str(len(answers) - counts[200] - counts[429] - counts[GIVEN_UP])),
        ("memory once ready, before any request", f"{ready / 1e6:.0f} MB"),
        (
            f"memory {_SETTLING / 60:g} minutes later: first / median / last",
            f"{memory[0]:.0f} / {statistics.median(memory):.0f} / {memory[-1]:.0f} MB",
        ),
        ("slope of memory", f"{slope:+.2f} MB a minute"),
        ("descriptors, most under load / idle afterwards", f"{max(fds for _, _, fds, _ in samples)} / {idle}"),
        ("threads, least / most", f"{min(t for *_, t in samples)} / {max(t for *_, t in samples)}"),
        ("under way afterwards", f"{metrics['latteflow_inflight'] + metrics['latteflow_chats']:.0f}"),
    ]
    return table(("soak", ""), rows)


def kills(options: argparse.Namespace) -> list[str]:
    """Return what follows when a stage of the group pipeline, or the server itself, gets a signal, idle and at work."""
    rows = []
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        for rate in (0.0, 4.0):
            with _server(options, "--placement", "pipeline") as server:
                rows.append(_killed_stage(server, number, rate))
    for number in (signal.SIGTERM, signal.SIGKILL):
        with _server(options, "--placement", "pipeline") as server:
            children = server.children()
            begin = time.perf_counter()
            code = server.stop(number)
            seconds = time.perf_counter() - begin
            time.sleep(5)
            left = sum(map(is_alive, children))
        rows.append((f"{number.name}, the server, idle", "", "", "", f"exit {code} after {seconds:.1f} s, {left} left"))
    header = ("signal, to whom, load", "/readyz 503 after", "200 again after", "answers: 200, else", "processes")
    return table(header, rows)


def _killed_stage(server: Served, number: signal.Signals, rate: float) -> tuple[str, ...]:
    """Send a signal to the second stage and return a row: how long until the server says so, and until it is well."""
    answers: list[Answer] = []
    before = server.children()
    asking = threading.Thread(target=lambda: answers.extend(asyncio.run(_offered(server, rate, 20))))
    if rate:
        asking.start()
        time.sleep(3)
    os.kill(before[1], number)
    noticed = server.wait_until(ready=False)
    well = noticed + server.wait_until(ready=True)
    if rate:
        asking.join()
    answers += asyncio.run(_busy(server, 1, 4))
    good = sum(answer.status == 200 for answer in answers)
    alive = sum(map(is_alive, before))
    return (
        f"{number.name}, a stage, {f'{rate:.0f} pictures a second' if rate else 'idle'}",
        f"{noticed:.2f} s",
        f"{well:.2f} s",
        f"{good}, {len(answers) - good}",
        f"{len(before)} stages, {alive} of them left, {len(server.children())} now",
    )


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "batching": batching,
    "overhead": overhead,
    "load": load,
    "overload": overload,
    "soak": soak,
    "kills": kills,
}
GIVEN_UP = -1
"""In place of a status: the client itself hung up."""


def _server(options: argparse.Namespace, *more: str):  # noqa: ANN202  (a context manager of ``served``)
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    return served(["--dtype", options.dtype, *threads, *more])


def _prompt(number: int) -> str:
    return f"{THINGS[number % len(THINGS)]}, {STYLES[number // len(THINGS) % len(STYLES)]} style"


def _body(number: int) -> dict[str, object]:
    return {"prompt": _prompt(number), "seed": number, "response_format": "b64_json"}


async def _draw(client: httpx.AsyncClient, number: int) -> int:
    try:
        answer = await client.post("/v1/images/generations", json=_body(number))
    except httpx.HTTPError:
        return NO_ANSWER
    if answer.status_code == 200 and len(json.loads(answer.content)["data"][0]["b64_json"]) < 500:
        return NO_ANSWER
    return answer.status_code


async def _mixed(client: httpx.AsyncClient, number: int) -> int:
    """Draw, mostly; ask in words, stream, and hang up half-way as well."""
    kind = random.Random(number).random()
    if kind < 0.1:
        try:
            await client.post("/v1/images/generations", json=_body(number), timeout=0.05)
        except httpx.TimeoutException:
            return GIVEN_UP
        return 200
    if kind < 0.2:
        messages = [{"role": "user", "content": f"an emoji of a {_prompt(number)}. What is this?"}]
        return await _posted(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 8})
    if kind < 0.4:
        return await _posted(client, "/v1/images/generations", {**_body(number), "stream": True, "partial_images": 2})
    return await _draw(client, number)


async def _posted(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> int:
    try:
        return (await client.post(path, json=body)).status_code
    except httpx.HTTPError:
        return NO_ANSWER


def _client(server: Served) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


async def _busy(server: Served, clients: int, number: int) -> list[Answer]:
    async with _client(server) as client:
        await keep_busy(lambda i: _draw(client, i), clients, 2 * clients)  # warm at this width
        return await keep_busy(lambda i: _draw(client, i), clients, number)


async def _offered(
    server: Served, rate: float, seconds: float, ask: Callable[[httpx.AsyncClient, int], object] = _draw
) -> list[Answer]:
    async with _client(server) as client:
        return await offer(lambda i: ask(client, i), rate, seconds)  # type: ignore[arg-type, return-value]


def _capacity(server: Served) -> float:
    answers = asyncio.run(_busy(server, 64, 300))
    return sum(answer.status == 200 for answer in answers) / max(answer.ended for answer in answers)


def _all_answered(answers: Sequence[Answer], allowed: set[int]) -> None:
    """Say so on the way where an answer is none that is allowed; the tables count them."""
    others = Counter(answer.status for answer in answers if answer.status not in allowed)
    if others:
        print(f"answers that should not be: {dict(others)}", flush=True)


def _conditions(part: str, options: argparse.Namespace) -> str:
    machine = f"{processor_name()}, {len(os.sched_getaffinity(0))} cores"
    asked = {"load": ["seconds"], "overload": ["seconds"], "soak": ["minutes"], "overhead": ["rounds"]}.get(part, [])
    words = [f" --{name} {getattr(options, name):g}" for name in [*asked, *(["threads"] if options.threads else [])]]
    return (
        f"`python benchmarks/serving.py {part} --dtype {options.dtype}{''.join(words)}`: {date.today()}, "
        f"latteflow {__version__}, torch {torch.__version__}, {platform.system()}, {machine}; emoji-64, "
        f"{options.dtype}, 40 Euler steps, guidance 4, the client on the same machine. Load average at the end: "
        f"{os.getloadavg()[0]:.1f}."
    )


if __name__ == "__main__":
    main()
