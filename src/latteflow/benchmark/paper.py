"""LaTtE-Flow against its peers at the paper's geometry: denoising in turns, and a whole picture of each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from latteflow.benchmark import ours, peers, stand_ins
from latteflow.benchmark.case import Case, faster_setting
from latteflow.benchmark.limits import Limits, limits_rows, measure_limits
from latteflow.benchmark.measure import Timing, interleaved
from latteflow.benchmark.products import Products
from latteflow.benchmark.report import Page, Settings, large, seconds, spread, table
from latteflow.benchmark.whole import Whole, whole_in_process
from latteflow.errors import UserError
from latteflow.models.presets import preset

Watch = Callable[[str], object]
ROUNDS = 12
_BARE = ", bare matrix products"


def _ours(groups: int) -> Callable[..., Case]:
    def build(settings: Settings, *, whole: bool = False) -> Case:
        chosen = preset(settings.preset)
        if whole:
            return ours.WholePicture(chosen, groups, settings.device, settings.dtype, settings.steps).case()
        replica = ours.regrouped(ours.build_vanilla(chosen, settings.device, settings.dtype), groups)
        return ours.latteflow_case(replica, steps=settings.steps, resolution=chosen.picture_size)

    return build


def _stand_in(of: stand_ins.Geometry) -> Callable[..., Case]:
    def build(settings: Settings, *, whole: bool = False) -> Case:
        return stand_ins.stand_in_case(of, settings.device, settings.dtype, whole=whole)

    return build


BUILDERS: Mapping[str, Callable[..., Case]] = {
    "k4": _ours(4),
    "k1": _ours(1),
    "janus": lambda settings, whole=False: peers.janus_case(settings.device, settings.dtype),
    "dit": lambda settings, whole=False: peers.dit_case(settings.device, settings.dtype),
    "sana": lambda settings, whole=False: peers.sana_case(settings.device, settings.dtype),
    "show-o": _stand_in(stand_ins.SHOW_O),
    "bagel": _stand_in(stand_ins.BAGEL_7B),
}
"""Every model, by a short name; ``whole`` asks for every layer, the prompt's reader and the decoder."""
TOO_LARGE = ("bagel",)
"""Whose whole weights are not for a small machine: they are timed by a slice of their layers alone."""


@dataclass(frozen=True)
class Row:
    """A model and its measurements."""

    case: Case
    setting: Mapping[str, float]
    """Best seconds of a step, eager and compiled."""
    timing: Timing
    whole: Whole | str
    """Or why there is none."""

    @property
    def image(self) -> float:
        """Seconds of denoising a picture."""
        return self.timing.median * self.case.steps_timed


def check_preset(name: str) -> None:
    """Look whether a preset can be cut as this benchmark cuts it.

    Raises:
        UserError: the preset's layers do not divide into 4 groups.
    """
    if preset(name).num_layers % 4:
        raise UserError(f"paper cuts the layers into 4 groups, and those of {name} do not divide by 4")


def paper_page(settings: Settings, watch: Watch) -> Page:
    """Build every model, let their steps take turns, draw a whole picture of each.

    Args:
        settings: as elsewhere.
        watch: told what is being done.
    """
    limits = measure_limits(settings)
    cases = _build(settings, watch)
    bare = {name: Products(lambda name=name: cases[name].step(0)) for name in ("k4", "k1")}
    how = {}
    for name, case in cases.items():
        watch(f"{case.name}: eager or compiled")
        how[name] = faster_setting(case, settings.device, tries=settings.rounds(3))
    turns = {name: case.step for name, case in cases.items()} | {name + _BARE: bare[name] for name in bare}
    watch(f"{len(turns)} cases take turns")
    timings = interleaved(turns, rounds=settings.rounds(ROUNDS), device=settings.device, warm_up=1, least=2)
    for case in cases.values():  # the figures stay, the weights go
        case.step, case.prefill, case.decode, case.blocks = _gone, None, None, ()
    del turns, bare
    gc.collect()
    rows = {
        name: Row(case, how[name], timings[name], _whole(name, case, settings, not _eager(how[name]), watch))
        for name, case in cases.items()
    }
    overheads = {name: timings[name + _BARE] for name in rows if name + _BARE in timings}
    return Page(
        "paper",
        "LaTtE-Flow and its peers, random weights at real geometry",
        f"A step of every model {len(timings['k4'].seconds)} times, in turns with all others, in one process, batch "
        f"1, {settings.dtype_name}, {settings.preset} geometry for ours; then one whole picture of each in a process "
        "of its own, which gives its peak memory. Every model runs eagerly or with its layers compiled "
        "(`torch.compile`), whichever was faster here. Operations and bytes are by formula.",
        body(rows, overheads, limits, settings),
    )


def _build(settings: Settings, watch: Watch) -> dict[str, Case]:
    chosen = preset(settings.preset)
    vanilla = ours.build_vanilla(chosen, settings.device, settings.dtype)
    cases = {
        name: ours.latteflow_case(ours.regrouped(vanilla, groups), steps=settings.steps, resolution=chosen.picture_size)
        for name, groups in (("k4", 4), ("k1", 1))
    }
    for name in BUILDERS:
        if name not in cases:
            watch(f"{name}: weights")
            cases[name] = BUILDERS[name](settings)
            cases[name].decode = None  # the decoder has its turn in the whole picture
    return cases


