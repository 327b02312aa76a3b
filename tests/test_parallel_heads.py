"""Heads that predict in one pass: trained, saved, merged and predicted with, as OpenVLA-OFT has them.

Their numbers against the original's are in `test_oft_parity.py`.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.action_heads_openvla import HEADS, make_head
from openvla.parallel_openvla import bidirectional, time_embedding
from openvla.training import FinetuneOptions, finetune, merge_adapter


ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "fixtures" / "demos" / "lerobot_image"
GENERATOR = np.random.default_rng(0)
IMAGES = [GENERATOR.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2)]
WORDS = ["open the drawer", "put the big red cup on the shelf now"]
CHUNK = 3
BASE = ROOT  # until `small_base`
pytestmark = pytest.mark.usefixtures("small_base")


def options(output: Path, **changes) -> FinetuneOptions:
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    made = {"model": str(BASE), "dataset": str(DATA), "output": str(output), "action_chunk": CHUNK, "steps": 2}
    made |= {"batch_size": 2, "rank": 4, "shuffle_buffer": 16, "name": "mine", "logging": "none", "eval_every": 0}
    return FinetuneOptions(**{**made, "dtype": "float32", **changes})


def state_of(model) -> np.ndarray:
    return np.array(model.norm_stats["mine"]["proprio"]["mean"])


ADAPTER = {"strategy": "lora", "head": "l1_regression", "film": True, "proprio": True, "prefix_training": 2}
ADAPTER |= {"save_every": 1, "keep": 2}


@pytest.fixture(scope="module")
def adapter(small_base, tmp_path_factory) -> Path:
    """A LoRA run with everything that is new to the model: head, FiLM, state."""
    folder = tmp_path_factory.mktemp("parts") / "run"
    finetune(options(folder, **ADAPTER))
    return folder


@pytest.fixture(scope="module")
def models(small_base) -> dict[str, OpenVLAForActionPrediction]:
    """One of each head, weights of what is new at random."""
    found = {}
    for name in ("parallel_tokens", "l1_regression", "diffusion"):
        pytest.importorskip("diffusers" if name == "diffusion" else "torch", reason="needs the [oft] extra")
        torch.manual_seed(0)
        model = OpenVLAForActionPrediction.from_pretrained(BASE)
        model.add_parts(action_head=name, action_dim=None if name == "parallel_tokens" else 7, use_film=True)
        model.config.action_chunk = CHUNK
        found[name] = model.eval()
    return found


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_run_of_tokens_goes_on_with_a_head_and_a_state(strategy, adapter_of_tokens, tmp_path):
    """Tokens chosen all at once have no weights of their own to lose. The adapter of such a run names modules by their
    ends ("fc1"), which the new parts have too: its weights were said to be missing."""
    made = options(tmp_path, model=str(adapter_of_tokens), head="l1_regression", proprio=True, strategy=strategy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The merged model")
        finetune(made)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert (model.config.action_head, model.config.proprio_dim) == ("l1_regression", 8)
    assert model.predict_action(IMAGES[0], WORDS[0], state=state_of(model)).shape == (CHUNK, 7)


@pytest.fixture(scope="module")
def adapter_of_tokens(small_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    finetune(options(folder, head="parallel_tokens", steps=1))
    return folder


@pytest.mark.parametrize(("head", "strategy"), [("parallel_tokens", "last_layer"), ("diffusion", "sandwich")])
def test_it_is_trained_saved_and_predicted(head, strategy, tmp_path):
    pytest.importorskip("diffusers" if head == "diffusion" else "torch", reason="needs the [oft] extra")
    finetune(options(tmp_path, head=head, strategy=strategy, eval_every=1, held_out=0.2, prefix_training=1))
    config = OpenVLAConfig.from_pretrained(tmp_path)
    assert config.prefix_training == 1
    assert (config.action_head, config.action_chunk) == (head, CHUNK)
    assert config.action_dim == (7 if head == "diffusion" else None)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert model.predict_action(IMAGES[0], WORDS[0]).shape == (CHUNK, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.predict_action(IMAGES[0], WORDS[0], committed=np.zeros((1, 7))).shape == (CHUNK, 7)
    with pytest.warns(
        UserWarning, match=r"2 steps are committed, and this model learned to continue at most 1 \(config"
    ):
        model.predict_action(IMAGES[0], WORDS[0], committed=np.zeros((2, 7)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", ["parallel_tokens", "l1_regression", "diffusion"])
def test_a_batch_equals_its_samples(head, attention, models):
    model = models[head]
    model.set_attn_implementation({"text_config": attention})
    torch.manual_seed(3)
    single = [model.predict_action(image, words) for image, words in zip(IMAGES, WORDS)]
    torch.manual_seed(3)
    batch = model.predict_action(IMAGES, WORDS, return_dict=True)
    assert batch.actions.shape == (2, CHUNK, 7) and batch.actions.dtype == np.float64
    # 50 passes of a diffusion add up what one differs by
    np.testing.assert_allclose(batch.actions, np.stack(single), atol=1e-3 if head == "diffusion" else 3e-5)
    assert (batch.token_ids is not None) == (head == "parallel_tokens")
    assert not np.allclose(single[0], single[1])


def test_every_attention_sees_everything(models):
    """The first position changes when the last one does, whatever the implementation; padding changes nothing."""
    language_model = models["parallel_tokens"].language_model
    embeds = torch.randn(2, 12, language_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    changed = embeds.clone()
    changed[:, -1] += 1
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 10:] = 0
    found = {}
    # Not compiled: that would need a C++ compiler on the machine.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for implementation in ("eager", "sdpa", "flex_attention"):
            language_model.set_attn_implementation(implementation)
            hidden, other, masked = (
                bidirectional(language_model, *given) for given in ((embeds, None), (changed, None), (embeds, mask))
            )
            assert (hidden[:, 0] - other[:, 0]).abs().max() > 1e-3, implementation
            np.testing.assert_allclose(masked[0], hidden[0], atol=1e-4)
            kept = bidirectional(language_model, changed, mask)[1, :10]
            np.testing.assert_allclose(kept, masked[1, :10], atol=1e-4)
            found[implementation] = hidden
    language_model.set_attn_implementation("sdpa")
    for hidden in found.values():
        np.testing.assert_allclose(hidden, found["eager"], atol=1e-4)


def test_flash_attention_is_told_that_it_is_not_causal(models, monkeypatch):
    language_model, seen = models["parallel_tokens"].language_model, []

    def flash(module, query, key, value, attention_mask, is_causal=None, **kwargs):
        seen.append((attention_mask, is_causal))
        return sdpa_attention_forward(module, query, key, value, None, is_causal=is_causal, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    # Past the check that the package is there
    monkeypatch.setattr(language_model.config, "_attn_implementation_internal", "flash_attention_2")
    mask = torch.tensor([[1, 1, 1, 0]])
    bidirectional(language_model, torch.randn(1, 4, language_model.config.hidden_size), mask)
    assert seen and all(not causal and given.tolist() == mask.tolist() for given, causal in seen)


def test_an_adapter_brings_its_parts(adapter, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need the [train] extra")
    model = OpenVLAForActionPrediction.from_pretrained(adapter)
    state = state_of(model)
    expected = model.predict_action(IMAGES[0], WORDS[0], state=state)
    assert expected.shape == (CHUNK, 7)
    # On a base that is there already
    other = OpenVLAForActionPrediction.from_pretrained(BASE)
    other.load_adapter(str(adapter))
    for loaded in (model, other):  # without the adapter nothing is predicted
        assert (loaded.config.action_chunk, loaded.config.action_head) == (CHUNK, "l1_regression")
        assert loaded.prefix_training == 2
    np.testing.assert_allclose(other.predict_action(IMAGES[0], WORDS[0], state=state), expected, atol=1e-6)
    # As one model of both
    assert merge_adapter(adapter, tmp_path / "merged") < 1e-4
    merged = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(merged.predict_action(IMAGES[0], WORDS[0], state=state), expected, atol=1e-4)
    assert merged.config.use_film and merged.config.proprio_dim == len(state)
    # PEFT alone loads no parts: no actions of a head that is not there
    wrapped = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(BASE), adapter)
    with pytest.raises(ValueError, match="trained with action_head='l1_regression', the model has 'tokens'"):
        wrapped.predict_action(IMAGES[0], WORDS[0])


def test_an_adapter_of_a_head_without_weights(small_policy, tmp_path):
    """No file of parts is written: none is asked for, by who loads, merges, continues or goes on with the run."""
    pytest.importorskip("peft", reason="adapters need the [train] extra")
    made = {"strategy": "lora", "head": "parallel_tokens", "model": str(small_policy), "save_every": 1, "keep": 2}
    finetune(options(tmp_path / "run", **made))
    assert not (tmp_path / "run" / "added_parts.safetensors").exists()
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "run")
    expected = model.predict_action(IMAGES[0], WORDS[0], return_dict=True)
    assert expected.actions.shape == (CHUNK, 7) and model.config.action_head == "parallel_tokens"
    merge_adapter(tmp_path / "run", tmp_path / "merged")
    merged = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged")
    found = merged.predict_action(IMAGES[0], WORDS[0], return_dict=True)
    np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, atol=1e-4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    (tmp_path / "run" / "dataset_statistics.json").unlink()
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    finetune(options(tmp_path / "run", **made), resume=True)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before
    finetune(options(tmp_path / "more", **{**made, "model": str(tmp_path / "run")}, action_chunk=None))


def test_an_adapter_brings_the_steps_of_its_diffusion(small_policy, models, tmp_path):
    """The weights of its base say nothing of them: on a copy of others its noise was removed on another schedule."""
    pytest.importorskip("peft", reason="adapters need the [train] extra")
    base = shutil.copytree(small_policy, tmp_path / "base")
    OpenVLAConfig.from_pretrained(base, diffusion_steps=10).save_pretrained(base)
    finetune(options(tmp_path / "run", model=str(base), head="diffusion", steps=1))
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    model.load_adapter(str(tmp_path / "run"))
    assert model.action_head.num_inference_steps == model.action_head.num_train_steps == 10
    with pytest.raises(ValueError, match="has diffusion_steps=50, asked for diffusion_steps=10"):
        models["diffusion"].add_parts(diffusion_steps=10)


def test_an_adapter_without_its_parts_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "added_parts.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="added_parts.safetensors"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path / "run")


def test_a_merged_model_that_answers_nan_is_not_written(adapter, tmp_path):
    run = shutil.copytree(adapter, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    file = run / "added_parts.safetensors"
    parts = load_file(file)
    save_file({name: value * np.nan if name.endswith("fc2.weight") else value for name, value in parts.items()}, file)
    with pytest.raises(ValueError, match="answers with NaN or infinity, so nothing is written"):
        merge_adapter(run, tmp_path / "merged", base=BASE)
    assert not (tmp_path / "merged").exists()


def test_a_run_with_parts_continues(adapter, tmp_path):
    """Stopped after the first of two steps: the same weights as without a stop; and another run begins with it."""
    shutil.copytree(adapter, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    for name in ("adapter_model.safetensors", "added_parts.safetensors", "dataset_statistics.json"):
        (tmp_path / "run" / name).unlink()
    finetune(options(tmp_path / "run", **ADAPTER), resume=True)
    for name in ("adapter_model.safetensors", "added_parts.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (adapter / name).read_bytes(), name
    more = options(
        tmp_path / "more", model=str(adapter), strategy="lora", action_chunk=None, learning_rate=0.0, steps=1
    )
    finetune(more)
    first, second = (OpenVLAForActionPrediction.from_pretrained(run) for run in (adapter, tmp_path / "more"))
    state = state_of(first)
    found = [model.predict_action(IMAGES[0], WORDS[0], state=state) for model in (first, second)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_diffusion_begins_with_its_generator(models, monkeypatch):
    model = models["diffusion"]
    found = [
        model.predict_action(IMAGES[0], WORDS[0], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2])
    for steps in (0, -1, 51, 1.5):
        monkeypatch.setattr(model.action_head, "num_inference_steps", steps)
        with pytest.raises(ValueError, match=f"num_inference_steps={steps}: expected 1 to 50"):
            model.predict_action(IMAGES[0], WORDS[0])
    with pytest.raises(ValueError, match="generator must be a torch.Generator"):
        model.predict_action(IMAGES[0], WORDS[0], generator=3)
    model.action_head.num_inference_steps = 5
    few = model.predict_action(IMAGES[0], WORDS[0], generator=torch.Generator().manual_seed(1))
    model.action_head.num_inference_steps = 50
    assert few.shape == found[0].shape and not np.array_equal(few, found[0])


@pytest.mark.parametrize("head", ["tokens", "parallel_tokens", "l1_regression", "diffusion"])
def test_actions_that_are_decided_come_back_and_are_continued(head, models, monkeypatch):
    """The rest of the chunk depends on them; a head of tokens continues its own beginning as it would have."""
    if head == "tokens":
        # No dimension is constant: of such the tokens of training are given, whatever a model's own are.
        units = {"mine": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
        model = OpenVLAForActionPrediction.from_pretrained(BASE, norm_stats=units).eval()
        model.config.action_chunk = CHUNK
    else:
        model = models[head]
        monkeypatch.setattr(model.action_head, "num_inference_steps", 10, raising=False)  # of a diffusion

    def act(committed, images=IMAGES, words=WORDS):
        torch.manual_seed(0)
        return model.predict_action(images, words, committed=committed)

    free = act(None)
    own, other = free[:, :1], np.full((2, 2, 7), 0.1)
    continued = act(own)
    np.testing.assert_allclose(continued[:, :1], own, atol=1e-12)
    if head == "tokens":
        np.testing.assert_allclose(continued, free, atol=1e-6)
        forced = act(other)
    else:
        with pytest.warns(UserWarning, match="2 steps are committed, and this model learned to continue none"):
            forced = act(other)
    assert np.array_equal(forced[:, :2], other) and np.isfinite(forced).all()
    if "tokens" in head:  # those that were given are their tokens, and sure
        shown = model.predict_action(IMAGES, WORDS, committed=other, return_dict=True)
        given = model.action_tokenizer.encode(shown.normalized_actions[:, :2])
        assert np.array_equal(shown.token_ids[:, :2], given) and (shown.token_probabilities[:, :2] == 1).all()
    assert head == "parallel_tokens" or not np.allclose(forced[:, 2], free[:, 2])
    single = act(other[0], IMAGES[0], WORDS[0])
    assert single.shape == (CHUNK, 7)
    np.testing.assert_allclose(single, forced[0], atol=1e-3 if head == "diffusion" else 3e-5)
    assert np.array_equal(act(np.zeros((2, 0, 7))), free)
    half = torch.tensor(own).bfloat16().requires_grad_()  # of a policy's own earlier chunk, as a tensor
    assert np.array_equal(act(half)[:, :1], half.detach().double().numpy())
    for wrong in (np.zeros((2, CHUNK, 7)), np.zeros((1, 1, 7)), np.zeros((2, 1, 6)), np.full((2, 1, 7), np.nan)):
        with pytest.raises(ValueError, match="committed has shape"):
            act(wrong)
    with pytest.raises(ValueError, match="committed is masked in part"):  # what lay under the mask was continued
        act(np.ma.masked_array(np.zeros((2, 1, 7)), mask=True))


@pytest.mark.parametrize("head", ["parallel_tokens", "l1_regression", "diffusion"])
def test_prefixes_are_given_and_not_learned(head, models):
    model = models[head].train()
    head_of = model.action_head
    head_of.action_dim, head_of.prefix_training = 7, CHUNK - 1
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(744, 1000, (4, 40), generator=generator)
    labels = torch.full_like(rows, -100)
    labels[:, -(CHUNK * 7 + 1) :] = rows[:, -(CHUNK * 7 + 1) :]
    batch = {
        "input_ids": rows, "labels": labels, "attention_mask": torch.ones_like(rows).bool(),
        "pixel_values": torch.randn(4, *model.vision_backbone.input_shape, generator=generator),
        **({"actions": torch.rand(4, CHUNK, 7, generator=generator)} if head_of.wants_actions else {}),
    }  # fmt: skip
    batch = head_of.prepare(batch)
    try:
        torch.manual_seed(0)
        drawn = head_of.draw_prefixes(model, batch)
        assert drawn.shape == (4, 1) and 0 < int(drawn.max()) <= CHUNK - 1
        if head != "diffusion":
            # What is recorded in the steps that are given does not count
            torch.manual_seed(0)
            loss, _ = head_of.loss(model, batch)
            row = int(drawn.argmax())
            changed = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
            if head == "l1_regression":
                changed["actions"][row, 0] += 5
            else:
                changed["labels"][row, 40 - CHUNK * 7 - 1] = 800
            torch.manual_seed(0)
            assert torch.equal(head_of.loss(model, changed)[0], loss)
        else:
            assert torch.isfinite(head_of.loss(model, batch)[0])
        model.eval()
        assert not head_of.draw_prefixes(model, batch).any()
    finally:
        head_of.prefix_training = 0
        model.eval()


def test_what_prefix_training_refuses(tmp_path):
    with pytest.raises(ValueError, match="prefix_training=1: action_head='tokens' continues what it is given"):
        finetune(options(tmp_path / "a", prefix_training=1))
    with pytest.raises(ValueError, match="prefix_training=3: expected 0, or fewer steps than the 3 of a chunk"):
        finetune(options(tmp_path / "b", prefix_training=3, head="l1_regression"))


def test_what_a_head_of_numbers_refuses(models):
    model = models["l1_regression"]
    with pytest.raises(ValueError, match="do_sample=True: this head gives numbers"):
        model.predict_action(IMAGES[0], WORDS[0], do_sample=True)
    stats = model.norm_stats
    other = {name: [0.0] * 6 for name in ("q01", "mean", "std", "min")} | {"q99": [1.0] * 6, "max": [1.0] * 6}
    model.norm_stats = {**stats, "six": {"action": other}}
    try:
        with pytest.raises(ValueError, match="trained for actions of 7 numbers, the statistics have 6"):
            model.predict_action(IMAGES[0], WORDS[0], unnorm_key="six")
    finally:
        model.norm_stats = stats
    with pytest.raises(ValueError, match="first_action goes with input_ids, pixel_values and num_actions"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), first_action=torch.tensor([2]))
    with pytest.raises(ValueError, match="max_new_tokens=7: an action"):
        model.predict_action(IMAGES[0], WORDS[0], max_new_tokens=7)
    broken = model.action_head.fc2.bias.detach().clone()
    with torch.no_grad():
        model.action_head.fc2.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict_action(IMAGES[0], WORDS[0])
    with torch.no_grad():
        model.action_head.fc2.bias.copy_(broken)


def test_a_token_head_takes_no_places_for_actions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = OpenVLAForActionPrediction.from_pretrained(BASE)
    with pytest.raises(ValueError, match="first_action is for heads that predict in one pass"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), first_action=torch.tensor([2]), num_actions=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_head": "l1_regression"}, "has weights for action_dim numbers: give action_dim"),
        ({"use_film": True}, "FiLM is for heads that predict in one pass"),
        ({"normalization": {"mine": "normal"}}, "normalization of 'mine'='normal' is unknown"),
        ({"normalization": ["bounds"]}, "normalization"),
        ({"constant_state": "mean"}, "constant_state='mean' is unknown"),
        ({"action_dim": 0}, "action_dim=0: expected a positive integer"),
    ],
)
def test_fields_that_contradict_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**fields)


def test_min_and_max_as_units(models):
    """`normalization` says for each dataset which numbers -1 and 1 stand for."""
    model = models["parallel_tokens"]
    key, before, found = "wide", model.norm_stats, {}
    stats = {"q01": [-1.0] * 7, "q99": [2.0] * 7, "min": [-3.0] * 7, "max": [4.0] * 7, "mask": [True] * 6 + [False]}
    model.norm_stats = {key: {"action": {**stats, "mean": [0.0] * 7, "std": [1.0] * 7}}}
    for mode in ("bounds_q99", "bounds"):
        model.config.normalization = {key: mode}
        prediction = model.predict_action(IMAGES[0], WORDS[0], return_dict=True)
        low, high = (np.array(stats[name]) for name in (("q01", "q99") if mode == "bounds_q99" else ("min", "max")))
        scaled = 0.5 * (prediction.normalized_actions + 1) * (high - low + 1e-8) + low
        expected = np.where(stats["mask"], scaled, prediction.normalized_actions)
        np.testing.assert_allclose(prediction.actions, expected, rtol=1e-12)
        found[mode] = prediction.actions
    model.config.normalization, model.norm_stats = {}, before
    assert not np.allclose(found["bounds"], found["bounds_q99"])


def test_parts_of_another_size_are_refused(models):
    with pytest.raises(ValueError, match="has action_head='l1_regression', asked for action_head='diffusion'"):
        models["l1_regression"].add_parts(action_head="diffusion")
    model = models["parallel_tokens"]
    before = model.config.to_dict()
    for wrong in ({"proprio_dim": 3, "action_dim": 0}, {"proprio_dim": 3, "action_head": "tokens"}):
        with pytest.raises(ValueError, match="action_dim=0|use_film=True, action_head='tokens'"):
            model.add_parts(**wrong)
    assert model.config.to_dict() == before  # refused, it is the model that it was


def test_sizes_of_the_published_heads():
    """Parameters of heads and projectors of the 7B model (width 4096) and two arms, as the original counts them."""
    text = {"model_type": "llama", "hidden_size": 4096, "vocab_size": 32064, "num_hidden_layers": 1}
    for action_dim, expected in ((7, 151_117_831), (14, 268_644_366)):
        config = OpenVLAConfig(text_config=dict(text), action_head="l1_regression", action_dim=action_dim)
        with torch.device("meta"):
            head = make_head(config)
        assert sum(parameter.numel() for parameter in head.parameters()) == expected
    assert {"tokens", "parallel_tokens", "l1_regression", "diffusion"} <= {*HEADS}


def test_the_time_of_a_diffusion():
    found = time_embedding(torch.tensor([0, 49]), 8)
    assert found.shape == (2, 8) and found[0].tolist() == [0.0] * 4 + [1.0] * 4
    np.testing.assert_allclose(found[1, :4], np.sin(49 * 10000.0 ** -(np.arange(4) / 3)), rtol=1e-5)
