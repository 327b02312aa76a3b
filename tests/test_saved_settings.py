"""Settings saved to continue from: finetune.json, evaluation.json, those of a recording; also of older versions."""

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from openvla.evaluation import recorder
from openvla.evaluation.begun import earlier_settings
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.record import record
from openvla.folders import FORMAT_VERSION, read_settings
from openvla.options.evaluation import DemoOptions, EvaluateOptions, RecordOptions
from openvla.options.fields import decisive
from openvla.options.training import FinetuneOptions, FinetuneVerb
from openvla.training import finetune
from openvla.training.begun import differences


ROOT = Path(__file__).resolve().parents[1]
OLDER = ROOT / "tests/fixtures/older_settings"  # as version 0.1.0 wrote them, before they had a format_version
DEMO = ROOT / "tests/fixtures/demos/lerobot_image"


def test_what_a_continued_run_may_change_is_said_by_its_fields():
    """As it was when lists beside the fields said it."""
    free = {"output", "steps", "keep", "logging", "log_every", "workers", "compile", "save_every"}
    product = {
        "batch_size",
        "gradient_accumulation",
        "recipe",
    }  # global_batch, and what the recipe decides, are compared
    names = {item.name for item in fields(FinetuneOptions)}
    assert names - decisive(FinetuneOptions).keys() == free | product
    assert {item.name for item in fields(RecordOptions)} - decisive(RecordOptions).keys() == {
        "output",
        "workers",
        "device",
    }
    neutral = {item.name for item in fields(EvaluateOptions)} - decisive(EvaluateOptions).keys()
    assert neutral == {"output", "workers", "videos", "device", "episodes", "latency"}


def test_the_verb_saves_the_options_of_its_run():
    verb = FinetuneVerb(dataset="d", output="o", logging="none", resume=True, steps=7, rank=3)
    assert type(verb.run) is FinetuneOptions and verb.run.steps == 7 and "resume" not in asdict(verb.run)
    shown = DemoOptions(tasks="reach-v3", policy="expert").without("output")
    assert EvaluateOptions(output=Path("o"), **shown).policy == "expert"


def test_a_run_of_an_older_version_is_continued(tmp_path):
    older = json.loads((OLDER / "finetune.json").read_text())
    assert "format_version" not in older and older["logging"] == "none"
    given = {name: older[name] for name in ("strategy", "rank", "batch_size", "save_every", "logging")}
    options = FinetuneOptions(dataset=str(DEMO), output=str(tmp_path / "run"), model=str(ROOT), steps=1, **given)
    finetune(options)
    assert read_settings(tmp_path / "run" / "finetune.json")[1] == FORMAT_VERSION
    (tmp_path / "run" / "finetune.json").write_text(json.dumps({**older, "dataset": str(DEMO)}))
    (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "finetune.json").unlink()  # older versions wrote none there
    with pytest.raises(ValueError, match="rank was 4, is 5"):
        finetune(replace(options, steps=2, rank=5), resume=True)
    with pytest.raises(ValueError, match="action_chunk was 1, is 2"):  # which older versions did not have
        finetune(replace(options, steps=2, action_chunk=2), resume=True)
    finetune(replace(options, steps=2), resume=True)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()


def test_what_chunks_held_at_the_end_where_an_older_run_did_not_say_it(small_policy, tmp_path):
    """It depended on the head then, and was saved as null."""
    made = {"model": str(small_policy), "strategy": "last_layer", "batch_size": 2, "save_every": 1, "logging": "none"}
    options = FinetuneOptions(
        dataset=str(DEMO), output=str(tmp_path / "run"), steps=1, action_chunk=2, eval_every=0, image_aug=False, **made
    )
    finetune(options)
    file = tmp_path / "run" / "finetune.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chunk_end": None}))
    (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "finetune.json").unlink()
    with pytest.raises(ValueError, match="chunk_end was 'still', is 'repeat'"):
        finetune(replace(options, steps=2), resume=True)
    finetune(replace(options, steps=2, chunk_end="still"), resume=True)


def test_options_that_older_runs_did_not_have_were_as_by_default():
    before = {"schedule": "constant", "rank": 4, "global_batch": 2}
    now = {**decisive(FinetuneOptions), "schedule": "constant", "rank": 4, "global_batch": 2, "steps": 3}
    assert differences(before, now) == []
    assert differences(before, {**now, "reader": {"a": 1}}) == ["reader was {}, is {'a': 1}"]
    assert differences({**before, "steps": 2}, {**now, "schedule": "linear"}) == [
        "schedule was 'constant', is 'linear'",
        "steps was 2, is 3",
    ]


def test_an_evaluation_of_an_older_version_is_continued(tmp_path):
    pytest.importorskip("metaworld", reason="Meta-World needs the [sim] extra")
    shutil.copy(OLDER / "evaluation.json", tmp_path)
    given = {"tasks": "reach-v3,drawer-open-v3", "episodes": 1, "policy": "expert", "control": "realtime", "hz": 5.0}
    given |= {"axis": "none,language", "render": False, "videos": 0, "workers": 1, "output": tmp_path}
    for changed in ({"hz": 6.0}, {"axis": "none"}, {"render": True, "size": 32}, {"latency": 0.1}):
        with pytest.raises(ValueError, match=f"{'env_options' if 'render' in changed else next(iter(changed))} was"):
            evaluate(**{**given, **changed}, progress=False)
    assert len(evaluate(EvaluateOptions.of(**given), progress=False)["rows"]) == 3
    settings, version = read_settings(tmp_path / "evaluation.json")
    assert version == FORMAT_VERSION and settings["axis"] == "none,language"
    assert settings["env_options"] == {"render": False} and settings["latency"] == 0.0  # kept
    earlier_settings(tmp_path, {**settings, "digests": {}}, "embedded policy")
    with pytest.raises(ValueError, match="hz: give the options as one object"):
        evaluate(EvaluateOptions.of(**given), hz=5.0)


@pytest.mark.parametrize(
    "version, saved, named", [(1, "int8", "bnb-int8"), (1, "int4", "bnb-nf4"), (2, "int8", "int8")]
)
def test_quantization_of_an_older_evaluation_was_that_of_bitsandbytes(version, saved, named, tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"format_version": version, "quantization": saved}))
    now = {"quantization": named, "digests": {}}
    known = EvaluateOptions(output=tmp_path).content() | now
    before = earlier_settings(tmp_path, {name: None for name in known} | now, "mine")
    assert before["quantization"] == named
    with pytest.raises(ValueError, match=f"quantization was '{named}', is 'int4'"):
        earlier_settings(tmp_path, {name: None for name in known} | now | {"quantization": "int4"}, "mine")


def test_a_recording_of_an_older_version_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "open_environment", lambda *a, **k: pytest.fail("recorded again"))
    (tmp_path / "out").mkdir()
    shutil.copy(OLDER / "recording.json", tmp_path / "out")
    options = RecordOptions(output=str(tmp_path / "out"), tasks="reach-v3", episodes=1, size=32)
    assert record(options) == json.loads((OLDER / "recording.json").read_text())
    with pytest.raises(ValueError, match="other options: env_options {}, not {'frequency': 10}"):
        record(replace(options, env_options={"frequency": 10}))


def test_settings_of_a_later_version_are_refused(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="evaluation.json' has format_version 99.* update it"):
        earlier_settings(tmp_path, {}, "mine")


def test_variations_of_an_older_evaluation_that_are_no_text(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"variations": 5}))
    with pytest.raises(ValueError, match="holds another evaluation: .*axis was '5'"):
        earlier_settings(tmp_path, {"digests": {}}, "embedded policy")
