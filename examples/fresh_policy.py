"""A small OpenVLA with random weights: where the embedded policy begins.

    python examples/fresh_policy.py outputs/fresh          # examples/policy.sh continues from there

Both towers, the fused projector, Llama and a tokenizer of its own, whose words are those of the tasks, so that prompts
are short and a CPU can train it.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import openvla
from openvla.evaluation.metaworld import CATALOGUE


ACTION_BINS = 256


def make_tokenizer(instructions: list[str], pieces_learned: int = 1500) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of Llama's form that knows the words of `instructions` as one piece each: bytes as
    fallback, words marked by ▁, the last ids are action tokens."""
    prompts = [openvla.PROMPT_TEMPLATES["openvla"].format(instruction=text) for text in instructions]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(
        prompts, trainers.BpeTrainer(vocab_size=pieces_learned, min_frequency=1, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    pieces += [piece for piece in sorted(learned["vocab"], key=learned["vocab"].get) if piece not in pieces]
    pieces += [chr(0x2800 + index) for index in range(ACTION_BINS)]  # Braille patterns: no instruction holds them
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
    )
    wrapped.add_special_tokens({"pad_token": "<PAD>"})  # like the original: the id after the vocabulary
    return wrapped


def make_config(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> openvla.OpenVLAConfig:
    """Both towers, the three-layer projector, Llama."""
    tower = {"patch_size": arguments.patch, "embed_dim": arguments.width, "depth": arguments.depth, "num_heads": 4}
    tower |= {"mlp_ratio": 4}
    return openvla.OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp",
        image_resize_strategy="resize-naive",
        # LayerScale begins at 0.1: from the 1e-5 of DINOv2 a short training would hardly open the blocks.
        timm_model_kwargs=[{**tower, "init_values": 0.1}, {**tower, "global_pool": ""}],
        text_config={
            "vocab_size": tokenizer.vocab_size + 64, "hidden_size": arguments.hidden, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": arguments.hidden * 8 // 3 // 32 * 32,
            "num_hidden_layers": arguments.layers, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id,
        },
        llm_max_length=256,
        pad_token_id=tokenizer.pad_token_id,
        empty_token_id=tokenizer.convert_tokens_to_ids("▁"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument(
        "--patch", type=int, default=32, help="pixels of a patch, across: 32 makes 49 patches; default: %(default)s"
    )
    parser.add_argument("--width", type=int, default=192, help="width of the towers; default: %(default)s")
    parser.add_argument(
        "--depth", type=int, default=3, help="blocks of the towers, of which the last is not run; default: %(default)s"
    )
    parser.add_argument("--hidden", type=int, default=256, help="width of the language model; default: %(default)s")
    parser.add_argument("--layers", type=int, default=3, help="layers of the language model; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights; default: %(default)s")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    texts = CATALOGUE["tasks"].values()
    tokenizer = make_tokenizer([text for task in texts for text in (task["instruction"], *task["seen"])])
    image_processor = openvla.OpenVLAImageProcessor(
        use_fused_vision_backbone=True, image_resize_strategy="resize-naive", input_sizes=[[3, 224, 224]] * 2,
        means=[[0.485, 0.456, 0.406], [0.5] * 3], stds=[[0.229, 0.224, 0.225], [0.5] * 3],
    )  # fmt: skip
    model = openvla.OpenVLAForActionPrediction(make_config(tokenizer, arguments))
    model.to(torch.bfloat16).save_pretrained(arguments.output)  # what learns is float32, what is kept is not
    openvla.OpenVLAProcessor(image_processor, tokenizer).save_pretrained(arguments.output)
    prompt = openvla.PROMPT_TEMPLATES["openvla"].format(instruction="open the drawer")
    length = len(tokenizer(prompt).input_ids)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {length} tokens of text before an action")


if __name__ == "__main__":
    main()
