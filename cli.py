"""The command line: one thin function per verb. What a verb needs is imported when it runs."""

import importlib.metadata
import json
import os
import platform
import signal
import sys
from typing import Annotated

import typer

from .cli_errors import FAILED, Group, continued, show_warnings_as_lines
from .cli_folders import report_merge
from .cli_folders import verbs as folder_verbs
from .cli_options import Verb, options_of
from .options.benchmark import BenchOptions
from .options.datasets import StatsOptions
from .options.evaluation import DemoOptions, EvaluateOptions, RecordOptions
from .options.prediction import PredictOptions
from .options.serving import ServeOptions
from .options.training import FinetuneVerb


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},  # of all verbs
)


def show_versions(asked: bool) -> None:
    if asked:
        libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "timm", "torch"))
        version, python = importlib.metadata.version("openvla"), platform.python_version()
        typer.echo(f"openvla {version} ({', '.join(libraries)}, Python {python})")
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
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module of your own first: one that puts a head into HEADS, for example; before the verb.",
        ),
    ] = None,
) -> None:
    """OpenVLA: an image and an instruction go in, a robot action comes out.

    Options of a verb: openvla VERB --help.

    Exit codes: 0 done; 1 the work failed (every episode broke, training diverged, or a bug, with its traceback); 2
    refused (a wrong option or file, a missing extra: one line says which and the way out); 3 no OpenGL to render with;
    130 stopped by Ctrl-C.
    """


@app.command(cls=Verb)
@options_of(PredictOptions)
def predict(options: PredictOptions) -> None:
    """Predict the action for what the robot sees.

    Prints x, y, z (translation), roll, pitch, yaw (rotation) and gripper (1 open, 0 closed), with the probability of
    each. Units are those of the dataset, per step: metres and radians in most Open-X datasets.

    \b
    openvla predict --image frame.png --instruction "open the drawer"
    openvla predict --image frame.png --instruction "pick up the cup" \\
        --model openvla/openvla-7b --unnorm-key bridge_orig
    openvla predict --model runs/two-cameras --instruction "lift the lid" \\
        --image primary=scene.png --image wrist=hand.png --state 0.1,0.2,-0.3,0,0,0,0,1
    """
    from .action_spec import action_lines
    from .prediction import predict as run

    record = run(options)
    typer.echo(json.dumps(record) if options.as_json else action_lines(record))


