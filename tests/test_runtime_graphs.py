"""What graphs give is looked at: of an export whose runtime.json tells of others, and on a CPU that sums wrongly."""

import numpy as np
import pytest
from openvla_runtime import sessions
from openvla_runtime.action_tokenizer import ActionTokenizer
from openvla_runtime.decoding import LanguageModel
from openvla_runtime.sessions import WIDE_SUMS, _product, needs_wide_sums


onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")


class Graph:
    """A language model that always chooses its last but one action token."""

    inputs = {"features": ((1, None, 4), np.dtype(np.float32)), "past.0": ((1, 1, None, 2), np.dtype(np.float32))}

    def __init__(self, bins):
        self.bins = bins

    def run(self, values):
        logits = np.zeros((1, len(values["rows"]), self.bins), np.float32)
        logits[..., -2] = 1
        length = values["past.0"].shape[2] + len(values["position_ids"][0])
        return {"logits": logits, "present.0": np.zeros((1, 1, length, 2), np.float32)}


def test_other_action_tokens_are_no_action():
    """256 logits were read as 128: a number in place of another, silently."""
    tokenizer, features = ActionTokenizer(1000, 128), np.zeros((1, 3, 4), np.float32)
    found = LanguageModel(Graph(128)).decode([1, 2], features, 7, tokenizer)
    assert found.token_ids.tolist() == [998] * 7
    for bins in (64, 127, 256):
        with pytest.raises(ValueError, match=f"among {bins} action tokens, and runtime.json tells of 128"):
            LanguageModel(Graph(bins)).decode([1, 2], features, 7, tokenizer)


@pytest.fixture
def told(monkeypatch):
    """ONNX Runtime as on a CPU with AVX2 and without VNNI: what does not fit into 16 bits is cut off, unless it is told
    to be exact. What the sessions were told."""
    told = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, graph, options, **more):
            super().__init__(graph, options, **more)
            try:
                told.append(options.get_session_config_entry(WIDE_SUMS[0]))
            except RuntimeError:  # nothing
                told.append(None)

        def run(self, names, values):
            (found,) = super().run(names, values)
            return [found if told[-1] else np.clip(found, -(2**15), 2**15 - 1)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    needs_wide_sums.cache_clear()
    yield told
    needs_wide_sums.cache_clear()


def test_products_of_8_bits_are_exact_on_every_cpu(told, monkeypatch):
    """An export in int8 had other sums there than where it was measured, without an error: of the embedded policy every
    thirtieth action was another one."""
    weight = np.arange(-127, 128, dtype=np.int8)[: 15 * 17].reshape(15, 17)
    graph = onnx.load_from_string(_product(weight))
    onnx.checker.check_model(graph)
    assert np.array_equal(onnx.numpy_helper.to_array(graph.graph.initializer[0]), weight)
    assert needs_wide_sums() and told == [None, "1"]
    monkeypatch.setattr(sessions, "WIDE_SUMS", ("session.x64quantprecision", ""))
    needs_wide_sums.cache_clear()
    with pytest.raises(ValueError, match="gives wrong products of 8 bits on this CPU"):
        needs_wide_sums()


def test_sessions_of_8_bits_are_told(monkeypatch, tmp_path):
    """Also those of other providers: what these have no kernel for, the CPU multiplies."""
    file, told = tmp_path / "graph.onnx", []
    file.write_bytes(_product(np.ones((64, 64), np.int8)))
    monkeypatch.setattr(sessions, "needs_wide_sums", lambda: True)
    add = onnxruntime.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        "add_session_config_entry",
        lambda self, *entry: told.append(entry) or add(self, *entry),
    )
    sessions.open_session(file, "cpu", 1)
    assert told == []
    sessions.open_session(file, "cpu", 1, of_8_bits=True)
    assert told == [WIDE_SUMS]
