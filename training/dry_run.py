"""What a run would do, before it does it: `openvla finetune --dry-run`."""

from pathlib import Path

import numpy as np

from ..data.collate import ActionCollator
from ..options.training import FinetuneOptions
from ..processor_files_openvla import STARTED
from .begun import check_begun, what_begins
from .preparation import check_libraries, prepare
from .prepared_run import LEARNING_RATES, Run, computing_precision
from .resume import check_output, checkpoint_to_resume, step_of
from .step_cost import usual_text


def plan_run(options: FinetuneOptions, processes: int = 1, resume: bool = False) -> str:
    """What `finetune` would do with these options on so many processes, without reading weights: data, samples,
    warnings, parameters that learn, and memory in the precision that this machine resolves to.

    Of a run that continues all is compared but its base, whose weights are not read.

    Raises:
        ValueError, FileExistsError, OSError, ModuleNotFoundError: As `finetune` before its first step.
    """
    from .plan import estimate  # not above: `python -m openvla.training.plan` would be imported twice

    check_libraries(options)
    check_output(options, resume)
    output = Path(options.output)
    checkpoint = checkpoint_to_resume(output, options.steps) if resume else None
    run = prepare(options, processes)
    if (output / STARTED).exists():
        check_begun(run, what_begins(run), checkpoint)
    adapter = {"rank": options.rank, "alpha": options.alpha, "dropout": options.dropout}
    weights = {"auto": computing_precision(options), "float32": "float32"}
    plan = estimate(
        run.config,
        options.strategy,
        batch_size=options.batch_size,
        world_size=processes,
        sharded=options.fsdp,
        gradient_checkpointing=options.gradient_checkpointing,
        precision=weights.get(options.dtype, "pure-bf16"),
        text_tokens=text_tokens(run),
        shape=run.shape,
        optimizer=options.optimizer,
        **(adapter if options.strategy in LEARNING_RATES else {}),
    )
    begins = f"continues from '{checkpoint}'\n" if checkpoint else ""
    if checkpoint and step_of(checkpoint) == options.steps:
        begins = f"finished  at step {options.steps}: only the result of '{checkpoint}' is written\n"
    return f"{begins}{run.describe()}\n{plan.describe()}"


def text_tokens(run: Run, episodes: int = 8) -> int:
    """Tokens of the longest prompt with its answer among a few episodes of each dataset, spread evenly."""
    collator, still = ActionCollator(run.processor, run.head), np.zeros(run.shape)
    longest = 0
    for source in run.sources:
        dataset = source.everything[0]  # without images
        picked = np.unique(np.linspace(0, len(dataset) - 1, episodes).astype(int))
        for episode in dataset.read(picked):
            for text in set(episode.step_instructions or [episode.instruction]):
                longest = max(longest, len(collator.tokens(text, still)[0]))
    return longest or usual_text(run.config, run.shape)
