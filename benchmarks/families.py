"""The table of backbone families in docs/backbones.md, from a run of their toys against transformers.

    python benchmarks/families.py

Builds a toy of every model type from transformers' own classes, runs tests/models/test_backbones*.py in this process,
counts each family's checks and writes the table between the two marker lines. It is the same at every run.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backbones.md"
SIZES = ((32, 32), (64, 32), (32, 64), (100, 30), (90, 90), (128, 127))

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from pages import table, write_between  # noqa: E402

import families  # noqa: E402
from latteflow.models.backbones import FAMILIES  # noqa: E402
from latteflow.models.backbones.family import Family  # noqa: E402
from latteflow.models.transformer import LatteFlowTransformer  # noqa: E402


class Tally:
    """Counts checks by the toy that they were run on."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Count a check once: when it was run, or when it could not be."""
        report = yield
        variant = getattr(item, "callspec", None) and item.callspec.params.get("variant")
        if variant and (report.when == "call" or report.failed):
            model_type = variant.partition("/")[0]
            self.ran[model_type] += 1
            self.passed[model_type] += report.passed
        return report


def main() -> None:
    """Run, count, write."""
    torch.set_num_threads(1)
    tally = Tally()
    tests = sorted(map(str, (ROOT / "tests" / "models").glob("test_backbones*.py")))
    settings = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*settings, f"--rootdir={ROOT}", *tests], plugins=[tally])
    header = ("Family", "Model types", "Example", "Text layers", "Positions", "Pictures", "Checks passed")
    lines = [
        *table(header, (_row(family, tally) for family in FAMILIES)),
        "",
        f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, CPU, float32; "
        f"{sum(tally.passed.values())} of {sum(tally.ran.values())} checks passed.",
    ]
    write_between(PAGE, "families", lines)
    print("\n".join(lines))
    sys.exit(status)


def _replica(variant: str) -> LatteFlowTransformer:
    backbone, _ = families.shared_family(variant)
    return LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


def _row(family: Family, tally: Tally) -> list[str]:
    variant = family.model_types[0]
    _, processor = families.shared_family(variant)
    passed, ran = (sum(counts[name] for name in family.model_types) for counts in (tally.passed, tally.ran))
    return [
        type(family).__name__,
        ", ".join(f"`{name}`" for name in family.model_types),
        f"`{family.example}`",
        _layers(family),
        _positions(_replica(variant).config),
        _pictures(family, processor),
        f"{passed} of {ran}",
    ]


def _layers(family: Family) -> str:
    """Say what replicas of the toys found in their backbones' layers."""
    cells = []
    for text_type in family.text_types:
        several = f"{family.model_types[0]}/{text_type}"
        config = _replica(several if several in families.VARIANTS else family.model_types[0]).config
        found = {
            "bias on queries, keys, values": config.attention_bias,
            "queries and keys normalised": config.qk_norm,
            "tanh-GELU": config.activation == "gelu_tanh",
            "output norms": len(family.parts) > 4,
            "some layers see a window": bool(config.local_layers),
        }
        words = ", ".join(name for name, there in found.items() if there)
        cells.append(f"`{text_type}`: {words or 'plain'}")
    return "; ".join(cells)


def _positions(config: Any) -> str:
    if config.mrope_section:
        return "time, height, width; " + ("in turns" if config.mrope_interleaved else "one after the other")
    return "one axis, two bases" if config.local_layers else "one axis"


def _pictures(family: Family, processor: Any) -> str:
    """Say what the toy's processor makes of pictures of several shapes."""
    tokens, tiles = set(), set()
    for size in SIZES:
        inputs, lengths = processor.prepare([processor.chat_prompt("", pictures=1)], [families.toy_picture(*size)])
        tokens |= set(lengths)
        pixels = inputs["pixel_values"]
        tiles.add(pixels.shape[:-3].numel() if pixels.ndim > 2 else 0)
    if tiles == {0}:
        return f"merged patches, as many as the size asks ({min(tokens)} to {max(tokens)} in the toy)"
    if tiles == {1}:
        return "one square, always as many tokens"
    alone = "" if family.pictures_are_independent else "; several in a conversation are not cut"
    return f"tiles and the whole (up to {max(tiles)} in the toy){alone}"


if __name__ == "__main__":
    main()
