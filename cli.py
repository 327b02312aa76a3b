"""The command line: one thin function per verb. What a verb needs is imported when it runs."""

import errno
import importlib.metadata
import inspect
import json
import os
import platform
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from .evaluation.options import RecordOptions
from .extras import ignore_library_warnings, remedy
from .options import respelled
from .training.options import FinetuneOptions


USER_ERRORS = (ValueError, KeyError, OSError)  # FileNotFoundError and a model that is not there are OSErrors
FAILED, REFUSED = 1, 2  # exit codes; an exception may bring its own as `exit_code`
EXTRAS = {"finetune": "train", "merge": "train", "record": "sim", "evaluate": "sim", "demo": "sim"}  # all a verb needs
HELP = {item.name: item.metadata["help"] for item in (*fields(RecordOptions), *fields(FinetuneOptions))}
EMBEDDED_POLICY = str(Path(__file__).parent)
KEYWORD = inspect.Parameter.KEYWORD_ONLY


WAYS_OUT = {  # of errors of the operating system that say no more than what happened
    errno.ENOSPC: "make room, or give a place on another disk",
    errno.EDQUOT: "make room, or give a place on another disk",
    errno.EACCES: "give another place, or change its permissions",
    errno.EPERM: "give another place, or change its permissions",
    errno.EROFS: "give another place",
    errno.ENOTDIR: "a part of that path is a file, give another place",
    errno.EISDIR: "that is a folder, give a file",
    errno.ENAMETOOLONG: "give a shorter name",
}


def reason(error: BaseException) -> str:
    """What a user error says; of one that comes bare from the operating system also the file, and a way out."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        where = f"'{os.fsdecode(error.filename)}': " if error.filename is not None else ""
        way_out = WAYS_OUT.get(error.errno or 0)
        return f"{where}{error.strerror}{f': {way_out}' if way_out else ''}."
    return str(error)


def options_in(verb: Any) -> dict[str, str]:
    """{name in Python: option of the command line} of a verb; empty without one."""
    parameters = verb.params if verb is not None else []
    return {item.name: item.opts[0] for item in parameters if item.param_type_name == "option"}


class Group(TyperGroup):
    """Verbs whose user errors, and libraries that an extra would bring, are one line on stderr and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone, which click handles
        except USER_ERRORS as error:
            if ctx.params.get("traceback"):
                raise
            names = options_in(self.get_command(ctx, ctx.invoked_subcommand or ""))
            typer.echo(f"error: {respelled(' '.join(reason(error).split()), names)}", err=True)
            raise typer.Exit(getattr(error, "exit_code", REFUSED)) from error
        except ModuleNotFoundError as error:
            verb = ctx.invoked_subcommand
            missing = remedy(error.name, EXTRAS.get(verb or ""))
            if missing is None or ctx.params.get("traceback"):
                raise  # no extra brings it: a fault of the installation, or of this package
            typer.echo(f"error: openvla {verb} needs {missing}", err=True)
            raise typer.Exit(REFUSED) from error


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def show_versions(asked: bool) -> None:
    if asked:
        from . import __version__

        libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "timm", "torch"))
        typer.echo(f"openvla {__version__} ({', '.join(libraries)}, Python {platform.python_version()})")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_versions, is_eager=True, help="Show the versions and stop."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from; before the verb.")
    ] = False,
) -> None:
    """OpenVLA: an image and an instruction go in, a robot action comes out.

    Options of a verb: openvla VERB --help.

    Exit codes: 0 done; 1 the work failed (every episode broke, training diverged, or a bug, with its traceback); 2
    refused (a wrong option or file, a missing extra: one line says which and the way out); 3 no OpenGL to render with.
    """


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class SavedDtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def torch_device(choice: Device) -> str:
    """What torch calls the device; a `ValueError` where there is no GPU to choose."""
    import torch

    available = torch.cuda.is_available()
    if choice is Device.cuda and not available:
        raise ValueError("--device cuda: torch finds no GPU it can use here; --device cpu works everywhere.")
    return choice.value if choice is not Device.auto else "cuda" if available else "cpu"


