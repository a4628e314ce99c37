"""The page of benchmarks/claims.py, from saved runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from claims_plots import write_plots
from claims_saved import LINES, Case, Measure, Run, load_case, readings
from pages import table, write_between

from latteflow.errors import UserError
from latteflow.evaluate.claims import at_place, smallest_detectable_effect, spread

README_LINES = (("a",), ("b",), ("c",), ("d",), ("e", "f", "g"))


def write_report(results: Path, readme: Path | None) -> None:
    """Write ``claims.md`` and its plots beside the folder of results, and the short table into a page if one is named.

    Raises:
        UserError: no run is saved, or arms of a seed did not see the same samples.
    """
    cases = [load_case(folder) for folder in sorted(results.glob("*")) if (folder / "case.json").is_file()]
    if not cases:
        raise UserError(f"no run in {results}: train some with `python benchmarks/claims.py run PLAN`")
    if readme is not None and "<!-- claims: begin -->" not in readme.read_text(encoding="utf-8"):
        raise UserError(
            f"{readme} has no line <!-- claims: begin -->: put one, and claims: end, where the table belongs"
        )
    short = in_short(cases)
    lines = ["# The paper's claims, tried at small scale", "", *preamble(cases), "", *short, ""]
    for case in cases:
        lines += [f"## {case.plan.title}", "", *section(case, results.parent), ""]
    (results.parent / "claims.md").write_text("\n".join(lines), encoding="utf-8")
    if readme is not None:
        write_between(readme, "claims", short)
    print("\n".join(short))


def preamble(cases: Sequence[Case]) -> list[str]:
    """Return the conditions that hold for all."""
    runs = [run for case in cases for by_seed in case.runs.values() for run in by_seed.values()]
    hours = sum(processor_seconds(run) for run in runs) / 3600
    made = [run["made_with"] for run in runs]
    known = {key: ", ".join(sorted({str(m[key]) for m in made})) for key in ("torch", "processor", "threads", "date")}
    commits = ", ".join(sorted({m["commit"][:10] + (" and changes" if m["changed_since"] else "") for m in made}))
    return [
        "`python benchmarks/claims.py report` writes this page from [saved runs](claims); [docs/claims.md]"
        "(../../docs/claims.md) says what is run, how, and what a verdict means. A verdict is of the held-out "
        "flow-matching loss at the end of a run: a paired, two-sided t test over seeds at 5%. It *replicates* if the "
        "whole 95% interval is in the claim's favour; it *does not replicate* if the whole interval lies below the "
        "smallest advantage that would matter; else there is *no verdict*. Nothing is corrected for the number of "
        "claims: one verdict in twenty would come by chance alone.",
        "",
        f"{len(runs)} runs, {hours:.1f} processor hours. {known['date']}, torch {known['torch']}, "
        f"{known['processor']}, {known['threads']} thread a run, commit {commits}.",
    ]


def in_short(cases: Sequence[Case]) -> list[str]:
    """Return the verdicts in five lines."""
    rows = []
    for letters in README_LINES:
        name = "; ".join(LINES[letter] for letter in letters)
        rows.append([f"({', '.join(letters)}) {name}", *("<br>".join(verdicts(case, letters)) for case in cases)])
    rows = [row for row in rows if any(row[1:])]
    return table(("claim", *(case.plan.title for case in cases)), rows)


def verdicts(case: Case, letters: Sequence[str]) -> list[str]:
    """Return a case's verdict on each claim of some questions."""
    measure, found = case.measures[0], []
    for claim in case.plan.claims:
        if claim.line not in letters:
            continue
        compared = case.compared(claim, measure)
        if compared is None:
            found.append(f"{claim.says}: not run")
            continue
        than = spread(list(case.values(claim.than, measure).values())).mean
        word = compared.verdict if claim.paper else ours(compared.verdict)
        found.append(f"{claim.says}: **{word}** ({-compared.mean / than:+.1%} loss)")
    return found


def ours(verdict: str) -> str:
    """Return the word for a verdict on what no one claims but ourselves."""
    return {"replicates": "yes", "does not replicate": "no"}.get(verdict, verdict)


