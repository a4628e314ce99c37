"""``latteflow serve --ray`` as a process with a Ray of its own; tests of it share one where they can."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress

import httpx
import openai
import psutil

PATIENCE = 300  # on a busy machine, Ray's workers take a minute to start
KEY = "a-key-that-is-long-enough"


class Served:
    """The command, run with a Ray of its own."""

    def __init__(self, place, *words):
        # Its own Ray, wherever this test runs; in a folder of its own, under a short name for its sockets.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"LATTEFLOW_API_KEYS": KEY, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": place, "HOME": place}
        self.err = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `served`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latteflow", "serve", "--ray", "--port", "0", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=self.err,
            text=True,
            env=environment,
        )
        self.url = self.process.stdout.readline().strip()

    def said(self):
        self.err.seek(0)
        return self.err.read()

    def openai(self, **options):
        options = {"api_key": KEY, "max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self):
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, headers=headers)

    def processes(self, name=""):
        """The processes of its Ray, by id."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if name in words:
                found[process.pid] = words
        return found

    def replicas(self):
        return set(self.processes("ray::ServeReplica:latteflow"))

    def metrics(self):
        """What each replica counts, by when it began; Ray's proxy takes one of them at a time."""
        found = {}
        with self.http() as http:
            for _ in range(30):
                lines = [line.rpartition(" ") for line in http.get("/metrics").text.splitlines() if line[:1] != "#"]
                counted = {name: float(value) for name, _, value in lines}
                found[counted["latteflow_process_start_time_seconds"]] = counted
        return list(found.values())


@contextmanager
def served(folder, *words):
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        running = Served(place, "--model", folder, *words)
        try:
            assert running.url, running.said()
            yield running
        finally:
            left = (
                psutil.Process(running.process.pid).children(recursive=True) if running.process.poll() is None else []
            )
            for process in [running.process, *left]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            running.process.wait(PATIENCE)
            running.process.stdout.close()
            running.err.close()


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)