def options_of(options: type, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb, whose first argument is a dataclass of options, one option for each field; their help texts are the
    fields' metadata, so that they are written once. `defaults` are those of the command line alone."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = []
        for item in fields(options):
            default = defaults.get(item.name, item.default)
            shown = "the policy that comes with the package" if default is EMBEDDED_POLICY else default is not None
            kind: Any = item.type
            annotation = Annotated[kind, typer.Option(help=item.metadata["help"], show_default=shown)]
            default = inspect.Parameter.empty if default is MISSING else default
            parameters.append(inspect.Parameter(item.name, KEYWORD, default=default, annotation=annotation))
        parameters += list(inspect.signature(function).parameters.values())[1:]

        def verb(**given: Any) -> None:
            own = {item.name: given.pop(item.name) for item in fields(options)}
            function(options(**own), **given)

        verb.__name__, verb.__doc__ = function.__name__, function.__doc__
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return verb

    return decorate


# Options that several verbs have, and texts of those that finetune has as well.
Model = Annotated[
    str,
    typer.Option(
        help="Model: a folder, or a Hub id such as openvla/openvla-7b.",
        show_default="the policy that comes with the package",
    ),
]
UnnormKey = Annotated[
    str | None,
    typer.Option(
        help="Dataset in whose units the action is, such as bridge_orig.",
        show_default="the model's, if it has only one",
    ),
]
RunsOn = Annotated[Device, typer.Option(help="Where the model runs; auto: the GPU where there is one, else the CPU.")]
WeightType = Annotated[Dtype, typer.Option(help="Type of the weights in memory; auto: as they are stored.")]
Simulator = Annotated[
    str,
    typer.Option(help="Simulator: metaworld, robosuite, libero_spatial, libero_object, libero_goal or libero_10."),
]
Tasks = Annotated[str, typer.Option(help=HELP["tasks"])]
SimulatedCamera = Annotated[
    str | None,
    typer.Option(
        help="Camera of the simulator: the one that the model's demonstrations had.",
        show_default="the simulator's; metaworld: corner4",
    ),
]
MaxSteps = Annotated[
    int | None,
    typer.Option(help="Steps after which an episode has failed.", show_default="the simulator's; metaworld: 125"),
]
Environments = Annotated[
    int | None, typer.Option(help="Environments that run side by side.", show_default="one for each core, at most 8")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace model files in OUT; other files stay.")]


@app.command()
def predict(
    image: Annotated[Path, typer.Option(help="Camera frame of any size: PNG, JPEG or another format that PIL reads.")],
    instruction: Annotated[str, typer.Option(help="What the robot shall do, for example 'open the drawer'.")],
    model: Model = EMBEDDED_POLICY,
    unnorm_key: UnnormKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: RunsOn = Device.auto,
    dtype: WeightType = Dtype.auto,
) -> None:
    """Predict the action for one image.

    Prints x, y, z (translation), roll, pitch, yaw (rotation) and gripper (1 open, 0 closed), with the probability of
    each. Units are those of the dataset, per step: metres and radians in most Open-X datasets.

    \b
    openvla predict --image frame.png --instruction "open the drawer"
    openvla predict --image frame.png --instruction "pick up the cup" \\
        --model openvla/openvla-7b --unnorm-key bridge_orig
    """
    from .action_text import action_lines, action_record
    from .action_tokenizer import resolve_unnorm_key
    from .hub import model_folder
    from .modeling_openvla import OpenVLAForActionPrediction
    from .pixels_openvla import load_image

    picture = load_image(image)  # before the weights are read: a wrong path is answered at once
    where = torch_device(device)
    policy = OpenVLAForActionPrediction.from_pretrained(model_folder(model), dtype=dtype.value).to(where).eval()
    prediction = policy.predict_action(picture, instruction, unnorm_key=unnorm_key, return_dict=True)
    record = action_record(
        prediction,
        unnorm_key=resolve_unnorm_key(policy.norm_stats, unnorm_key),
        instruction=instruction,
        image=str(image),
        model=model,
    )
    typer.echo(json.dumps(record) if as_json else action_lines(record))


@app.command()
def stats(
    dataset: Annotated[str, typer.Argument(help="Folder or file (RLDS, LeRobot, HDF5), or a mixture (see finetune).")],
    data_root: Annotated[Path | None, typer.Option(help=HELP["data_root"])] = None,
    split: Annotated[
        str, typer.Option(help="train: all splits together, as in training; or one split alone.")
    ] = "train",
    name: Annotated[
        str | None,
        typer.Option(help="Name that --output gives the dataset: the model's unnorm_key.", show_default="its own"),
    ] = None,
    gripper: Annotated[str, typer.Option(help=HELP["gripper"])] = "open-is-1",
    gripper_dims: Annotated[str | None, typer.Option(help=HELP["gripper_dims"])] = None,
    mask: Annotated[str | None, typer.Option(help=HELP["mask"])] = None,
    standardize: Annotated[str, typer.Option(help=HELP["standardize"])] = "auto",
    filters: Annotated[str, typer.Option(help=HELP["filters"])] = "",
    cameras: Annotated[str | None, typer.Option(help=HELP["cameras"])] = None,
    action_key: Annotated[str | None, typer.Option(help=HELP["action_key"])] = None,
    state_key: Annotated[str | None, typer.Option(help=HELP["state_key"])] = None,
    language_key: Annotated[str | None, typer.Option(help=HELP["language_key"])] = None,
    rotate_images: Annotated[bool | None, typer.Option(help=HELP["rotate_images"])] = None,
    tolerance_s: Annotated[float | None, typer.Option(help=HELP["tolerance_s"])] = None,
    on_error: Annotated[Literal["raise", "skip"], typer.Option(help=HELP["on_error"])] = "raise",
    output: Annotated[Path | None, typer.Option(help="File to write them to, such as dataset_statistics.json.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File to draw the histograms in, such as actions.png.")] = None,
) -> None:
    """Show the action statistics of a dataset.

    They give the model's actions their units: q01 and q99 become -1 and 1. They are those of all splits together, and
    are kept for the next start.

    \b
    openvla stats path/to/my_dataset --plot actions.png
    openvla stats path/to/my_dataset --output dataset_statistics.json --name my_robot
    """
    from .data.checks import check_data
    from .data.recording import given_reader_options
    from .data.sources import open_sources
    from .data.statistics import check_plot, plot_statistics, statistics_table
    from .folders import locked_file, write_json

    reader = {
        "cameras": cameras,
        "action_key": action_key,
        "state_key": state_key,
        "language_key": language_key,
        "rotate_images": rotate_images,
        "tolerance_s": tolerance_s,
    }
    with locked_file(output) if output is not None else nullcontext():  # before the work, which may take long
        if output is not None and output.exists():
            check_statistics_file(output)
        if plot is not None:
            check_plot(plot)
        sources = open_sources(
            dataset,
            data_root=data_root,
            split=split,
            name=name,
            gripper=gripper,
            gripper_dims=gripper_dims,
            mask=mask,
            standardize=standardize,
            filters=filters,
            keep_unlabeled=True,
            on_error=on_error,
            progress=True,
            **given_reader_options(reader),
        )
        for source in sources:
            typer.echo(f"{source.report()}\n{statistics_table(source.statistics, source.names)}")
            for warning in check_data(source):
                typer.echo(f"warning   {warning}")
            if plot is not None:
                path = plot if len(sources) == 1 else plot.with_stem(f"{plot.stem}_{source.name}")
                plot_statistics(source.actions(), source.statistics, path, source.names)
                typer.echo(f"wrote {path}")
        if output is not None:
            write_json(output, {source.name: source.statistics for source in sources})
            typer.echo(f"wrote {output}")


def check_statistics_file(file: Path) -> None:
    """Raise a `FileExistsError` if a file that is to be replaced holds no statistics."""
    from .action_tokenizer import read_statistics

    try:
        read_statistics(file)
    except (ValueError, KeyError) as error:
        raise FileExistsError(f"'{file}' holds no statistics and would be replaced: give another file.") from error


@app.command()
@options_of(FinetuneOptions, model=EMBEDDED_POLICY)
def finetune(
    options: FinetuneOptions,
    *,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the last checkpoint in OUTPUT, or begin where there is none. Options, data and weights "
            "have to be the same. A finished run only writes its result again.",
        ),
    ] = False,
    merge: Annotated[
        Path | None,
        typer.Option(help="Folder to write the adapter added to its base to, at the end (lora, qlora); see merge."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (samples, parameters, memory, warnings) and stop.")
    ] = False,
) -> None:
    """Fine-tune on your own demonstrations.

    Writes weights (an adapter for lora and qlora, see merge), processor, statistics and model card to OUTPUT, and
    checkpoints to OUTPUT/checkpoints. On several GPUs: torchrun --nproc-per-node 8 -m openvla.cli finetune ...

    Exits with 2 where options, data or folders are wrong, with 1 where the loss or the gradient is not finite: the last
    good checkpoint stays. A run that was stopped, also by Ctrl-C or SIGTERM, continues with --resume.

    \b
    openvla finetune --model openvla/openvla-7b --dataset my_robot/ --output runs/my_robot --dry-run
    openvla finetune --model openvla/openvla-7b --dataset my_robot/ --output runs/my_robot --merge my-openvla
    openvla finetune --model openvla/openvla-7b --dataset bridge_orig:1.0,my_robot:2.0 --data-root /data \\
        --output runs/mixture --strategy full
    """
    from .hub import model_folder
    from .training import finetune as run
    from .training import merge_adapter, plan_run
    from .training.checkpoints import check_merged

    if merge is not None and options.strategy not in ("lora", "qlora"):
        raise ValueError(f"--merge: strategy '{options.strategy}' has no adapter to merge.")
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that a launcher has started
    model_folder(options.model)
    if merge is not None:
        check_merged(merge)
        if merge.expanduser().resolve() == Path(options.output).expanduser().resolve():
            raise ValueError(f"--merge '{merge}' is the output of the run: give another folder.")
    if dry_run:
        if first:
            typer.echo(plan_run(options, int(os.environ.get("WORLD_SIZE", "1")), resume))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run says how it goes on
    output = run(options, resume=resume)
    if first:
        typer.echo(f"wrote {output}")
        if merge is not None:
            report_merge(merge_adapter(output, merge), merge)


def report_merge(difference: float, out: Path) -> None:
    typer.echo(f"wrote {out}; largest difference of the logits, relative to the largest logit: {difference:.1e}")


@app.command()
@options_of(RecordOptions)
def record(options: RecordOptions) -> None:
    """Record demonstrations of a simulator's scripted experts.

    Successful episodes only, as a dataset that finetune takes. A recording that was stopped continues when the same
    command is given again.

    \b
    openvla record --env metaworld --tasks mt10 --episodes 100 --output data/mt10 --workers 8
    openvla record --tasks drawer-open-v3 --episodes 100 --seed 100 --noise 0.3 --paraphrases --output data/recovery
    """
    from .evaluation.record import record as run

    for task, counts in run(options)["tasks"].items():
        typer.echo(
            f"{task}: {counts['episodes']} episodes, {counts['steps']:g} steps on average, "
            f"{counts['failed_attempts']} failed attempts"
        )
    typer.echo(f"wrote {options.output}")


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="OUTPUT of finetune with lora or qlora.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the written weights; auto: as the base is stored.")
    ] = Dtype.auto,
    base: Annotated[
        str | None,
        typer.Option(help="Base of the adapter: a folder or a Hub id.", show_default="where it was in training"),
    ] = None,
) -> None:
    """Add an adapter to its base: one plain checkpoint.

    Prints how far the merged model is from the one with the adapter.

    \b
    openvla merge runs/my_robot my-openvla
    openvla merge runs/my_robot my-openvla --base openvla/openvla-7b
    """
    from .training import merge_adapter

    report_merge(merge_adapter(run, out, dtype=dtype.value, base=base), out)


