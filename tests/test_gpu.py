"""On a CUDA device: the tokens of the CPU, in every attention, batch and type; checks, quantization and training there.

python -m pytest -m gpu
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parallel_graphs import MODELS, inputs_of, make
from tiny import TINY, golden_image
from transformers import BitsAndBytesConfig

from openvla import OpenVLAForActionPrediction
from openvla.action_heads_openvla import make_head
from openvla.float8_linear_openvla import Float8Linear, multiplies_float8
from openvla.int4_linear_openvla import (
    FEW_ON_CUDA,
    Int4Linear,
    _scaled,
    _split,
    _stored_of_tiles,
    _unpack_cuda,
    knows_tiles,
)
from openvla.int8_linear_openvla import Int8Linear
from openvla.quantization_openvla import OpenVLAQuantizationConfig
from openvla.token_head_openvla import moved
from openvla.training import apply_strategy


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[1]
FUSED = TINY[0]
INSTRUCTIONS = ["open the drawer", "pick up the coffee mug and place it on the shelf", "push the button"]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Products of float32 in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision(before)


def predict(model, instructions=INSTRUCTIONS, **options):
    images = [golden_image(index) for index in range(len(instructions))]
    return model.predict_action(images, instructions, unnorm_key="bridge_orig", return_dict=True, **options)


@pytest.fixture(scope="module")
def on_cpu():
    return predict(FUSED.load())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_goldens(tiny_checkpoint, tiny_processor, attention):
    model = tiny_checkpoint.load(attn_implementation=attention).cuda()
    for case in tiny_checkpoint.cases:
        inputs = tiny_checkpoint.inputs(tiny_processor, case)
        prediction = model.predict_action(**inputs, unnorm_key=case["unnorm_key"], constrained=False, return_dict=True)
        assert prediction.token_ids.tolist() == case["generated"]
        assert prediction.actions.tolist() == case["actions"]


def test_flex_attention(on_cpu):
    prediction = predict(FUSED.load(attn_implementation="flex_attention").cuda())
    assert prediction.token_ids.tolist() == on_cpu.token_ids.tolist()


def test_generate_gives_the_goldens(tiny_checkpoint, tiny_processor):
    model = tiny_checkpoint.load().cuda()
    for case in tiny_checkpoint.cases[:3]:
        inputs = tiny_checkpoint.inputs(tiny_processor, case)
        inputs["input_ids"] = torch.tensor([case["input_ids_used"]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs = {name: value.cuda() for name, value in inputs.items()}
        generated = model.generate(**inputs, max_new_tokens=len(case["generated"]), do_sample=False)
        assert generated.tolist() == [case["input_ids_used"] + case["generated"]]


def test_a_batch_is_what_its_samples_are(on_cpu):
    model = FUSED.load().cuda()
    batch = predict(model)
    assert batch.token_ids.tolist() == on_cpu.token_ids.tolist()
    np.testing.assert_allclose(batch.token_probabilities, on_cpu.token_probabilities, rtol=1e-3)
    for row, instruction in enumerate(INSTRUCTIONS):
        single = model.predict_action(golden_image(row), instruction, unnorm_key="bridge_orig")
        assert single.tolist() == batch.actions[row].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """As near to the logits of float32 as a CPU comes in the same type."""
    processor = FUSED.processor()
    inputs = processor(processor.format_prompt(INSTRUCTIONS[0]), golden_image(0))

    @torch.inference_mode()
    def logits(model):
        return model(**{name: value.to(model.device) for name, value in inputs.items()}).logits[:, -1].float().cpu()

    expected = logits(FUSED.load())
    here, there = ((logits(FUSED.load(dtype=dtype).to(device)) - expected).norm() for device in ("cuda", "cpu"))
    assert here < 2 * there


def test_the_embedded_policy():
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, dtype=torch.float32)
    key = next(iter(model.norm_stats))
    images = [golden_image(index) for index in range(4)]
    expected = model.predict_action(images, ["open the drawer"] * 4, unnorm_key=key)
    assert model.cuda().predict_action(images, ["open the drawer"] * 4, unnorm_key=key).tolist() == expected.tolist()


def test_pixels_on_the_device():
    model = FUSED.load().cuda()
    inputs = model.processor(model.processor.format_prompt("open the drawer"), golden_image(0))
    expected = model.predict_action(**inputs, unnorm_key="bridge_orig")
    moved = {name: value.cuda() for name, value in inputs.items()}
    assert model.predict_action(**moved, unnorm_key="bridge_orig").tolist() == expected.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_action(value):
    model = FUSED.load().cuda()
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    for options in ({}, {"do_sample": True}):
        with pytest.raises(ValueError, match="NaN or infinite"):
            predict(model, **options)
    torch.cuda.synchronize()  # the process can still compute


def test_a_generator_on_the_device():
    model = FUSED.load().cuda()

    def draw():
        return predict(model, do_sample=True, temperature=2.0, generator=torch.Generator("cuda").manual_seed(3))

    assert draw().token_ids.tolist() == draw().token_ids.tolist()
    with pytest.raises(ValueError, match="The generator is on cpu"):
        predict(model, do_sample=True, generator=torch.Generator().manual_seed(3))


def test_decoding_waits_for_the_device_a_few_times_only():
    """Moves of inputs aside, the device is read at the end: tokens, probabilities, entropies, and whether placeholders
    stand in the prompt."""
    model = FUSED.load().cuda()
    predict(model, INSTRUCTIONS[:1])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            predict(model, INSTRUCTIONS[:1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_graphs_give_the_tokens_of_plain_decoding(on_cpu, dtype, attention):
    """From recorded kernels: every length of prompt, one and three samples, without and with drafts."""
    model = FUSED.load(dtype=dtype, attn_implementation=attention).cuda()
    expected = {count: predict(model, INSTRUCTIONS[:count]) for count in (1, 3)}
    done = model.prepare_for_inference((1, 3), (24, 48), unnorm_key="bridge_orig")
    assert len(done.graphs) == 4, done.reason
    for count, plain in expected.items():
        for draft in (None, plain.token_ids, np.roll(plain.token_ids, 1, axis=1)):
            found = predict(model, INSTRUCTIONS[:count], draft=draft)
            same = found.token_ids == plain.token_ids
            if dtype == torch.float32:
                assert same.all()
                np.testing.assert_allclose(found.token_probabilities, plain.token_probabilities, rtol=1e-3)
            else:  # random weights: where two logits are nearly equal, roundings decide
                assert same[:, 0].mean() > 0.5
            assert found.token_passes.max() == (7 if draft is None else found.token_passes.max())
    if dtype == torch.float32:
        assert expected[3].token_ids.tolist() == on_cpu.token_ids.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_graphs_give_the_tokens_of_others(dtype):
    """With the roundings of kernels that are not compiled; products of merged weights may add up in another order."""
    model, other = (FUSED.load(dtype=dtype).cuda() for _ in range(2))
    sizes = {"batch_sizes": (1, 3), "prompt_buckets": (24, 48), "unnorm_key": "bridge_orig"}
    plain = {count: predict(other, INSTRUCTIONS[:count]) for count in (1, 3)}
    done = model.prepare_for_inference(**sizes, compile=True)
    assert done.compiled and len(done.graphs) == 4, done.reason
    other.prepare_for_inference(**sizes)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (1, 3):
            expected = predict(other, INSTRUCTIONS[:count])
            if dtype == torch.float32:
                assert expected.token_ids.tolist() == plain[count].token_ids.tolist()
            for draft in (None, expected.token_ids, np.roll(expected.token_ids, 1, axis=1)):
                found = predict(model, INSTRUCTIONS[:count], draft=draft)
                if dtype == torch.float32:
                    assert found.token_ids.tolist() == expected.token_ids.tolist()
                    np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, rtol=1e-3)
                else:  # random weights: where two logits are nearly equal, roundings decide
                    assert (found.token_ids == expected.token_ids)[:, 0].mean() > 0.5
    model.float().cpu()
    assert predict(model).token_ids.shape == (3, 7)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_graphs_of_few_bits(bits, compile):
    """The probabilities of the same weights without graphs, one token at a time and several."""
    options = {"dtype": torch.bfloat16, "quantization_config": OpenVLAQuantizationConfig(bits)}
    model, other = (OpenVLAForActionPrediction.from_pretrained(ROOT, **options).cuda() for _ in range(2))
    images, words = [golden_image(index) for index in range(3)], ["open the drawer"] * 3
    done = model.prepare_for_inference((1, 3), (24,), compile=compile)
    assert len(done.graphs) == 2 and done.compiled == compile, done.reason
    for count in (1, 3):
        expected = other.predict_action(images[:count], words[:count], return_dict=True, return_distributions=True)
        for draft in (None, expected.token_ids, np.roll(expected.token_ids, 1, axis=1)):
            found = model.predict_action(
                images[:count], words[:count], draft=draft, return_dict=True, return_distributions=True
            )
            tokens = found.token_ids.shape
            parts = [
                (one.token_ids.reshape(count, -1), one.token_distributions.reshape(count, tokens[-1], -1))
                for one in (found, expected)
            ]
            assert moved(*parts) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_graphs_of_heads_of_one_pass(kind, dtype):
    """The numbers of the same weights without graphs: every length of prompt, one and three samples."""
    model, other = (make(kind).to(dtype).cuda() for _ in range(2))
    done = model.prepare_for_inference((1, 3), (8, 16))
    assert len(done.graphs) == 4, done.reason
    for batch in (1, 3):
        for seed in range(4):
            given = inputs_of(model, batch, seed, padded=seed % 2 == 1)
            found, expected = (one.predict_action(**given, return_dict=True) for one in (model, other))
            if dtype == torch.float32:
                np.testing.assert_allclose(found.normalized_actions, expected.normalized_actions, rtol=1e-3, atol=1e-4)
            elif "token_ids" not in expected:  # of tokens roundings decide
                np.testing.assert_allclose(found.normalized_actions, expected.normalized_actions, rtol=0.1, atol=0.1)


def test_graphs_notice_that_a_model_has_changed():
    model, other = FUSED.load().cuda(), FUSED.load().cuda()
    done = model.prepare_for_inference((1,), (32,), unnorm_key="bridge_orig")
    assert done.graphs == [(1, 32)], done.reason
    with torch.no_grad():
        for changed in (model, other):
            changed.language_model.model.layers[0].mlp.down_proj.weight.mul_(3)  # in place
    assert predict(model, INSTRUCTIONS[:1]).token_ids.tolist() == predict(other, INSTRUCTIONS[:1]).token_ids.tolist()
    for change in (lambda changed: changed.to(torch.bfloat16), lambda changed: changed.cpu()):
        change(model), change(other)
        with pytest.warns(UserWarning, match="is not what prepare_for_inference recorded"):
            found = predict(model, INSTRUCTIONS[:1])
        assert found.token_ids.tolist() == predict(other, INSTRUCTIONS[:1]).token_ids.tolist()
        model.prepare_for_inference((1,), (32,), unnorm_key="bridge_orig")


def test_graphs_and_drafts_wait_once_a_pass():
    """Without a draft the device is read once, for the results; with one once more for each pass. Memory is flat."""
    model = FUSED.load().cuda()
    done = model.prepare_for_inference((1,), (32,), unnorm_key="bridge_orig")
    assert done.graphs, done.reason
    tokens = predict(model, INSTRUCTIONS[:1]).token_ids
    inputs = model.processor(model.processor.format_prompt(INSTRUCTIONS[:1]), [golden_image(0)])
    for draft, reads in ((None, 1), (tokens, 2)):
        model.predict_action(**inputs, unnorm_key="bridge_orig", draft=draft)
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                model.predict_action(**inputs, unnorm_key="bridge_orig", draft=draft)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message)]
        assert len(waits) <= reads + 6, waits  # and copies of inputs from memory that is not pinned
        for _ in range(20):
            model.predict_action(**inputs, unnorm_key="bridge_orig", draft=draft)
        assert torch.cuda.memory_allocated() == before


def test_threads_share_the_graphs():
    model = FUSED.load().cuda()
    expected = [predict(model, [instruction]).token_ids.tolist() for instruction in INSTRUCTIONS]
    done = model.prepare_for_inference((1,), (48,), unnorm_key="bridge_orig")
    assert done.graphs, done.reason
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: predict(model, [text]).token_ids.tolist(), INSTRUCTIONS * 8))
    assert found == expected * 8


def test_memory_does_not_grow():
    model = FUSED.load().cuda()
    predict(model)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        predict(model)
    assert torch.cuda.memory_allocated() == before


def test_offloaded_towers(on_cpu, tmp_path):
    model = FUSED.load(
        device_map={"vision_backbone": "cpu", "projector": 0, "language_model": 0}, offload_folder=str(tmp_path)
    )
    assert predict(model).token_ids.tolist() == on_cpu.token_ids.tolist()


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_quantized(options, tmp_path):
    pytest.importorskip("bitsandbytes", reason="quantized loading needs the [quant] extra")
    model = FUSED.load(quantization_config=BitsAndBytesConfig(**options), device_map={"": 0}, dtype=torch.float16)
    prediction = predict(model)
    assert np.isfinite(prediction.actions).all()
    model.save_pretrained(tmp_path)
    FUSED.processor().save_pretrained(tmp_path)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path, device_map={"": 0})
    assert predict(again).token_ids.tolist() == prediction.token_ids.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Float8Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(256, 128), (4096, 4096), (672, 256)], ids=str)
def test_layers_of_few_bits(kind, dtype, size):
    """Few rows pass a kernel, many a matrix product with the unpacked weights; with fp8 activations are rounded too."""
    in_features, out_features = size
    stored = kind.quantize(torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) * 0.05)
    module = kind(in_features, out_features, bias=False)
    module.load_state_dict(stored)
    module.cuda()
    weight = module.dequantize(torch.float32).double()
    most = 0.05 if kind is Float8Linear and multiplies_float8(torch.device("cuda", 0)) else 0.01
    for rows in (1, 7, 8, 9, FEW_ON_CUDA, FEW_ON_CUDA + 1, 300):
        x = torch.randn(rows, in_features, device="cuda").to(dtype)
        y, expected = module(x), x.double() @ weight.T
        assert y.dtype == dtype and y.shape == (rows, out_features)
        assert (y.double() - expected).norm() / expected.norm() < most, rows
    assert all(torch.equal(module.state_dict()[name].cpu(), value) for name, value in stored.items())
    torch.testing.assert_close(module.dequantize(torch.float32).double(), weight)  # after it was packed
    x[1] = 0
    assert (module(x)[1] == 0).all()
    for few, value in ((x, torch.nan), (x[:3].clone(), torch.inf)):
        few[0, 3] = value
        assert not module(few)[0].isfinite().any() and module(few)[1:].isfinite().all()
    module.cpu()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in stored.items())
    assert module(x.cpu()).shape == y.shape


@torch.inference_mode()
@pytest.mark.skipif(torch.version.hip is not None, reason="the order of 4-bit weights is that of NVIDIA's tensor cores")
@pytest.mark.parametrize("size", [(256, 128), (4096, 4096), (672, 256), (64, 8), (4096, 11008), (11008, 4096)], ids=str)
def test_4_bits_are_unpacked_element_by_element(size):
    """The numbers that the kernel gives when it multiplies the identity, and the weights that it multiplies by."""
    in_features, out_features = size
    module = Int4Linear(in_features, out_features, bias=False)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) * 0.05
    module.load_state_dict(Int4Linear.quantize(weight))
    module.cuda()(torch.ones(1, in_features, device="cuda"))
    packed, scale_and_zero = module.weight, module.scale_and_zero
    assert module.kernel == "cuda" and knows_tiles(packed.device, 2 * packed.shape[-1])
    by_product = _unpack_cuda(packed, in_features, out_features)
    stored = _stored_of_tiles(packed)
    assert torch.equal(_split(stored), by_product)
    group = in_features // len(scale_and_zero)
    identity = torch.eye(in_features, dtype=torch.bfloat16, device="cuda")
    weights = torch.ops.aten._weight_int4pack_mm(identity, packed, group, scale_and_zero).t()
    torch.testing.assert_close(_scaled(stored, scale_and_zero), weights, rtol=2**-7, atol=0)  # a last bit


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9) or torch.version.hip is not None,
    reason="needs a GPU that multiplies floats of 8 bits",
)
def test_float8_is_multiplied_here():
    assert multiplies_float8(torch.device("cuda", 0))


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Float8Linear])
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_layers_of_few_bits_in_a_graph(kind, rows):
    """Recorded after one call, and nothing is read from the device: as without a graph, for other numbers too."""
    module = kind(512, 256, bias=False)
    module.load_state_dict(kind.quantize(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.05))
    module.cuda()
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, module(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [8, 4, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_by_us(bits, dtype, tmp_path):
    """The actions of the rounded weights, up to rounded activations (fp8); saved where it ran, loaded anywhere."""
    options = {"dtype": dtype, "quantization_config": OpenVLAQuantizationConfig(bits)}
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, **options).cuda()
    picture = next((ROOT / "examples" / "frames").glob("drawer*.png"))
    action = model.predict_action(picture, "open the drawer")
    unpacked = OpenVLAForActionPrediction.from_pretrained(ROOT, **options).dequantize().cuda()
    most = 0.3 if bits == "fp8" else 0.1
    assert np.abs(action - unpacked.predict_action(picture, "open the drawer")).max() < most
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert np.abs(action - again.predict_action(picture, "open the drawer")).max() < most  # on the CPU
    assert again.cuda().predict_action(picture, "open the drawer").tolist() == action.tolist()


@pytest.mark.parametrize("strategy", ["full", "lora", "sandwich"])
def test_training_steps_follow_those_of_the_cpu(strategy):
    golden = FUSED.arrays("train_batch.npz")
    batch = {name: torch.from_numpy(golden[name]) for name in ("input_ids", "attention_mask", "pixel_values", "labels")}

    def losses(device):
        torch.manual_seed(0)
        model = apply_strategy(FUSED.load(), strategy).to(device).train()
        head = make_head(FUSED.load().config)
        inputs = head.prepare({name: value.to(device) for name, value in batch.items()})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        values = []
        for _ in range(3):
            loss, _ = head.loss(model, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    torch.testing.assert_close(losses("cuda"), losses("cpu"), rtol=1e-3, atol=1e-3)


def test_a_compiled_forward_gives_the_logits():
    model = FUSED.load().cuda()
    inputs = model.processor(model.processor.format_prompt("open the drawer"), golden_image(0)).to("cuda")
    with torch.inference_mode():
        expected = model(**inputs).logits
        compiled = torch.compile(model.language_model, backend="cudagraphs")
        embeds, _ = model._merge(inputs["input_ids"], None, None, model.encode_images(inputs["pixel_values"]))
        for _ in range(3):
            logits = compiled(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("head", ["parallel_tokens", "l1_regression", "diffusion"])
def test_heads_of_one_pass(head):
    """Numbers and gradients of the CPU, for one sample and a batch; in bfloat16 near them."""
    pytest.importorskip("diffusers" if head == "diffusion" else "torch", reason="needs the [oft] extra")
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction.from_pretrained(ROOT)
    model.add_parts(action_head=head, action_dim=7, proprio_dim=3, use_film=True)
    model.config.action_chunk = 4
    stats = next(iter(model.norm_stats.values()))
    stats["proprio"] = {"q01": [-1.0] * 3, "q99": [1.0] * 3}
    model.eval()
    images, states = [golden_image(index) for index in range(3)], np.linspace(-1, 1, 9).reshape(3, 3)

    def act(device, count=3):
        noise = {"generator": torch.Generator("cpu").manual_seed(0)} if device == "cpu" else {}
        if head == "diffusion":  # a device has random numbers of its own
            model.action_head.initial_noise = lambda shape, **where: (
                torch.linspace(-2, 2, shape.numel(), dtype=where["dtype"]).reshape(shape).to(where["device"])
            )
        return model.predict_action(
            images[:count], INSTRUCTIONS[:count], state=states[:count], return_dict=True, **noise
        )

    def gradient(device):
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(3, 900, (2, 40), generator=generator)
        labels = torch.full_like(rows, -100)
        labels[:, -29:] = rows[:, -29:] = 800
        batch = {
            "input_ids": rows, "labels": labels, "attention_mask": torch.ones_like(rows).bool(),
            "pixel_values": torch.randn(2, *model.vision_backbone.input_shape, generator=generator),
            "proprio": torch.randn(2, 3, generator=generator), "actions": torch.rand(2, 4, 7, generator=generator),
        }  # fmt: skip
        if not model.action_head.wants_actions:
            del batch["actions"]
        batch = {
            name: value.to(device) if torch.is_tensor(value) else value
            for name, value in model.action_head.prepare(batch).items()
        }
        if head == "diffusion":
            return None  # noise of the device
        loss, _ = model.action_head.loss(model, batch)
        loss.backward()
        found = {name: value.grad.norm().item() for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad()
        return loss.item(), found

    on_cpu, learned = act("cpu"), gradient("cpu")
    model.cuda()
    on_gpu = act("cuda")
    tolerance = 3e-3 if head == "diffusion" else 2e-4
    np.testing.assert_allclose(on_gpu.normalized_actions, on_cpu.normalized_actions, atol=tolerance)
    single = act("cuda", 1)
    np.testing.assert_allclose(single.normalized_actions[0], on_gpu.normalized_actions[0], atol=tolerance)
    if learned is not None:
        loss, gradients = gradient("cuda")
        assert loss == pytest.approx(learned[0], rel=1e-4)
        assert gradients == pytest.approx(learned[1], rel=5e-3, abs=1e-5)
    model.to(torch.bfloat16)
    half = act("cuda")
    assert np.isfinite(half.actions).all() and half.actions.shape == (3, 4, 7)
    if head == "l1_regression":
        assert np.abs(half.normalized_actions - on_cpu.normalized_actions).mean() < 0.05
