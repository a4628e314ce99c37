"""``latteflow encode``: from a recipe to latents, and every mistake in one line."""

import pytest
import yaml

from latteflow.data.latents import LatentShards
from picture_sets import BROKEN, encoded, picture, write_image_folder, write_parquet, write_webdataset
from toys import toy_recipe


@pytest.fixture
def file(tmp_path, toy_set, parts):
    """Write a recipe over a folder of seven pictures, one of them broken; returns the function that does."""
    pictures = write_image_folder(tmp_path / "pictures", {"cat": 3, "dog": 3})
    (pictures / "dog/broken.png").write_bytes(BROKEN["cut.png"])

    def write(**sections):
        recipe = toy_recipe("generator", tmp_path / "run", toy_set, parts=parts)
        recipe["data"] = {"kind": "image_folder", "path": str(pictures), "size": 32, "quarantine_limit": 0.2}
        recipe["encode"] = {"output": str(tmp_path / "latents"), "shard_size": 4, "batch_size": 2}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **sections}))
        return path

    return write


def test_encodes_and_says_where_and_how_many(latteflow, file, tmp_path):
    outcome = latteflow("encode", file())
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "latents"
    assert outcome.out.replace("\n", "") == f"latents: {folder}: 6 samples, 1 left out ({folder / 'quarantine.jsonl'})"
    assert "7/7" in outcome.err
    latents = LatentShards(folder)
    assert [latents.caption(i) for i in range(6)] == ["cat"] * 3 + ["dog"] * 3
    assert latents.manifest["source"] == f"image_folder {tmp_path / 'pictures'}"
    assert latents.contexts is None


def test_what_the_recipe_says_is_done(latteflow, file, tmp_path):
    settings = ("data.buckets=true", "encode.contexts=true", "encode.dtype=float16", "data.size=48")
    assert latteflow("encode", file(), *settings).code == 0
    latents = LatentShards(tmp_path / "latents")
    assert (latents.manifest["size"], latents.manifest["dtype"], len(latents.contexts)) == (48, "float16", 3)
    assert len(latents.sizes) > 1


@pytest.mark.parametrize("kind", ["captioned", "webdataset", "parquet", "captions_csv", "shapes"])
def test_every_kind_of_data(latteflow, file, tmp_path, toy_set, kind):
    if kind == "webdataset":
        path = write_webdataset(tmp_path / "set")
    elif kind == "parquet":
        data = BROKEN["cut.png"]
        path = write_parquet(tmp_path / "set/a.parquet", {"image": [{"bytes": data, "path": None}], "text": ["x"]})
    elif kind == "captions_csv":
        path = tmp_path / "pictures"
        (path / "captions.csv").write_text("file,caption\ncat/000.png,a cat\n")
    else:
        path = toy_set
    outcome = latteflow("encode", file(), f"data.kind={kind}", f"data.path={path}", "data.quarantine_limit=1")
    if kind == "parquet":  # its one picture is broken
        assert outcome.code == 2
        assert "latteflow: no sample could be encoded" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    assert len(LatentShards(tmp_path / "latents")) == {"captioned": 36, "webdataset": 6, "captions_csv": 1}.get(
        kind, 64
    )
    if kind == "webdataset":
        assert sorted(entry.name for entry in path.iterdir()) == ["train-00.tar", "train-01.tar"]


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers' own
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encode=null"], "no section encode"),
        (["data.size=null"], "data.size is missing"),
        (["data.size=33"], "size 33 is not a multiple of 8"),
        (["generator.patch_size=3"], "size 32 is not a multiple of 24"),
        (["data.path=nowhere"], "no folder nowhere"),
        (["data.kind=latents"], "data.kind=latents cannot be encoded"),
        (["data.kind=captions_csv", "data.class_names=x"], "takes no class_names"),
        (["generator.autoencoder=nowhere"], "autoencoder 'nowhere' cannot be loaded"),
        (["encode.workers=2"], "set encode.backend=ray"),
        (["encode.shard=2"], "unknown key 'encode.shard'"),
    ],
)
def test_a_mistake_is_one_line(latteflow, file, overrides, message):
    assert message in latteflow("encode", file(), *overrides).mistake


def test_a_stream(latteflow, file, tmp_path):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(6)]
    path = write_parquet(tmp_path / "set/a.parquet", {"jpg": images, "said": [f"picture {i}" for i in range(6)]})
    words = (f"data.path={path}", "data.picture_column=jpg", "data.caption_column=said", "data.streaming=true")
    outcome = latteflow("encode", file(), "data.kind=parquet", *words)
    assert outcome.code == 0, outcome.err
    latents = LatentShards(tmp_path / "latents")
    assert [latents.caption(i) for i in range(6)] == [f"picture {i}" for i in range(6)]
    assert "data.streaming is for data.kind=parquet" in latteflow("encode", file(), "data.streaming=true").mistake


def test_too_many_bad_pictures_end_it_in_words(latteflow, file):
    outcome = latteflow("encode", file(), "data.quarantine_limit=0.1")
    assert outcome.code == 2
    assert "\nlatteflow: 1 of 7 samples are bad, more than data.quarantine_limit=0.1 allows" in outcome.err
    assert "latents, and start again\n" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_recipe_of_another_stage(latteflow, tmp_path, toy_set):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe("autoencoder", tmp_path / "run", toy_set)))
    assert "the recipe has no section encode: add one to a generator's recipe" in latteflow("encode", path).mistake


def test_run_again_after_other_settings_it_says_what_differs(latteflow, file):
    assert latteflow("encode", file()).code == 0
    assert "dtype='bfloat16', and this run has 'float16'" in latteflow("encode", file(), "encode.dtype=float16").mistake