def section(case: Case, folder: Path) -> list[str]:
    """Return a case's part of the page, and draw its plots."""
    plots = write_plots(case, folder)
    run = next(iter(case.runs[case.plan.base_arm].values()))
    settings, drawings = run["recipe"]["train"], case.plan.drawings
    lines = [
        f"{case.about['pictures']['train']:,} training and {case.about['pictures']['heldout']:,} held-out pictures; "
        f"{settings['steps']:,} steps of {settings['batch_size']} at {settings['learning_rate']:g}, constant; "
        f"{drawings.number} drawings, {drawings.steps} Euler steps, guidance {drawings.guidance_scale:g}.",
        "",
        *seed_variance(case),
        "",
        *claims_table(case),
        "",
        *leads(case),
        "",
        *where(case),
        "",
        *costs(case),
        "",
        *(f"![{file.stem.rpartition('-')[2]}]({file.name})" for file in plots),
    ]
    if case.diverged:
        lines += ["", "Diverged: " + "; ".join(case.diverged) + "."]
    return lines


def seed_variance(case: Case) -> list[str]:
    """Return what chance alone does, before any comparison."""
    rows = []
    for measure in case.measures:
        values = list(case.values(case.plan.base_arm, measure).values())
        if len(values) < 2:
            continue
        found, pairs = spread(values), len(case.plan.seeds)
        apart = smallest_detectable_effect(found.deviation * 2**0.5, pairs)
        rows.append(
            [measure.name, number(found.mean), number(found.deviation), f"{found.deviation / abs(found.mean):.2%}"]
            + [f"{number(apart)} ({apart / abs(found.mean):.1%})" if found.mean else number(apart)]
        )
    seeds = len(case.runs[case.plan.base_arm])
    known = "".join(f", {name} {number(value)}" for name, value in reference(case).items())
    return [
        f"### Seeds first: {case.plan.arms[case.plan.base_arm].label}, {seeds} seeds",
        "",
        *table(("figure", "mean", "deviation", "of the mean", f"told apart by {len(case.plan.seeds)} seeds"), rows),
        "",
        "The last column is the smallest difference of two arms that a two-sided t test at 5% finds in 80% of cases, "
        "if runs of a seed had nothing in common. They share data and noise, so the table below, from paired "
        f"differences, can tell less apart or more.{' Real pictures of the same prompts' if known else ''}{known}.",
    ]


def reference(case: Case) -> dict[str, float]:
    """Return what real pictures, and the same through the autoencoder, are measured as."""
    figure = case.plan.judge_figure
    names = {"frechet": "FD-EffLite0", figure: f"judge: {figure}"}
    found = {f"{text}": case.about["real"][key] for key, text in names.items()}
    found |= {f"{text} through the autoencoder": case.about["through_autoencoder"][key] for key, text in names.items()}
    if case.about["judge"] is not None:
        found["the classifier on all held-out pictures"] = case.about["judge"]["heldout_accuracy"]
    return found


def claims_table(case: Case) -> list[str]:
    """Return every comparison by every figure."""
    rows = []
    for claim in case.plan.claims:
        for place, measure in enumerate(case.measures):
            compared = case.compared(claim, measure)
            if compared is None:
                rows.append([f"({claim.line}) {claim.says}", measure.name, *["not run"] * 6])
                continue
            cells = [mean_and_deviation(case, arm, measure) for arm in (claim.better, claim.than)]
            word = compared.verdict if claim.paper else ours(compared.verdict)
            rows.append(
                [f"({claim.line}) {claim.says}" if place == 0 else "", measure.name, *cells]
                + [f"{number(compared.mean)} ({number(compared.low)} to {number(compared.high)})"]
                + [f"{compared.p_value:.3f}", number(compared.detectable), f"**{word}**" if place == 0 else word]
            )
    header = ("claim", "figure", "the one", "the other", "in its favour (95%)", "p", "detectable", "verdict")
    return ["### Claims", "", *table(header, rows)]


def mean_and_deviation(case: Case, arm: str, measure: Measure) -> str:
    """Return an arm's figure over its seeds."""
    found = spread(list(case.values(arm, measure).values()))
    return f"{number(found.mean)} ± {number(found.deviation)}"