class PolicyName(StrEnum):
    model = "model"
    expert = "expert"
    random = "random"
    mean = "mean"


class Control(StrEnum):
    blocking = "blocking"
    realtime = "realtime"


class Quantization(StrEnum):
    int8 = "int8"
    int4 = "int4"


@app.command()
def evaluate(
    output: Annotated[Path, typer.Option(help="Folder for episodes, report and videos.")],
    model: Model = EMBEDDED_POLICY,
    env: Simulator = "metaworld",
    tasks: Tasks = "mt10",
    episodes: Annotated[int, typer.Option(help="Episodes of each task.")] = 50,
    policy: Annotated[
        PolicyName,
        typer.Option(help="What acts: the model; to compare, the scripted expert, random actions or the mean action."),
    ] = (PolicyName.model),
    control: Annotated[
        Control,
        typer.Option(help="What the world does while the model thinks: blocking, it waits; realtime, it goes on."),
    ] = (Control.blocking),
    hz: Annotated[
        float | None,
        typer.Option(help="Steps of the world in a second (realtime).", show_default="the simulator's; metaworld: 20"),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Seconds that a prediction takes (realtime).", show_default="measured")
    ] = None,
    axis: Annotated[
        str,
        typer.Option(
            help="What differs from the recorded episodes, joined by commas: visual, motion, physical, semantic, "
            "language (each episode draws one kind), one kind such as visual:light, all for the five of them, none for "
            "nothing. Each is run for the tasks that have it, and has a row in the report."
        ),
    ] = "none",
    camera: SimulatedCamera = None,
    max_steps: MaxSteps = None,
    unnorm_key: UnnormKey = None,
    center_crop: Annotated[
        bool | None,
        typer.Option(
            help="Show the model the middle nine tenths of the image, as it needs after training with random crops.",
            show_default="as it was trained",
        ),
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Load the language model with fewer bits (bitsandbytes).")
    ] = None,
    device: RunsOn = Device.auto,
    dtype: WeightType = Dtype.auto,
    workers: Environments = None,
    videos: Annotated[int, typer.Option(help="Episodes of each task to film.")] = 1,
) -> None:
    """Measure success in the closed loop.

    Runs every task from seeds that recording never uses, and writes report.md, report.json, a plot and films. A run
    that was stopped continues when the same command is given again, and repeats episodes that broke. Other weights
    need another folder. Exits with 1 where every episode broke, with 3 where there is no OpenGL to render with.

    \b
    openvla evaluate --tasks mt10 --episodes 50 --output runs/blocking
    openvla evaluate --tasks mt10 --episodes 50 --output runs/late --control realtime --hz 5 --latency 0.8
    openvla evaluate --tasks mt10 --episodes 50 --output runs/expert --policy expert
    openvla evaluate --tasks mt10 --episodes 20 --output runs/axes --axis none,all
    """
    from .evaluation.evaluate import evaluate as run

    of_environment: dict[str, Any] = {"camera": camera} if camera else {}
    variations = [name.strip() for name in axis.split(",") if name.strip()] or ["none"]
    summary = run(
        model=model,
        output=output,
        env=env,
        tasks=tasks,
        episodes=episodes,
        policy=policy.value,
        control=control.value,
        hz=hz,
        latency=latency,
        variations=variations,
        max_steps=max_steps,
        unnorm_key=unnorm_key,
        center_crop=center_crop,
        quantization=quantization.value if quantization else None,
        device=torch_device(device),
        dtype=dtype.value,
        workers=workers,
        videos=videos,
        **of_environment,
    )
    rate, broken = summary["mean_success"], summary["errors"]
    typer.echo(f"wrote {output}; mean success {'unknown' if rate is None else f'{rate:.1%}'}")
    if broken:
        begun, reason = summary["episodes"] + broken, next(iter(summary["reasons"]))
        said = f"error: all {broken}" if broken == begun else f"warning: {broken} of {begun}"
        typer.echo(f"{said} episodes broke, mostly: {reason}. The same command runs them again.", err=True)
    if not summary["episodes"]:
        raise typer.Exit(FAILED)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the films.")] = Path("outputs/demo"),
    model: Model = EMBEDDED_POLICY,
    env: Simulator = "metaworld",
    tasks: Tasks = "mt10",
    camera: SimulatedCamera = None,
    max_steps: MaxSteps = None,
    unnorm_key: UnnormKey = None,
    device: RunsOn = Device.auto,
    workers: Environments = None,
) -> None:
    """Watch the policy at work.

    Runs one episode of each task in the simulator, without a screen, and writes a film of each, and demo.gif, which
    shows all of them. One episode says little: evaluate measures. Exits with 3 where there is no OpenGL to render with.

    \b
    openvla demo
    openvla demo --tasks drawer-open-v3,push-v3 --model runs/my_policy --output outputs/my_policy
    """
    from .evaluation.demo import GIF
    from .evaluation.demo import demo as run

    of_environment: dict[str, Any] = {"camera": camera} if camera else {}
    records = run(
        model=model,
        output=output,
        env=env,
        tasks=tasks,
        max_steps=max_steps,
        unnorm_key=unnorm_key,
        device=torch_device(device),
        workers=workers,
        **of_environment,
    )
    for record in records:
        outcome = f"broke: {record.error}" if record.error else "success" if record.success else "failure"
        typer.echo(f"{record.task}: {outcome}, {record.steps} steps ({record.instruction})")
    succeeded = sum(record.success for record in records)
    typer.echo(f"{succeeded} of {len(records)} succeeded; wrote {output / GIF} and a film of each task")


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .pt of the original's training code, or the folder of its run.")
    ],
    out: Annotated[Path, typer.Argument(help="Hub folder to write.")],
    vision_backbone_id: Annotated[
        str | None, typer.Option(help="Vision backbone, for example dinosiglip-vit-so-224px.")
    ] = None,
    llm_backbone_id: Annotated[str | None, typer.Option(help="Language model, for example llama2-7b-pure.")] = None,
    image_resize_strategy: Annotated[
        str | None, typer.Option(help="How images were resized: resize-naive, resize-crop or letterbox.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id that has the tokenizer.json.", show_default="the language model's"),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="File with the action statistics.", show_default="dataset_statistics.json of the run"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What supplies parts that were frozen and so are not in CHECKPOINT: a checkpoint, run, Hub folder or "
            "id, or 'timm'."
        ),
    ] = None,
    dtype: Annotated[SavedDtype, typer.Option(help="Type of the written weights.")] = SavedDtype.bfloat16,
    max_shard_size: Annotated[
        str, typer.Option(help="Size of the largest weight file, and of the memory that is needed.")
    ] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Turn an original checkpoint into a Hub folder.

    The original's training code writes .pt files of its own layout. Backbone ids come from the run's config.json where
    it has them.

    \b
    openvla convert runs/prism-dinosiglip-224px+mx-bridge+n1+b32+x7 my-openvla
    openvla convert step-010000.pt my-openvla --vision-backbone-id siglip-vit-so400m --llm-backbone-id vicuna-v15-7b \\
        --image-resize-strategy letterbox --tokenizer openvla/openvla-v01-7b --statistics dataset_statistics.json
    """
    from .conversion import convert_prismatic_checkpoint

    folder = convert_prismatic_checkpoint(
        checkpoint,
        out,
        vision_backbone_id=vision_backbone_id,
        llm_backbone_id=llm_backbone_id,
        image_resize_strategy=image_resize_strategy,
        tokenizer=tokenizer,
        statistics=statistics,
        base=base,
        dtype=dtype.value,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    typer.echo(f"wrote {folder}")


@app.command()
def export(
    weights: Annotated[str, typer.Argument(help="Model to export: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Run folder to write.")],
    dtype: Annotated[
        SavedDtype | None,
        typer.Option(help="Type of the written weights; the original trains from float32.", show_default="as stored"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a Hub folder into an original run.

    The way back from convert, for the original's training code. The whole model is in memory once (15 GB for 7B in
    bfloat16).

    \b
    openvla export openvla/openvla-7b runs/openvla-7b --dtype float32
    """
    from .conversion import export_prismatic_checkpoint

    run = export_prismatic_checkpoint(weights, out, dtype=dtype.value if dtype else None, overwrite=overwrite)
    typer.echo(f"wrote {run}")