def _eager(how: Mapping[str, float]) -> bool:
    return how.get("compiled", float("inf")) >= how["eager"]


def _gone(number: int) -> object:
    raise RuntimeError("this case has been measured and let go")


def _whole(name: str, case: Case, settings: Settings, compiled: bool, watch: Watch) -> Whole | str:
    if name in TOO_LARGE and settings.device.type == "cpu":
        return f"{large(case.weight_bytes)}B of weights: not run whole"
    if settings.quick and name not in ("k4", "k1"):
        return "not run whole with --quick"
    watch(f"{case.name}: a whole picture")
    try:
        return whole_in_process(name, settings, compiled=compiled)
    except UserError as error:
        return str(error)


def body(rows: Mapping[str, Row], bare: Mapping[str, Timing], limits: Limits, settings: Settings) -> str:
    """Return the page's tables.

    Args:
        rows: by short name, "k4" first.
        bare: timings of the bare matrix products of those that have one.
        limits: of the machine.
        settings: as elsewhere.
    """
    parts = [_ratios(rows, bare), _speeds(rows), _costs(rows, limits), limits_rows(limits), _wholes(rows), _notes(rows)]
    return "\n\n".join(parts)


def _ratios(rows: Mapping[str, Row], bare: Mapping[str, Timing]) -> str:
    first = rows["k4"]
    lines = [
        (f"denoising, {row.case.name} over K = 4", f"{row.image / first.image:.2f}x")
        for name, row in rows.items()
        if name != "k4"
    ]
    janus = rows.get("janus")
    if janus and isinstance(janus.whole, Whole):
        over = janus.whole.seconds
        lines.append(("whole picture of Janus-Pro-1B over denoising, K = 4", f"{over / first.image:.2f}x"))
        if isinstance(first.whole, Whole):
            lines.append(("whole picture of Janus-Pro-1B over that of K = 4", f"{over / first.whole.seconds:.2f}x"))
    lines += [
        (f"a step over its bare matrix products, {rows[name].case.name}", f"{rows[name].timing.median / t.median:.3f}x")
        for name, t in bare.items()
    ]
    return "## Ratios\n\n" + table(("what", "ratio"), lines)


def _speeds(rows: Mapping[str, Row]) -> str:
    lines = [
        (
            row.case.name,
            f"{row.case.resolution}x{row.case.resolution}",
            row.case.tokens,
            row.case.steps,
            row.case.passes,
            seconds(row.timing.median),
            spread(row.timing),
            f"1 / {1 / row.case.slice:g}" if row.case.slice != 1 else "all",
            seconds(row.image),
            seconds(row.image / row.case.tokens),
            " / ".join(f"{kind} {seconds(best)}" for kind, best in row.setting.items() if best < float("inf")),
        )
        for row in rows.values()
    ]
    header = ("model", "picture", "tokens", "steps", "passes a step", "s a step", "10% to 90% (times)", "layers timed")
    return "## Denoising\n\n" + table(
        (*header, "s a picture, scaled", "s a token of the picture", "best s a step: faster setting is used"), lines
    )


def _costs(rows: Mapping[str, Row], limits: Limits) -> str:
    lines = []
    for row in rows.values():
        case = row.case
        step = row.timing.median / case.slice
        lines.append(
            (
                case.name,
                large(case.parameters),
                large(case.active_parameters),
                large(case.step_flops),
                large(case.image_flops),
                large(case.weight_bytes) + "B",
                f"{large(case.step_flops / step)}FLOP/s ({case.step_flops / step / limits.matrix_rate:.0%})",
                f"{large(case.weight_bytes / step)}B/s ({case.weight_bytes / step / limits.read_bandwidth:.0%})",
            )
        )
    header = ("model", "parameters", "active a step", "FLOP a step", "FLOP a picture", "weights read a step")
    return "## Operations, bytes and the limits\n\n" + table(
        (*header, "reached (of matrix products)", "weights read at (of reads)"), lines
    )


def _wholes(rows: Mapping[str, Row]) -> str:
    lines = []
    for row in rows.values():
        whole = row.whole
        if isinstance(whole, str):
            lines.append((row.case.name, whole, *[""] * 4))
        else:
            parts = (whole.seconds, whole.prefill, whole.denoise, whole.decode)
            lines.append((row.case.name, *map(seconds, parts), large(whole.peak_bytes) + "B"))
    header = ("model", "s", "prompt", "all steps", "decoder", "peak memory")
    return "## One whole picture\n\n" + table(header, lines)


def _notes(rows: Mapping[str, Row]) -> str:
    notes = [f"- {row.case.name}: {row.case.what}." for row in rows.values()]
    common = (
        '- Schedulers\' own arithmetic is left out of all steps but ours (an Euler step). "s a picture, scaled" is the '
        "median step times steps, over the part of the layers that was timed. Pictures differ in size: Janus-Pro's "
        "have 2.25 times the pixels of 256x256.\n"
        "- Peak memory is the process's, libraries included, weights of the prompt's reader and the decoder too."
    )
    return "## What runs\n\n" + "\n".join(notes) + "\n" + common
