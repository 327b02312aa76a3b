"""Fine-tuning on one's own demonstrations: a run from options to a checkpoint, on one page."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..action_text import action_names
from ..action_tokenizer import ActionTokenizer
from ..configuration_openvla import OpenVLAConfig
from ..data.augment import ImageAugmentation
from ..data.collate import ActionCollator
from ..data.samples import FrameSamples
from ..data.stream import MixtureStream
from ..folders import write_json
from ..model_card import model_card
from ..modeling_openvla import OpenVLAForActionPrediction
from .checkpoints import ADAPTER_NOTE, STARTED
from .checks import check_result
from .curves import plot_curves
from .metrics import ActionMetrics
from .muon import make_muon
from .options import FinetuneOptions, differences
from .preparation import LEARNING_RATES, Run, computing_precision, held_out_frames, learning_rate, prepare
from .strategies import apply_strategy, checkpoint_activations, freeze_unused, qlora_quantization, trainable_parameters
from .trainer import ActionTrainer, last_checkpoint


FINISHED = "dataset_statistics.json"  # written last


def load_model(run: Run, autocast: bool) -> Any:
    """The model, with the parameters of the strategy trainable.

    Args:
        autocast: Whether it will be computed with in bfloat16, whatever the types of its weights.
    """
    options = run.options
    learns_itself = options.strategy not in LEARNING_RATES
    loading: dict[str, Any] = {"dtype": options.dtype}
    if options.dtype == "auto" and learns_itself and not autocast:
        loading["dtype"] = "float32"  # the only type that goes with weights that learn, see below
    if options.strategy == "qlora":
        loading["quantization_config"] = qlora_quantization()
    model: Any = OpenVLAForActionPrediction.from_pretrained(options.model, **loading)
    model.norm_stats = run.statistics
    adapter = {"rank": options.rank, "alpha": options.alpha, "dropout": options.dropout}
    model = apply_strategy(model, options.strategy, **({} if learns_itself else adapter))
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
    whole. Only accelerators are sharded: on CPUs accelerate takes DDP without a word."""
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
        output_dir=str(Path(options.output) / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=learning_rate(options),
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=computing_precision(options) == "bf16",
        torch_compile=options.compile,
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
        ignore_data_skip=True,  # the stream itself goes on where it was
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
        resume: Go on from the last checkpoint of `options.output`, or begin where there is none.
        data: Demonstrations as a Python object (see `data.PythonDataset`); `options.dataset` is then only a name.

    For lora and qlora the output folder holds the adapter with the statistics and the processor beside it; see
    `merge_adapter`. Checkpoints of the run lie in `output/checkpoints`; `curves.png` is drawn where matplotlib is
    installed.

    Raises:
        ValueError: If the dataset holds nothing to train on, or the options do not fit together.
        FileExistsError: If the output folder holds a finished run, or one that was begun and `resume` is False.
        OSError: If a checkpoint cannot be written; the last good one stays.
    """
    output = Path(options.output)
    begun = output / STARTED
    if begun.exists() and not resume:
        state = "finished" if (output / FINISHED).exists() else "unfinished"
        raise FileExistsError(f"'{output}' holds a {state} run: go on with --resume, or choose another folder.")
    arguments = training_arguments(options, OpenVLAConfig.from_pretrained(options.model))
    main = arguments.process_index == 0
    with arguments.main_process_first():  # the others find the statistics in the cache
        run = prepare(options, arguments.world_size, data)
    held_out = held_out_frames(run)
    if not held_out:
        arguments.eval_strategy = IntervalStrategy.NO
    made = {**asdict(options), "learning_rate": learning_rate(options), "global_batch": run.global_batch}
    if begun.exists():
        changed = differences(json.loads(begun.read_text(encoding="utf-8")), made)
        if changed:
            raise ValueError(f"'{output}' was begun with other options: {'; '.join(changed)}.")
    elif main:
        output.mkdir(parents=True, exist_ok=True)
        write_json(begun, made)
    checkpoint = last_checkpoint(output / "checkpoints") if resume else None
    done = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    # What the model can do before it has learned anything
    arguments.eval_on_start = arguments.eval_strategy is not IntervalStrategy.NO and checkpoint is None

    set_seed(options.seed)  # adapters are made before the Trainer sets it
    model = load_model(run, arguments.bf16)
    if main:
        tqdm.write(f"{run.describe()}\ntrains    {trainable_parameters(model) / 1e6:.1f}M parameters")
    freeze_unused(model)
    muon = make_muon(model, learning_rate(options), options.weight_decay) if options.optimizer == "muon" else None
    tokenizer = ActionTokenizer(run.processor.tokenizer, model.action_tokenizer.n_bins)
    action_dim = len(run.sources[0].statistics["action"]["q01"])
    size = model.vision_backbone.image_size
    trainer = ActionTrainer(
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
        samples=FrameSamples(size, ImageAugmentation() if options.image_aug else None, seed=options.seed),
        eval_samples=FrameSamples(size, crop=options.image_aug),
        collator=ActionCollator(run.processor, tokenizer),
        held_out=held_out,
        statistics=run.statistics,
        metrics=(ActionMetrics(tokenizer, action_dim), ActionMetrics(tokenizer, action_dim)),
        frames=run.mixture[1],
        card=card(run),
        optimizers=(muon, None),
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_result(output, run.config.dtype if options.dtype == "auto" else None)
    if main:
        plot_curves({options.strategy: trainer.state.log_history}, output / "curves.png")
        for warning in check_result(trainer.last_metrics, action_names(action_dim)):
            tqdm.write(f"warning   {warning}")
    trainer.accelerator.wait_for_everyone()
    return output


def card(run: Run) -> str:
    """Model card: how to load it, and how it was made."""
    options = run.options
    text = model_card(Path(options.output).name, run.config, run.statistics, source=options.model)
    if options.strategy in LEARNING_RATES:
        text += ADAPTER_NOTE.format(base=options.model)
    rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(options).items())
    return f"{text}\n## Fine-tuned\n\nWith `openvla finetune`:\n\n| option | value |\n| --- | --- |\n{rows}\n"
