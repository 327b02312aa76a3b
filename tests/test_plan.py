"""The plan of a run against real runs: what autograd keeps, gradients, optimizer states, FLOPs."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from processes import run

from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.action_heads_openvla import make_head
from openvla.presets import load_preset_config
from openvla.training import apply_strategy, qlora_quantization, trainable_parameters
from openvla.training.muon import make_muon
from openvla.training.plan import build, config_parameters, estimate, main
from openvla.training.step_cost import ACTION_SHAPE, SavedBytes, run_step, training_inputs, usual_shape
from openvla.training.strategies import checkpoint_activations


pytest.importorskip("peft", reason="adapters need the [train] extra")

ROOT = Path(__file__).resolve().parents[1]
BATCH, TOKENS = 2, 12


@pytest.fixture(scope="module")
def config() -> OpenVLAConfig:
    """The embedded policy with two layers each: a step without values takes its time for each operation."""
    config = OpenVLAConfig.from_pretrained(ROOT)
    for tower in config.timm_model_kwargs:
        tower |= {"depth": 2, "embed_dim": 64, "num_heads": 2}
    text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return config


@pytest.fixture(scope="module")
def smaller(config) -> OpenVLAConfig:
    """With one of the towers and one layer of words, for what does not depend on how many there are."""
    config = copy.deepcopy(config)
    for name in ("timm_model_ids", "timm_model_kwargs", "image_sizes"):
        setattr(config, name, getattr(config, name)[-1:])
    config.use_fused_vision_backbone = False
    config.text_config.num_hidden_layers = 1
    return config


def real_model(config: OpenVLAConfig, strategy: str, precision: str, **options):
    """As `finetune` loads a model that is stored in bfloat16."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = OpenVLAForActionPrediction(copy.deepcopy(config)).to(dtype)
    model = apply_strategy(model, strategy, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def real_saved_bytes(model, config, autocast: bool) -> int:
    head = make_head(config)
    inputs = head.prepare(training_inputs(config, BATCH, TOKENS))
    inputs["attention_mask"][0, -1] = False  # as in most batches, one prompt is shorter than the other
    saved = SavedBytes(model)
    with saved.count(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = head.loss(model, inputs)
    loss.backward()
    return saved.total


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("full", "float32"),
        ("full", "bf16"),
        ("last_layer", "bf16"),
        ("frozen_vision", "float32"),
        ("frozen_vision", "bf16"),
        ("sandwich", "bf16"),
        ("lora", "float32"),
        ("lora", "bf16"),
    ],
)
def test_a_step_without_values_keeps_what_a_real_one_keeps(config, strategy, precision):
    adapter = {"rank": 4} if strategy == "lora" else {}
    model = real_model(config, strategy, precision, **adapter)
    plan = estimate(config, strategy, batch_size=BATCH, text_tokens=TOKENS, precision=precision, **adapter)
    assert plan.activations == real_saved_bytes(model, config, autocast=precision == "bf16")

    assert plan.trainable == trainable_parameters(model)
    assert plan.weights == sum(parameter.nbytes for parameter in model.parameters())
    gradients = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert plan.gradients == sum(parameter.grad.nbytes for parameter in gradients)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer.step()
    states = [state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.optimizer == sum(states)


@pytest.mark.parametrize(("strategy", "adapter"), [("full", {}), ("lora", {"rank": 2}), ("lora", {"rank": 8})])
def test_muon_keeps_one_number_for_a_weight_of_a_matrix(config, float32_muon, strategy, adapter):
    """Adapters of rank 2 are too thin for it and go to AdamW."""
    arguments = {"batch_size": BATCH, "text_tokens": TOKENS, "precision": "float32", **adapter}
    plan = estimate(config, strategy, optimizer="muon", **arguments)
    model = real_model(config, strategy, "float32", **adapter)
    real_saved_bytes(model, config, autocast=False)
    optimizer = make_muon(model, learning_rate=0.01, weight_decay=0.1)
    optimizer.step()
    states = [(weight, state) for weight, kept in optimizer.state.items() for state in kept.values()]
    real = sum(state.nbytes for weight, state in states if torch.is_tensor(state) and state.shape == weight.shape)
    assert plan.optimizer == real
    assert (plan.optimizer < 2 * plan.gradients) == (adapter != {"rank": 2})  # which AdamW keeps


def test_gradient_checkpointing_keeps_what_a_real_run_keeps(config):
    arguments = {"batch_size": BATCH, "text_tokens": TOKENS, "precision": "float32"}
    plan = estimate(config, "full", gradient_checkpointing=True, **arguments)
    model = real_model(config, "full", "float32")
    checkpoint_activations(model)
    whole = run_step(build(config, "full", "float32"), config, BATCH, TOKENS)
    assert plan.activations == real_saved_bytes(model, config, autocast=False) + whole.largest_block
    # timm 1.0.9 keeps what towers compute all the same.
    assert plan.activations < (0.95 if timm.__version__ == "1.0.9" else 0.8) * whole.saved
    assert plan.flops_per_sample == whole.flops / BATCH


def test_a_quantized_base_weighs_what_it_weighs(config, tmp_path):
    pytest.importorskip("bitsandbytes", reason="a quantized model needs the [quant] extra")
    OpenVLAForActionPrediction(copy.deepcopy(config)).save_pretrained(tmp_path)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path, quantization_config=qlora_quantization(torch.float32))
    model = apply_strategy(model, "qlora", rank=4)
    plan = estimate(config, "qlora", batch_size=BATCH, text_tokens=TOKENS, rank=4)
    real = 0
    for parameter in model.parameters():
        real += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            real += state.absmax.nbytes + state.state2.absmax.nbytes
    assert plan.weights == pytest.approx(real, rel=1e-4)
    assert plan.trainable == trainable_parameters(model)
    # accelerate does not share out 4-bit weights
    shared = estimate(config, "qlora", batch_size=BATCH, text_tokens=TOKENS, rank=4, world_size=8, sharded=True)
    assert plan.weights / 8 < shared.weights < plan.weights


