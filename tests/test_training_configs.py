"""The shipped launch configurations, read and turned into an environment by accelerate itself."""

from pathlib import Path

import pytest
import yaml


pytest.importorskip("accelerate", reason="training needs the [train] extra")

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file  # noqa: E402
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # noqa: E402
from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils.launch import prepare_multi_gpu_env  # noqa: E402


CONFIGS = sorted((Path(__file__).resolve().parents[1] / "training" / "configs").glob("*.yaml"))
LAUNCHES = {  # file -> processes, machines, FSDP
    "1_gpu": (1, 1, False),
    "4_gpus_ddp": (4, 1, False),
    "4_gpus_fsdp": (4, 1, True),
    "8_gpus_ddp": (8, 1, False),
    "8_gpus_fsdp": (8, 1, True),
    "8_nodes_fsdp": (64, 8, True),
}


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS} == set(LAUNCHES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_what_the_name_says(path, monkeypatch):
    processes, machines, sharded = LAUNCHES[path.stem]
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config))  # nothing that accelerate does not know
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (processes, machines, "bf16")

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert bool(arguments.use_fsdp) == sharded
    if not sharded:
        assert bool(arguments.multi_gpu) == (processes > 1)
        return
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"  # what the published layout is gathered from
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False  # docs/training.md
    assert plugin.auto_wrap_policy is not None and plugin.transformer_cls_names_to_wrap is None
