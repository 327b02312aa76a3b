"""Models by folder or Hub id: one line that says what is wrong with the name and what can be done."""

import huggingface_hub.errors as hub_errors
import pytest

from openvla import hub
from openvla.hub import file_digests, model_folder, published_name


class Response:
    """As much of an answer of the Hub as its errors look at."""

    headers: dict = {}
    request = None


def raising(kind):
    def download(*args, **kwargs):
        try:
            error = kind("the Hub's own words", response=Response())
        except TypeError:
            error = kind("the Hub's own words")
        raise error

    return download


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "my_robot").mkdir()
    with pytest.raises(FileNotFoundError, match="No folder at .* Did you mean 'my_robot'"):
        model_folder(tmp_path / "my_robt")


@pytest.mark.parametrize(
    "kind, remedy",
    [
        ("GatedRepoError", "accept the terms"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no branch, tag or commit 'v9'"),
        ("HFValidationError", "owner/name"),
        ("LocalEntryNotFoundError", "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses(kind, remedy, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", raising(getattr(hub_errors, kind)))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub repository") as refused:
        model_folder("me/my-robot", revision="v9")
    assert remedy in str(refused.value) and "\n" not in str(refused.value)


def test_without_a_network(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", raising(hub_errors.LocalEntryNotFoundError))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match="Check the network"):
        model_folder("me/my-robot")


def test_names_that_are_published_are_no_paths(tmp_path):
    (tmp_path / "my_robot").mkdir()
    assert published_name(tmp_path / "my_robot") == "my_robot"
    assert published_name(hub.PACKAGE) == "embedded policy"
    assert published_name("openvla/openvla-7b") == "openvla/openvla-7b"
    assert published_name("/gone/my_robot") == "my_robot"


def test_digests_tell_which_kind_of_file_changed(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "dataset_statistics.json"):
        (tmp_path / name).write_text(name)
    before = file_digests(tmp_path)
    assert sorted(before) == ["config", "processor", "statistics", "weights"]
    for name, kind in (("model.safetensors", "weights"), ("tokenizer.json", "processor")):
        (tmp_path / name).write_text("other content")
        after = file_digests(tmp_path)
        assert [key for key in after if after[key] != before[key]] == [kind]
        before = after