@app.command()
def package(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    weights: Annotated[str, typer.Option(help="Model to package: a folder or a Hub id with safetensors weights.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, where --weights is a Hub id.", show_default="main")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the model card calls the model.", show_default="the name of OUT")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a self-contained Hub folder.

    Weights stay as they are; code, processor, statistics and a model card stand beside them. The folder loads with
    AutoModel.from_pretrained(OUT, trust_remote_code=True) where this package is not installed.

    \b
    openvla package my-hub-folder --weights openvla/openvla-7b
    openvla package my-hub-folder --weights runs/merged --name me/my-robot
    """
    from .conversion import package_checkpoint

    typer.echo(f"wrote {package_checkpoint(weights, out, revision=revision, name=name, overwrite=overwrite)}")


def main() -> None:
    """Entry point of the console script. There, a warning is one line, and names options as they are given there."""
    group = typer.main.get_command(app)
    verbs = getattr(group, "commands", {}).values()
    names = {name: option for verb in verbs for name, option in options_in(verb).items()}

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        typer.echo(f"warning: {respelled(' '.join(str(message).split()), names)}", err=True)

    setattr(warnings, "showwarning", show)  # noqa: B010 - mypy does not take it otherwise
    ignore_library_warnings()
    group(prog_name="openvla")


if __name__ == "__main__":
    main()
