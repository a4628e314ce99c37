"""An evaluation that nobody ran: figures of two sets, and words that would break a page."""

from __future__ import annotations

from typing import Any

from latteflow.evaluate.record import Evaluation, Figure

NASTY = "<script src=http://evil.example/x.js></script> & \"q\" 'a' | `b`"
CONDITIONS = {
    "model": "toy",
    "device": "cpu",
    "dtype": "float32",
    "quantization": "none",
    "steps": 40,
    "guidance_scale": 4.0,
    "samples": 256,
    "seeds": [0, 1],
    "reference": "9 held-out pictures (abc)",
    "network": "Toy, 8 pixels",
    "judge": None,
}


def figure(name="answers: concept", of="guided", value: Any = 0.5, measure="embedded", unit: Any = "share", **changes):
    ends = {key: changes.pop(key) for key in ("lowest", "highest", "why") if key in changes}
    return Figure(
        measure=measure, of=of, name=name, value=value, unit=unit, conditions={**CONDITIONS, **changes}, **ends
    )


def evaluation(figures=None, **changes):
    found = figures or [
        figure(lowest=0.4, highest=0.6),
        figure(of="without guidance", value=0.25, guidance_scale=1.0),
        figure("FID", value=12.5, measure="fidelity", unit=""),
        figure("sFID", value=None, measure="fidelity", unit="", why="the reference holds no spatial features"),
        figure("active parameters", "the model", 1_840_000, "cost", "parameters"),
    ]
    values = {
        "model": "toy",
        "date": "2026-01-02T03:04:05Z",
        "seconds": {"embedded": 1.5, "fidelity": 2.0, "cost": 0.1},
        "environment": {"latteflow": "0.1.0", "torch": "2", "processor": "a CPU", "gpu": None, "commit": None},
        "config": {"model": "toy", "sampling": {"steps": 40}},
        "results": {"embedded": {"x": 1}},
    }
    return Evaluation(figures=tuple(found), **{**values, **changes})