def leads(case: Case) -> list[str]:
    """Return how often one arm leads on the way: at equal steps, and at equal operations."""
    rows = []
    for claim in case.plan.claims:
        one, other = (mean_curve(case, arm) for arm in (claim.better, claim.than))
        if not one or not other:
            continue
        cells = []
        for axis in ("step", "flops"):
            places, values = [row[axis] for row in other], [row["loss"] for row in other]
            pairs = [(row["loss"], at_place(places, values, row[axis])) for row in one]
            known = [mine < theirs for mine, theirs in pairs if theirs is not None]
            cells.append(f"{sum(known)} of {len(known)}")
        rows.append([f"({claim.line}) {claim.says}", *cells])
    return [
        "### On the way",
        "",
        "At how many readings the claim's arm has the lower loss, mean over seeds.",
        "",
        *table(("claim", "at equal steps", "at equal operations"), rows),
    ]


def mean_curve(case: Case, arm: str) -> list[dict[str, float]]:
    """Return the mean over seeds of an arm's readings."""
    return [
        {key: sum(row[key] for row in rows) / len(rows) for key in ("step", "flops", "loss")}
        for rows in readings(case, arm)
    ]


def where(case: Case) -> list[str]:
    """Return the loss by part of [0, 1], on training pictures, and what another prompt costs, for every arm."""
    rows = []
    for arm, by_seed in case.runs.items():
        ends = [run["curve"][-1] for run in by_seed.values()]
        others = [run["other_prompts"] for run in by_seed.values()]
        by_t = [sum(end.get(f"loss/t-{k}", float("nan")) for end in ends) / len(ends) for k in range(8)]
        words = [sum(o.get(f"loss/t-{k}", float("nan")) for o in others) / len(others) - by_t[k] for k in (0, 2, 4)]
        seen = sum(end["seen"] for end in ends) / len(ends)
        whole = sum(end["loss"] for end in ends) / len(ends)
        label = f"{case.plan.arms[arm].label} ({len(ends)})"
        rows.append([label, number(whole), *map(number, by_t), number(seen), " / ".join(f"{w:+.3f}" for w in words)])
    header = ("arm (seeds)", "all", *(f"{k}/8" for k in range(8)), "seen", "another prompt")
    return [
        "### Where",
        "",
        "Held-out loss at the end, in all and by eighths of t, from noise to data; `seen`: the loss on as many "
        "training pictures; what the neighbour's prompt in place of the own adds in the eighths from 0, 2/8 and 4/8.",
        "",
        *table(header, rows),
    ]


def costs(case: Case) -> list[str]:
    """Return what each arm took, and what each question's verdict did."""
    rows = []
    for arm, by_seed in case.runs.items():
        runs = list(by_seed.values())
        last = [run["curve"][-1] for run in runs]
        rows.append(
            [case.plan.arms[arm].label, str(len(runs)), f"{last[0]['step']:,.0f}", f"{last[0]['flops'] / 1e12:,.1f}"]
            + [f"{sum(row['processor_seconds'] for row in last) / len(last):,.0f}"]
            + [f"{sum(map(processor_seconds, runs)) / 3600:.2f}"]
        )
    hours = {}
    for line in dict.fromkeys(claim.line for claim in case.plan.claims):
        arms = {arm for claim in case.plan.claims if claim.line == line for arm in (claim.better, claim.than)}
        spent = sum(processor_seconds(run) for arm in arms for run in case.runs.get(arm, {}).values())
        hours[line] = spent / 3600
    header = ("arm", "runs", "steps", "TFLOP a run", "training, processor seconds a run", "processor hours in all")
    by_line = ", ".join(f"({line}) {value:.2f}" for line, value in hours.items())
    return [
        "### What it took",
        "",
        *table(header, rows),
        "",
        f"Processor hours behind the verdicts, base runs counted in each: {by_line}.",
    ]


def processor_seconds(run: Run) -> float:
    """Return what a run took in all, readings and drawings too."""
    return run["curve"][-1]["processor_seconds"] + run["processor_seconds_of_measuring"]


def number(value: float) -> str:
    """Return a figure with four digits that count, or five behind the point."""
    return f"{value:.4g}" if abs(value) >= 0.1 else f"{value:.5f}"
