"""The embedded model, warm: one expert a step against all layers, and against its own bare matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latteflow import LatteFlowPipeline, LatteFlowTransformer
from latteflow.benchmark.measure import interleaved
from latteflow.benchmark.products import Products
from latteflow.benchmark.report import Page, Settings, seconds, spread, table
from latteflow.models.embedded import resolve_model

MODEL = "emoji-64"
PROMPT = "a slice of pizza, noto style"
GUIDANCE = 4.0
ROUNDS = 20


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


def emoji_page(settings: Settings, watch: Callable[[str], object]) -> Page:
    """Time whole pictures of the embedded model, prompt to PIL image.

    Args:
        settings: as elsewhere; the dtype is the model's own, float32.
        watch: told what is being done.
    """
    pipe: Any = LatteFlowPipeline.from_pretrained(resolve_model(MODEL), dtype=torch.float32).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    experts = pipe.transformer
    vanilla = vanilla_of(experts)
    draw = {
        (groups.config.num_groups, batch): drawing(pipe, groups, steps=settings.steps, batch=batch)
        for batch in (1, 16)
        for groups in (experts, vanilla)
    }
    single = draw[experts.config.num_groups, 1]
    single(0)  # the empty prompt's context is kept from here on
    bare = Products(lambda: single(0))
    turns = {_name(*key): call for key, call in draw.items()} | {"bare": bare}
    watch(f"{MODEL}: {len(turns)} cases take turns")
    timings = interleaved(turns, rounds=settings.rounds(ROUNDS), device=settings.device, warm_up=2)
    rows = []
    for groups, batch in draw:
        timing = timings[_name(groups, batch)]
        a_picture = f"{seconds(timing.median / batch)}"
        rows.append((_name(groups, batch), seconds(timing.median), spread(timing), a_picture))
    rows.append(("bare matrix products of one picture", seconds(timings["bare"].median), spread(timings["bare"]), ""))
    first, all_layers = (timings[_name(groups, 1)].median for groups, _ in list(draw)[:2])
    ratios = [
        ("one picture over its own bare matrix products", f"{first / timings['bare'].median:.2f}x"),
        ("Vanilla (K = 1) over one expert a step, one picture", f"{all_layers / first:.2f}x"),
    ]
    header = ("case", "s a call", "10% to 90% (times)", "s a picture")
    made = (
        f"`{MODEL}` with its trained weights, float32, {settings.steps} steps, guidance {GUIDANCE:g}: the pipeline's "
        "call, prompt to PIL images, warm, in turns. Vanilla has the same layers' weights in one group. The bare "
        f"matrix products are the {len(bare):,} products and convolutions of one such call, with its own tensors, run "
        "again without anything between them."
    )
    body = table(header, rows) + "\n\n" + table(("ratio", ""), ratios)
    return Page("emoji", f"The embedded model {MODEL}", made, body)


def _name(groups: int, batch: int) -> str:
    return f"K = {groups}{' (Vanilla)' if groups == 1 else ''}, batch {batch}"