@app.command(cls=Verb)
@options_of(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Answer robots over the network.

    Speaks openpi's WebSocket form (at / and /v1/realtime/robot/openpi) and POST /act as clients of OpenVLA and
    OpenVLA-OFT do; GET /healthz, /readyz, /metrics, /info, /openapi.json. Names of cameras that these clients use are
    understood; what could mean two things is refused. In a browser, the page at / shows what the model does with a
    picture, which robots ask, and with --sim an episode in simulation.

    Listens at loopback. Any other address needs a key, which clients send as "Authorization: Bearer KEY"; TLS is a
    proxy's part. Ctrl-C and SIGTERM let it answer what is in flight. Exits with 1 where the model cannot be warmed up.

    \b
    openvla serve --port 8000
    openvla serve --sim
    curl -s http://127.0.0.1:8000/act -F primary=@frame.png -F instruction='open the drawer'
    openvla serve --model openvla/openvla-7b --dtype bfloat16 --device cuda --unnorm-key bridge_orig
    OPENVLA_API_KEY=$(openssl rand -hex 32) openvla serve --model runs/my_robot --host 0.0.0.0 --map cam/front=primary
    openvla serve --model runs/my_robot --ray --replicas 2 --max-replicas 8
    """
    if options.ray:
        from .serving.ray import serve_with_ray

        if not serve_with_ray(options, typer.echo):
            raise typer.Exit(FAILED)
        return
    from .serving.server import leave
    from .serving.server import serve as run

    simulator = None
    if options.sim:
        from .evaluation.served import served
        from .serving.episodes import Simulator

        simulator = Simulator(**served())
    code = 0 if run(options, typer.echo, simulator=simulator) else FAILED
    leave(code)
    raise typer.Exit(code)


@app.command(cls=Verb)
@options_of(StatsOptions)
def stats(options: StatsOptions) -> None:
    """Show the action statistics of a dataset.

    They give the model's actions their units: q01 and q99 become -1 and 1. They are those of all splits together, and
    are kept for the next start.

    \b
    openvla stats path/to/my_dataset --plot actions.png
    openvla stats path/to/my_dataset --output dataset_statistics.json --name my_robot
    """
    from .data.report import report_statistics

    for text in report_statistics(options):
        typer.echo(text)


@app.command(cls=Verb)
@options_of(FinetuneVerb)
def finetune(options: FinetuneVerb) -> None:
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

    merge = options.merge
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that a launcher has started
    model_folder(options.model)
    if merge is not None:
        check_merged(merge)
    if options.dry_run:
        if first:
            typer.echo(plan_run(options.run, int(os.environ.get("WORLD_SIZE", "1")), options.resume))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run says how it is continued
    output = run(options.run, resume=options.resume)
    if first:
        typer.echo(f"wrote {output}")
        if merge is not None:
            report_merge(merge_adapter(output, merge), merge)


@app.command(cls=Verb)
@options_of(RecordOptions)
def record(options: RecordOptions) -> None:
    """Record demonstrations of a simulator's scripted experts.

    Successful episodes only, as a dataset that finetune takes. A recording that was stopped continues when the same
    command is given again.

    \b
    openvla record --env metaworld --tasks mt10 --episodes 100 --output data/mt10 --workers 8
    openvla record --tasks drawer-open-v3 --episodes 100 --seed 100 --noise 0.3 --paraphrases --output data/recovery
    """
    from .data.statistics import counted
    from .evaluation.record import record as run

    with continued():
        recorded = run(options)["tasks"]
    for task, counts in recorded.items():
        episodes, failed = counted(counts["episodes"], "episode"), counted(counts["failed_attempts"], "failed attempt")
        typer.echo(f"{task}: {episodes}, {counts['steps']:g} steps on average, {failed}")
    typer.echo(f"wrote {options.output}")


@app.command(cls=Verb)
@options_of(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure success in the closed loop.

    Runs every task from seeds that recording never uses, and writes report.md, report.json, a plot and videos. A run
    that was stopped continues when the same command is given again, and repeats episodes that broke. Other weights
    need another folder. Exits with 1 where every episode broke, with 3 where there is no OpenGL to render with.

    \b
    openvla evaluate --tasks mt10 --episodes 50 --output runs/blocking
    openvla evaluate --tasks mt10 --episodes 50 --output runs/late --control realtime --hz 5 --latency 0.8
    openvla evaluate --tasks mt10 --episodes 50 --output runs/expert --policy expert
    openvla evaluate --tasks mt10 --episodes 20 --output runs/axes --axis none,all
    """
    from .evaluation.evaluate import evaluate as run

    with continued():
        summary = run(options)
    rate, broken = summary["mean_success"], summary["errors"]
    typer.echo(f"wrote {options.output}; mean success {'unknown' if rate is None else f'{rate:.1%}'}")
    if broken:
        begun, reason = summary["episodes"] + broken, next(iter(summary["reasons"])).rstrip(".")
        said = f"error: all {broken}" if broken == begun else f"warning: {broken} of {begun}"
        typer.echo(f"{said} episodes broke, mostly: {reason}. The same command runs them again.", err=True)
    if not summary["episodes"]:
        raise typer.Exit(FAILED)


@app.command(cls=Verb)
@options_of(BenchOptions)
def bench(options: BenchOptions) -> None:
    """Measure time, memory and exactness of predictions.

    latency: one action from raw image to units, by stage, against the limit of the hardware (measured in the same run)
    and against plain decoding, drafts, an ONNX export, other environments; all in turns, no two images equal.
    exact: the share of actions and tokens that are those of plain decoding, and the largest gap where one differs.

    \b
    openvla bench latency --threads 1 --output latency.json
    openvla bench latency --preset openvla-7b --device cuda --field action_head=l1_regression --field action_chunk=8
    openvla bench latency --model my-folder --against before=old-env/bin/python --onnx my-folder-onnx
    openvla bench latency --model my-folder --against old=env/bin/python --original-code clone/prismatic/extern/hf
    openvla bench throughput --batch-sizes 1,8,16
    openvla bench load --model openvla/openvla-7b --quantization int4
    openvla bench memory --frames 1000
    openvla bench exact --dataset data/mt10 --frames 200 --threads 1
    """
    from .bench import bench as run

    typer.echo(run(options)[1])


@app.command(cls=Verb)
@options_of(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Watch the policy at work.

    Runs one episode of each task in the simulator, without a screen, and writes a video of each, and demo.gif, which
    shows all of them. One episode says little: evaluate measures. Exits with 3 where there is no OpenGL to render with.

    \b
    openvla demo
    openvla demo --tasks drawer-open-v3,push-v3 --model runs/my_policy --output outputs/my_policy
    """
    from .evaluation.demo import GIF
    from .evaluation.demo import demo as run

    records = run(options)
    for record in records:
        outcome = f"broke: {record.error}" if record.error else "success" if record.success else "failure"
        typer.echo(f"{record.task}: {outcome}, {record.steps} steps ({record.instruction})")
    succeeded = sum(record.success for record in records)
    typer.echo(f"{succeeded} of {len(records)} succeeded; wrote {options.output / GIF} and a video of each task")


app.add_typer(folder_verbs)


def open_streams() -> None:
    """Where a daemon begins without them: a file or a socket that is opened then has the number of one, and what a
    library says, or a process that is started, goes into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # which has the lowest number that is free
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, "w" if number else "r"))


def main() -> None:
    """Entry point of the console script."""
    open_streams()
    group = typer.main.get_command(app)
    show_warnings_as_lines(group)
    group(prog_name="openvla")


if __name__ == "__main__":
    main()
