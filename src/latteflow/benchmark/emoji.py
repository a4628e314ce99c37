"""The embedded model, warm: one expert a step against all layers, compiled, and against its own bare products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch

from latteflow import LatteFlowPipeline, LatteFlowTransformer
from latteflow.benchmark.measure import Timing, interleaved
from latteflow.benchmark.products import Products
from latteflow.benchmark.report import Page, Settings, seconds, spread, table
from latteflow.models.compilation import compile_groups, runs_compiled
from latteflow.models.embedded import resolve_model

MODEL = "emoji-64"
PROMPT = "a slice of pizza, noto style"
GUIDANCE = 4.0
ROUNDS = 30
BATCHES = (1, 16)
VANILLA = "K = 1 (Vanilla)"
BARE = "bare matrix products of one picture"


def vanilla_of(experts: LatteFlowTransformer) -> LatteFlowTransformer:
    """Return the same layers' weights in one group: it costs what Vanilla costs, it does not draw what that would."""
    settings = {**experts.config, "num_groups": 1, "intervals": None, "shared_io": True}
    vanilla: Any = LatteFlowTransformer.from_config(settings)
    vanilla.load_state_dict(
        experts.state_dict(), strict=False
    )  # gates of first layers, which experts have not, are new
    return vanilla.to(experts.device, experts.dtype).requires_grad_(False).eval()


def drawing(pipe: Any, transformer: LatteFlowTransformer, *, steps: int, batch: int) -> Callable[[int], object]:
    """Return a function that draws ``batch`` pictures with a transformer, the seed its argument."""

    def draw(number: int) -> object:
        pipe.transformer = transformer
        return pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=batch,
            generator=torch.Generator().manual_seed(number),
        )

    return draw


def compiled_twin_of(experts: LatteFlowTransformer) -> LatteFlowTransformer:
    """Return a replica that holds the same weights, and runs compiled as ``pipe.compile()`` makes it."""
    twin = copy(experts)
    compile_groups(twin)
    return twin


def emoji_page(settings: Settings, watch: Callable[[str], object]) -> Page:
    """Time whole pictures of the embedded model, prompt to PIL image.

    Args:
        settings: as elsewhere; the dtype is the model's own, float32.
        watch: told what is being done.
    """
    pipe: Any = LatteFlowPipeline.from_pretrained(resolve_model(MODEL), dtype=torch.float32).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    experts = pipe.transformer
    own, twin = f"K = {experts.config.num_groups}", compiled_twin_of(experts)
    kinds = {own: experts, f"{own}, compiled": twin, VANILLA: vanilla_of(experts)}
    draw = {
        f"{kind}, batch {batch}": drawing(pipe, replica, steps=settings.steps, batch=batch)
        for batch in BATCHES
        for kind, replica in kinds.items()
    }
    single = draw[f"{own}, batch 1"]
    single(0)  # the empty prompt's context is kept from here on
    bare = Products(lambda: single(0))
    watch(f"{MODEL}: {len(draw) + 1} cases take turns")
    timings = interleaved({**draw, BARE: bare}, rounds=settings.rounds(ROUNDS), device=settings.device, warm_up=2)
    compiles = runs_compiled(twin)
    if not compiles:
        timings = {name: timing for name, timing in timings.items() if "compiled" not in name}
    made = (
        f"`{MODEL}` with its trained weights, float32, {settings.steps} steps, guidance {GUIDANCE:g}: the pipeline's "
        "call, prompt to PIL images, warm, in turns. Vanilla has the same layers' weights in one group. "
        + ("Compiled is after `pipe.compile()`. " if compiles else "There is no compiler on this machine. ")
        + f"The bare matrix products are the {len(bare):,} products and convolutions of one such call, with its own "
        "tensors, run again without anything between them."
    )
    return Page("emoji", f"The embedded model {MODEL}", made, body(timings, own), torch.float32)


def body(timings: Mapping[str, Timing], own: str) -> str:
    """Return the page's tables.

    Args:
        timings: by case, "KIND, batch NUMBER", and of the bare products.
        own: the kind that the model is.
    """
    rows = []
    for name, timing in timings.items():
        batch = int(name.rpartition(" ")[2]) if name != BARE else None
        a_picture = seconds(timing.median / batch) if batch else ""
        rows.append((name, seconds(timing.median), spread(timing), seconds(timing.least), a_picture))
    eager, bare, vanilla = (timings[name] for name in (f"{own}, batch 1", BARE, f"{VANILLA}, batch 1"))
    compiled = timings.get(f"{own}, compiled, batch 1")
    ratios = [("one picture over its own bare matrix products", _ratio(eager, bare))]
    if compiled is not None:
        ratios.append(("the same, compiled", _ratio(compiled, bare)))
    ratios.append(("Vanilla (K = 1) over one expert a step, one picture", _ratio(vanilla, eager)))
    header = ("case", "s a call", "10% to 90% (times)", "shortest", "s a picture")
    return (
        table(header, rows)
        + "\n\n"
        + table(("ratio", "of medians", "of the shortest"), [(name, *values) for name, values in ratios])
    )


def _ratio(one: Timing, other: Timing) -> tuple[str, str]:
    return f"{one.median / other.median:.2f}x", f"{one.least / other.least:.2f}x"
