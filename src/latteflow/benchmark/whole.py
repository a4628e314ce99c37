"""One whole picture of one model in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latteflow.errors import UserError

if TYPE_CHECKING:
    from latteflow.benchmark.case import Case
    from latteflow.benchmark.report import Settings


@dataclass(frozen=True)
class Whole:
    """What one picture took."""

    build: float
    """Seconds, of drawing the weights; no part of a picture."""
    prefill: float
    denoise: float
    decode: float
    peak_bytes: int
    """Of the process, libraries included; of tensors on a GPU."""

    @property
    def seconds(self) -> float:
        """Prompt to pixels."""
        return self.prefill + self.denoise + self.decode


def whole_in_process(name: str, settings: Settings, *, compiled: bool) -> Whole:
    """Draw a whole picture in a new process.

    Args:
        name: a key of ``paper.BUILDERS``.
        settings: as elsewhere.
        compiled: whether its layers are compiled first.

    Raises:
        UserError: the process failed, as it does where memory does not suffice.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.json"
        given = {
            "name": name,
            "device": str(settings.device),
            "dtype": settings.dtype_name,
            "threads": settings.threads,
            "steps": settings.steps,
            "preset": settings.preset,
            "compiled": compiled,
            "file": str(file),
        }
        program = f"from latteflow.benchmark.whole import main; main({json.dumps(json.dumps(given))})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no memory?"])[-1][:200]
            raise UserError(f"a whole picture of {name} did not succeed (exit code {done.returncode}): {reason}")
        return Whole(**json.loads(file.read_text(encoding="utf-8")))


def main(arguments: str) -> None:
    """Draw in this process and write what it took; ``arguments`` is the JSON of ``whole_in_process``."""
    import torch

    from latteflow.benchmark.paper import BUILDERS
    from latteflow.benchmark.report import Settings

    given = json.loads(arguments)
    file, name, compiled = Path(given.pop("file")), given.pop("name"), given.pop("compiled")
    given |= {"device": torch.device(given["device"]), "dtype": getattr(torch, given["dtype"])}
    settings = Settings(**given)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    began = time.perf_counter()
    case = BUILDERS[name](settings, whole=True)
    taken = draw_whole(case, settings.device, compiled=compiled, build=time.perf_counter() - began)
    file.write_text(json.dumps(asdict(taken)), encoding="utf-8")


def draw_whole(case: Case, device: object, *, compiled: bool, build: float = 0.0) -> Whole:
    """Draw one picture after a warm-up of a prefill, two steps and a decoding.

    Args:
        case: built whole.
        device: where.
        compiled: whether its layers are compiled first.
        build: seconds that building took, to be handed on.
    """
    import torch

    from latteflow.benchmark.case import compile_blocks
    from latteflow.benchmark.measure import peak_bytes, timed

    where = torch.device(str(device))

    def prefill() -> None:
        if case.prefill is not None:
            case.prefill()

    def denoise() -> None:
        for number in range(round(case.steps_timed)):
            case.step(number)

    def decode() -> None:
        if case.decode is not None:
            case.decode()

    if compiled:
        compile_blocks(case, where)
    prefill()
    for number in range(2):
        case.step(number)
    decode()
    taken = [timed(part, where) for part in (prefill, denoise, decode)]
    return Whole(build, *taken, peak_bytes=peak_bytes(where))
