"""What `openvla stats` says of a dataset."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from ..folders import MARKS, locked_file, write_json
from ..options.datasets import StatsOptions
from .checks import check_data
from .source import statistics_with_spec
from .sources import open_sources, source_options
from .statistics import check_plot, check_statistics_file, plot_statistics, statistics_table


def report_statistics(options: StatsOptions) -> Iterator[str]:
    """Read the data, write the files that were asked for, and give the report piece by piece.

    Raises:
        FileExistsError: If a file that would be replaced holds something else, or the file is that of a model; before
            the data is read.
    """
    output, plot = options.output, options.plot
    with locked_file(output) if output is not None else nullcontext():  # before the work, which may take long
        if output is not None:
            _check_of_no_model(output)
            if output.exists():
                check_statistics_file(output)
        if plot is not None:
            check_plot(plot)
        # What a model that sees states is shown: nobody else reads their statistics.
        given = {**source_options(options), "keep_unlabeled": True, "sees_state": True}
        sources = open_sources(options.dataset, data_root=options.data_root, progress=True, **given)
        for source in sources:
            yield f"{source.report()}\n{statistics_table(source.statistics, source.names, source.state_names)}"
            yield f"actions are {source.meaning}"
            for warning in check_data(source):
                yield f"warning   {warning}"
        if output is not None:  # before the plots, which may fail
            write_json(output, {source.name: statistics_with_spec(source) for source in sources})
            yield f"wrote {output}"
        if plot is not None:
            for source in sources:
                path = plot if len(sources) == 1 else plot.with_stem(f"{plot.stem}_{source.name.replace('/', '_')}")
                plot_statistics(source.actions(), source.statistics, path, source.names)
                yield f"wrote {path}"


def _check_of_no_model(output: Path) -> None:
    """Raise a `FileExistsError` if a file to write is what a model takes its units from: its actions would change."""
    others = [name for name in MARKS if output.with_name(name).exists() and name != output.name]
    if output.name == "dataset_statistics.json" and others:
        raise FileExistsError(
            f"'{output}' says the units of the model beside it ('{others[0]}'), whose actions would be others: give "
            "another file. finetune writes the statistics of what it trains on by itself."
        )