def test_ranks_share_under_fsdp_and_not_under_ddp(smaller):
    arguments = {"batch_size": BATCH, "text_tokens": TOKENS, "precision": "float32"}
    one = estimate(smaller, "frozen_vision", **arguments)
    ddp = estimate(smaller, "frozen_vision", world_size=8, **arguments)
    fsdp = estimate(smaller, "frozen_vision", world_size=8, sharded=True, **arguments)
    assert one.communication == 0
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(ddp, part) == getattr(one, part)
        assert getattr(fsdp, part) == getattr(one, part) / 8
    assert ddp.communication == one.gradients
    assert fsdp.activations == ddp.activations == one.activations
    assert fsdp.communication > 0
    assert fsdp.total == sum((fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.activations, fsdp.communication))
    # one rank has nothing to share with
    assert estimate(smaller, "frozen_vision", sharded=True, **arguments) == one


def test_activations_and_flops_grow_with_the_batch(smaller):
    small, large = (estimate(smaller, "full", batch_size=size, precision="float32") for size in (2, 4))
    assert large.activations == pytest.approx(2 * small.activations, rel=2e-3)  # some kilobytes depend on no sample
    assert large.flops_per_sample == pytest.approx(
        small.flops_per_sample, rel=5e-6 if torch.__version__ < "2.7" else 2e-6
    )
    assert (large.weights, large.gradients) == (small.weights, small.gradients)


def test_a_text_may_be_longer_than_the_patches_of_an_image(smaller):
    """49 here: such a text might hold them already, which only values could tell."""
    arguments = {"batch_size": 1, "precision": "float32", "shape": (9, 7)}
    short, long = (estimate(smaller, "last_layer", text_tokens=length, **arguments) for length in (66, 72))
    assert short.activations < long.activations


