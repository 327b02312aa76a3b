"""The verbs that make a folder of a model out of another one; part of `cli`."""

from pathlib import Path

import typer

from .cli_options import Verb, options_of
from .options.conversion import ConvertOptions, ExportOptions, PackageOptions, QuantizeOptions
from .options.training import MergeOptions


verbs = typer.Typer()


def report_merge(difference: float, out: Path) -> None:
    typer.echo(f"wrote {out}; largest difference of the logits, relative to the largest logit: {difference:.1e}")


@verbs.command(cls=Verb)
@options_of(MergeOptions)
def merge(options: MergeOptions) -> None:
    """Add an adapter to its base: one plain checkpoint.

    Prints how far the merged model is from the one with the adapter.

    \b
    openvla merge runs/my_robot my-openvla
    openvla merge runs/my_robot my-openvla --base openvla/openvla-7b
    """
    from .training import merge_adapter

    report_merge(merge_adapter(options.run, options.out, dtype=options.dtype, base=options.base), options.out)


@verbs.command(cls=Verb)
@options_of(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """Turn an original checkpoint into a Hub folder.

    The original's training code writes .pt files of its own layout. Backbone ids come from the run's config.json where
    it has them. OpenVLA-OFT writes heads and projectors beside the weights: they become one model.

    \b
    openvla convert runs/prism-dinosiglip-224px+mx-bridge+n1+b32+x7 my-openvla
    openvla convert step-010000.pt my-openvla --vision-backbone-id siglip-vit-so400m --llm-backbone-id vicuna-v15-7b \\
        --image-resize-strategy letterbox --tokenizer openvla/openvla-v01-7b --statistics dataset_statistics.json
    openvla convert path/to/openvla-oft-checkpoint my-openvla
    """
    from .conversion import convert

    typer.echo(f"wrote {convert(options)}")


@verbs.command(cls=Verb)
@options_of(ExportOptions)
def export(options: ExportOptions) -> None:
    """Turn a Hub folder into an original run, or ONNX graphs.

    prismatic: the way back from convert, for the original's training code. onnx: what openvla-runtime acts with where
    there is no torch (robot, Mac, edge box); models whose actions are tokens. The complete model is in memory once (15
    GB for 7B in 16 bits).

    \b
    openvla export openvla/openvla-7b runs/openvla-7b --dtype float32
    openvla export runs/merged my-robot-onnx --to onnx
    """
    from .conversion import export_onnx, export_prismatic_checkpoint

    write = {"prismatic": export_prismatic_checkpoint, "onnx": export_onnx}[options.to]
    typer.echo(f"wrote {write(options.weights, options.out, **options.without('weights', 'out', 'to'))}")


@verbs.command(cls=Verb)
@options_of(PackageOptions)
def package(options: PackageOptions) -> None:
    """Write a self-contained Hub folder.

    Weights stay as they are; code, processor, statistics and a model card stand beside them. The folder loads with
    AutoModel.from_pretrained(OUT, trust_remote_code=True) where this package is not installed.

    \b
    openvla package my-hub-folder --weights openvla/openvla-7b
    openvla package my-hub-folder --weights runs/merged --name me/my-robot
    """
    from .conversion import package_checkpoint

    given = options.without("weights", "out")
    typer.echo(f"wrote {package_checkpoint(options.weights, options.out, **given)}")


@verbs.command(cls=Verb)
@options_of(QuantizeOptions)
def quantize(options: QuantizeOptions) -> None:
    """Write a folder with weights of 8 or 4 bits, or in fp8.

    It loads as every other folder does, also where this package is not installed. Layers of the language model are
    quantized; towers, projector, heads and output layer stay as they are. Measure what it costs: evaluate --model OUT.

    \b
    openvla quantize openvla/openvla-7b openvla-7b-int8 --dtype bfloat16
    openvla quantize runs/merged my-robot-int4 --bits 4
    """
    from .conversion import quantize_checkpoint

    given = options.without("model", "out")
    typer.echo(f"wrote {quantize_checkpoint(options.model, options.out, **given)}")
