"""The model class against VLMEvalKit itself: from its table, through its own loop over a data set."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from vlmeval.config import supported_VLM
from vlmeval.inference import infer_data
from vlmeval.vlm.base import BaseModel

from latteflow import LatteFlowPipeline
from latteflow.evaluate import vlmevalkit
from latteflow.evaluate.understanding import FrozenBackbone, user_turn

QUESTION = "Which style is this?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Drawings of the embedded model."""
    pipe = LatteFlowPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    captions = [f"red heart, {style} style" for style in ("noto", "twemoji", "fluent 3d")]
    drawn = pipe(captions, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
    folder = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(drawn):
        picture.save(folder / f"{number}.png")
    return [str(file) for file in sorted(folder.glob("*.png"))]


class Pictures:
    """What the toolkit's loop asks of a data set."""

    dataset_name = "EmojiStyles"

    def __init__(self, files: list[str]) -> None:
        self.data = pd.DataFrame({"index": range(len(files)), "image_path": files})

    def __len__(self) -> int:
        return len(self.data)

    def dump_image(self, line: Any) -> list[str]:
        """Return the files of a line's pictures."""
        return [line["image_path"]]

    def build_prompt(self, line: Any) -> list[dict[str, str]]:
        """Return a line as parts of a message."""
        return [{"type": "image", "value": line["image_path"]}, {"type": "text", "value": QUESTION}]


def test_it_is_a_model_of_the_toolkit() -> None:
    """And its table makes it."""
    vlmevalkit.register("emoji-64", device="cpu")
    made = supported_VLM["emoji-64"]()
    assert isinstance(made, BaseModel)
    assert not made.use_custom_prompt("MMBench_DEV_EN")


def test_the_toolkit_s_loop_gets_the_backbone_s_answers(files: list[str], tmp_path: Path) -> None:
    """Unified and alone, through ``infer_data``, which dumps what it was told."""
    bare = FrozenBackbone.of_model("emoji-64", alone=True, device="cpu")
    opened = [vlmevalkit._part({"type": "image", "value": file})["image"] for file in files]
    wanted = [bare.answer(user_turn([picture], QUESTION), max_new_tokens=512) for picture in opened]
    for name, settings in (("unified", {}), ("alone", {"alone": True})):
        vlmevalkit.register("emoji-64", name, device="cpu", **settings)
        out = tmp_path / f"{name}.pkl"
        infer_data(name, name, str(tmp_path), Pictures(files), str(out))
        assert list(pickle.loads(out.read_bytes()).values()) == wanted
    assert all(wanted)


def test_messages_may_be_written_in_every_way_the_toolkit_takes(files: list[str]) -> None:
    """A list of files and words is the same as parts."""
    made = vlmevalkit.LatteFlow(device="cpu")
    parts = [{"type": "image", "value": files[0]}, {"type": "text", "value": QUESTION}]
    assert made.generate([files[0], QUESTION]) == made.generate(parts)
    assert made.chat([{"role": "user", "content": [files[0], QUESTION]}]) == made.generate(parts)
