"""Names of models: embedded ones first, anything else is left to the loader."""

from latteflow.models import embedded


def test_a_folder_with_a_model_index_is_an_embedded_model(tmp_path, monkeypatch):
    for name in ("tiny-8", "unfinished"):
        (tmp_path / "weights" / name).mkdir(parents=True)
    (tmp_path / "weights" / "tiny-8" / "model_index.json").write_text("{}")
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    assert embedded.embedded_models() == {"tiny-8": tmp_path / "weights" / "tiny-8"}
    assert embedded.resolve_model("tiny-8") == str(tmp_path / "weights" / "tiny-8")
    assert embedded.resolve_model("unfinished") == "unfinished"
    assert embedded.resolve_model("someone/model") == "someone/model"
