"""Fine-tuning on one's own demonstrations: a run from options to a checkpoint, whose steps `train` names."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..adapters_openvla import KEY, OF_MODEL, check_base, name_base, portable_model, read_belongings
from ..configuration_openvla import OpenVLAConfig
from ..data import Episode
from ..data.augment import ImageAugmentation
from ..data.collate import ActionCollator
from ..data.samples import FrameSamples
from ..data.stream import MixtureStream
from ..files_openvla import local_folder
from ..folders import locked, weights_digest, with_version, write_json
from ..model_card import model_card
from ..modeling_openvla import OpenVLAForActionPrediction
from ..oft_openvla import find_oft, oft_folder
from ..options.training import ADAPTER_STRATEGIES, FinetuneOptions
from ..parts_openvla import PARTS
from ..processor_files_openvla import STARTED
from .begun import check_begun, check_frozen, check_model, shared_options, what_begins
from .checkpoints import card_folder, starting_point
from .checks import check_result
from .curves import plot_curves
from .muon import make_muon
from .preparation import check_libraries, prepare
from .prepared_run import LEARNING_RATES, Run, computing_precision, held_out_frames, learning_rate
from .resume import (
    CHECKPOINTS,
    check_output,
    check_shared_memory,
    check_space,
    checkpoint_to_resume,
    last_checkpoint,
    remove_leftovers,
    step_of,
)
from .strategies import (
    apply_strategy,
    checkpoint_activations,
    freeze_unused,
    merge_into_base,
    qlora_quantization,
    trainable_parameters,
)
from .trainer import ActionTrainer


def load_model(run: Run, autocast: bool, checkpoint: Path | None = None) -> Any:
    """The model, with the parameters of the strategy trainable, and those of its added parts.

    Args:
        autocast: Whether it will be computed with in bfloat16, whatever the types of its weights.
        checkpoint: From which a run with an adapter continues: the Trainer loads the adapter, not the parts beside it.

    Raises:
        ValueError: If the model is an adapter, and its base has other weights than it was trained on.
    """
    options = run.options
    learns_itself = options.strategy not in LEARNING_RATES
    loading: dict[str, Any] = {"dtype": options.dtype}
    if options.dtype == "auto" and learns_itself and not autocast:
        loading["dtype"] = "float32"  # the only type that goes with weights that learn, see below
    if options.strategy == "qlora":
        loading["quantization_config"] = qlora_quantization()
    base, adapter = starting_point(options.model)
    if adapter is not None and (problem := check_base(base, read_belongings(adapter).get("base_digest"))):
        raise ValueError(
            f"{problem}, and so would all that is learned from there. Put its own base back, or begin with what "
            "`openvla merge RUN OUT --base BASE` makes of the two."
        )
    model: Any = OpenVLAForActionPrediction.from_pretrained(base, **loading)
    fields = {field: getattr(run.config, field) for field in PARTS}
    if adapter is not None:
        from peft import PeftModel

        model.load_parts(adapter, read_belongings(adapter).get("model", {}))
        if learns_itself:  # of an earlier run: it becomes part of the weights
            model = merge_into_base(PeftModel.from_pretrained(model, adapter))
            if hasattr(model, "peft_config"):  # older PEFT (0.18) leaves it, and would miss what is replaced now
                del model.peft_config
    model.add_parts(**fields)
    if checkpoint is not None and not learns_itself:
        model.load_parts(checkpoint, fields)
    added = list(model.added_parameters().values())
    if learns_itself:
        for field in OF_MODEL:
            setattr(model.config, field, getattr(run.config, field))
        model.norm_stats = run.statistics
        model = apply_strategy(model, options.strategy)
    else:
        made = {"rank": options.rank, "alpha": options.alpha, "dropout": options.dropout}
        model = apply_strategy(model, options.strategy, adapter=adapter, **made)
        config = model.peft_config["default"]
        config.base_model_name_or_path, digest = name_base(base, options.output)
        of_model = fields | {field: getattr(run.config, field) for field in OF_MODEL}
        if added:
            model.get_base_model().adapter_state.parts_owner = "default"
        config.auto_mapping = {KEY: {"norm_stats": run.statistics, "model": of_model, "base_digest": digest}}
    for parameter in added:
        parameter.requires_grad_(True)
    if options.dtype == "auto":
        # Updates of 2e-5 vanish in bfloat16: what learns is float32, and computed with in `precision`.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def sharding(config: OpenVLAConfig) -> dict[str, Any]:
    """FSDP2 settings: blocks of the language model and of the towers are gathered one at a time; a saved checkpoint is
    complete. Only accelerators are sharded: on CPUs accelerate silently takes DDP."""
    blocks = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]._no_split_modules
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": [*blocks, Block.__name__],
        "state_dict_type": "FULL_STATE_DICT",
    }


def training_arguments(options: FinetuneOptions, config: OpenVLAConfig) -> TrainingArguments:
    """Of the library's Trainer. Raises ValueError where one process sees several GPUs."""
    on_gpu = torch.cuda.is_available()
    eval_every = options.save_every if options.eval_every is None else options.eval_every
    arguments = TrainingArguments(
        output_dir=str(Path(options.output) / CHECKPOINTS),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=learning_rate(options),
        # A step decay is made by the ActionTrainer: the library has none.
        lr_scheduler_type="constant_with_warmup" if options.schedule in ("constant", "step") else str(options.schedule),
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay or 0.0,
        max_grad_norm=options.max_grad_norm or 0.0,
        bf16=computing_precision(options) == "bf16",
        torch_compile=options.compile,
        logging_nan_inf_filter=False,  # the ActionTrainer stops there
        logging_steps=max(1, min(options.log_every, options.steps // 10)),
        eval_strategy="steps" if eval_every else "no",
        eval_steps=eval_every or None,
        save_steps=options.save_every,
        save_total_limit=options.keep,
        report_to=options.logging,
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=options.seed,
        use_cpu=not on_gpu,
        ignore_data_skip=True,  # the stream itself continues where it was
        ddp_find_unused_parameters=False,  # see freeze_unused
        fsdp=options.fsdp,
        fsdp_config=sharding(config) if options.fsdp else None,
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs: start one for each (torchrun --nproc-per-node {arguments.n_gpu} "
            "-m openvla.cli finetune ...), or choose one with CUDA_VISIBLE_DEVICES=0."
        )
    return arguments


def finetune(options: FinetuneOptions, resume: bool = False, data: Any = None) -> Path:
    """Train, and write a checkpoint that `OpenVLAForActionPrediction.from_pretrained` loads.

    Args:
        resume: Continue from the last checkpoint of `options.output`, or begin where there is none. Of a run that has
            made all its steps only the result is written.
        data: Demonstrations as a Python object (see `data.PythonDataset`); `options.dataset` is then only a name, of
            an object that has none.

    Returns:
        `options.output`. For lora and qlora it holds the adapter with the statistics and the processor beside it; see
        `merge_adapter`. Checkpoints of the run lie in `output/checkpoints`; `curves.png` is drawn where matplotlib is
        installed. A run that was stopped in any way continues with `resume`; its result appears complete or not at all.

    Raises:
        ValueError: If the dataset holds nothing to train on, the options do not fit together, or options, data or
            weights are not those that the run was begun with.
        DivergedError: If the loss, the gradient or the weights are not finite; the last good checkpoint stays.
        FileExistsError: If the output folder holds a finished run, or one that was begun and `resume` is False.
        BlockingIOError: If another process works on the output folder.
        OSError: If the output cannot be written; the last good checkpoint stays.
    """
    check_libraries(options)
    output = Path(options.output)
    check_output(options, resume, dataset=data is None)
    arguments = training_arguments(options, OpenVLAConfig.from_pretrained(starting_point(options.model)[0]))
    with locked(output) if arguments.process_index == 0 else nullcontext():
        try:
            train(options, arguments, resume, data)
        except KeyboardInterrupt:
            if arguments.process_index == 0:
                last = last_checkpoint(output / CHECKPOINTS)
                tqdm.write(
                    f"stopped   --resume continues from {last}"
                    if last
                    else f"stopped   before the first checkpoint (--save-every {options.save_every}): nothing is kept"
                )
            raise
    return output


def train(options: FinetuneOptions, arguments: TrainingArguments, resume: bool, data: Any) -> None:
    """A run in an output folder that no other process works on."""
    # 1. Data, held-out frames and the checkpoint to continue from, before any weights are read
    output, main = Path(options.output), arguments.process_index == 0
    if main:
        remove_leftovers(output)
    checkpoint = checkpoint_to_resume(output, options.steps) if resume else None
    done = step_of(checkpoint) if checkpoint else 0
    with arguments.main_process_first():  # the others find the statistics in the cache
        run = prepare(options, arguments.world_size, data)
    held_out = held_out_frames(run)
    # By default (None) nothing is missed where there are too few episodes to hold one out.
    asked = options.eval_every or (options.eval_every is None and any(source.held_out for source in run.sources))
    evaluates_nothing = bool(asked and options.eval_samples and not held_out)
    if not held_out:
        arguments.eval_strategy = IntervalStrategy.NO
    # What the model can do before it has learned anything
    arguments.eval_on_start = arguments.eval_strategy is not IntervalStrategy.NO and checkpoint is None

    # 2. The model, and whether it, options and data are those that the run was begun with
    made = what_begins(run, data) if main else {}
    begun = main and (output / STARTED).exists()
    if begun:
        check_begun(run, made, checkpoint)
    set_seed(options.seed)  # adapters are made before the Trainer sets it
    model = load_model(run, arguments.bf16, checkpoint)
    check_shared_memory(model, options, pinned=not arguments.use_cpu)
    if main:
        made["model_digest"] = weights_digest(options.model)  # a Hub id's weights are there only now
        if begun:
            check_model(output, made)
        output.mkdir(parents=True, exist_ok=True)
        scarce = check_space(output, model, options)
        if not begun:
            write_json(output / STARTED, with_version(made))
        tqdm.write(f"{run.describe()}\ntrains    {trainable_parameters(model) / 1e6:.1f}M parameters")
        if scarce:
            tqdm.write(f"warning   {scarce}")
        if evaluates_nothing:
            tqdm.write(
                "warning   nothing is evaluated: no episode is held out (--held-out), or of those that are the filters "
                "leave no step"
            )
        if done == options.steps:
            tqdm.write(f"finished  at step {done}: only the result of '{checkpoint}' is written")
    freeze_unused(model)
    if main and checkpoint is not None:
        merged = starting_point(options.model)[1] is not None or find_oft(oft_folder(options.model)) is not None
        check_frozen(checkpoint, model, merged)

    # 3. Training, and its result
    trainer = make_trainer(run, model, arguments, held_out, done)
    if arguments.process_index:  # noise, times and prefixes of its own; the weights were made with the common seed
        torch.manual_seed(options.seed + arguments.process_index)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_result(output, run.config.dtype if options.dtype == "auto" else None)
    if main:
        plot_curves({options.strategy: trainer.state.log_history}, output / "curves.png")
        for warning in check_result(trainer.last_metrics, run.action_names, options.strategy in ADAPTER_STRATEGIES):
            tqdm.write(f"warning   {warning}")
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    run: Run, model: Any, arguments: TrainingArguments, held_out: list[Episode], done: int
) -> ActionTrainer:
    """What trains `model` from step `done` on, and evaluates on `held_out`."""
    options, images, cameras = run.options, run.processor.image_processor, run.config.camera_names
    muon = (
        make_muon(model, learning_rate(options), options.weight_decay or 0.0) if options.optimizer == "muon" else None
    )
    return ActionTrainer(
        model=model,
        args=arguments,
        stream=MixtureStream(
            run.sources,
            run.mixture[0],
            buffer_size=options.shuffle_buffer,
            seed=options.seed,
            start=done * run.global_batch,
            rank=arguments.process_index,
            world_size=arguments.world_size,
        ),
        samples=FrameSamples(images, ImageAugmentation() if options.image_aug else None, options.seed, cameras),
        eval_samples=FrameSamples(images, camera_names=cameras),
        collator=ActionCollator(run.processor, run.head, run.config.proprio_dim is not None),
        held_out=held_out,
        statistics=run.statistics,
        scales={source.name: torch.from_numpy(source.action_scale) for source in run.sources},
        shape=run.shape,
        names=run.action_names,
        frames=run.mixture[1],
        decay_after=options.decay_after,
        done=done,
        card=card(run),
        optimizers=(muon, None),
    )


def card(run: Run) -> str:
    """Model card: how to load it, and how it was made."""
    options = run.options
    base, _ = starting_point(options.model)
    on_hub = local_folder(base) is None
    begun_with = portable_model(base, options.output)
    text = model_card(
        Path(options.output).resolve().name,
        run.config,
        run.statistics,
        source=base if on_hub else None,
        model_folder=card_folder(base),
        weights=f"fine-tuned from `{begun_with}`",
        adapter_of=f"`{begun_with}`" if options.strategy in LEARNING_RATES else None,
    )
    given = shared_options(options) | {"learning_rate": learning_rate(options)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in given.items() if value not in (None, ""))
    return f"{text}\n## Fine-tuned\n\nWith `openvla finetune`:\n\n| option | value |\n| --- | --- |\n{rows}\n"