def test_flops_of_a_layer_are_those_of_its_formula(smaller):
    """Forward and backward of the output layer: 3 products of 2 * rows * inner * columns each, on the rows
    that predict the answer and the last one."""
    text = smaller.text_config
    before = estimate(smaller, "full", batch_size=1, text_tokens=TOKENS).flops_per_sample
    wider = copy.deepcopy(smaller)
    wider.text_config.vocab_size += 64
    wider.image_token_id += 64
    after = estimate(wider, "full", batch_size=1, text_tokens=TOKENS).flops_per_sample
    assert after - before == 3 * 2 * (make_head(smaller).num_targets(ACTION_SHAPE) + 1) * text.hidden_size * 64


def test_chunks_are_planned_as_the_model_has_them(smaller):
    """Without a shape it was one action of seven numbers: too little of a chunk, and a traceback for other sizes."""
    config = copy.deepcopy(smaller)
    vars(config).update(action_head="l1_regression", action_dim=14, action_chunk=25)
    told = {"shape": (25, 14), "text_tokens": 22 + 25 * 14 + 1}
    assert estimate(config, "last_layer", batch_size=1) == estimate(config, "last_layer", batch_size=1, **told)
    vars(config).update(action_head="tokens", action_dim=None, action_chunk=3, norm_stats={})
    for sizes, expected in (((14,), 14), ((14, 14), 14), ((6, 7), 7), ((), 7)):
        config.norm_stats = {f"set{number}": {"action": {"q01": [0.0] * size}} for number, size in enumerate(sizes)}
        assert usual_shape(config) == (3, expected)


@pytest.mark.parametrize(
    ("preset", "strategy", "parameters"),
    [("openvla-7b", "lora", 7_541_237_184), ("openvla-v01-7b", "last_layer", 7_188_124_608)],
)
def test_parameters_of_the_published_models(preset, strategy, parameters):
    config = load_preset_config(preset)
    assert config_parameters(build(config, strategy)) == parameters
    assert config.text_config.use_cache is True  # the caller's config stays as it was


def test_what_learns_of_openvla_oft():
    """Adapters, head, state and FiLM of the 7B model, as the original counts them."""
    config = load_preset_config("openvla-7b")
    vars(config).update(action_head="l1_regression", action_dim=7, proprio_dim=8, use_film=True)
    model = build(config, "lora", rank=32)
    learns = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def counted(part: str) -> int:
        return sum(size for name, size in learns.items() if part in name)

    film = counted(".scale.") + counted(".shift.")
    assert (counted(".action_head."), counted(".proprio_projector."), film) == (151_117_831, 16_818_176, 456_241_920)
    assert counted(".lora_") == 110_828_288 == sum(learns.values()) - 151_117_831 - 16_818_176 - 456_241_920
    adapted = {name.partition(".lora_A")[0].rpartition(".")[2] for name in learns if ".lora_A" in name}
    of_words = {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")} | {"lm_head"}
    assert adapted == of_words | {"fc1", "fc2", "fc3", "qkv", "proj", "q", "kv"}
    assert any("patch_embed.proj.lora_A" in name for name in learns)


def test_the_program_is_imported_once():
    """`python -m openvla.training.plan` warns where the package has imported the module before it runs it."""
    done = run("import sys, openvla.training; print('openvla.training.plan' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr


def test_table_and_errors(config, capsys):
    main([str(ROOT), "--strategy", "last_layer", "--batch-size", "1", "--text-tokens", "9"])
    header, _, row = capsys.readouterr().out.strip().splitlines()
    assert "total MB" in header and row.startswith("| last_layer | 1.3 |")
    with pytest.raises(ValueError, match="Did you mean 'lora'"):
        estimate(config, "loar")
    with pytest.raises(ValueError, match="Did you mean 'bf16'"):
        estimate(config, "lora", precision="bf61")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        estimate(config, "lora", batch_size=0)
    with pytest.raises(ValueError, match="text_tokens=8 must be at least 9"):
        estimate(config, "lora", text_tokens=8)
    for wrong, answer in (
        (["openvla-7c"], "error: model='openvla-7c' is unknown. Did you mean 'openvla-7b'?"),
        (["libero"], "error: Preset 'libero' holds no configuration. Presets that do: openvla-7b"),
        ([str(ROOT), "--batch-size", "0"], "error: batch_size=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert capsys.readouterr().err.startswith(answer)
