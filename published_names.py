"""Names of classes that scripts written against the original import or register.

Names on instances stand where their values are: `OpenVLAForActionPrediction.__init__`, `OpenVLAVisionBackbone`,
`OpenVLAImageProcessor.apply_transform`, `ActionTokenizer`.
"""

from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_openvla import OpenVLAConfig
from .files_openvla import read_json
from .image_processing_openvla import OpenVLAImageProcessor
from .modeling_openvla import OpenVLAForActionPrediction, OpenVLAOutput
from .processing_openvla import OpenVLAProcessor


PrismaticCausalLMOutputWithPast = OpenVLAOutput


class AutoModelForVision2Seq(AutoModelForImageTextToText):
    """The auto class scripts written against the original import, which transformers 5 no longer has."""

    @classmethod
    def from_pretrained(cls, *args, trust_remote_code=None, **kwargs):
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        config = Path(str(name), kwargs.get("subfolder") or "", "config.json")
        if config.is_file():
            read_json(config)  # says what is wrong with it, which the library does not
        # This package is the code, also of repositories that bring their own; transformers 5.4 would prefer theirs.
        return super().from_pretrained(*args, trust_remote_code=False, **kwargs)


class PrismaticImageProcessor(OpenVLAImageProcessor):
    """The name under which published folders ask for an `OpenVLAImageProcessor`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return OpenVLAImageProcessor.from_pretrained(*args, **kwargs)


class PrismaticProcessor(OpenVLAProcessor):
    """The name under which published folders ask for an `OpenVLAProcessor`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return OpenVLAProcessor.from_pretrained(*args, **kwargs)


class _PublishedNames(OpenVLAConfig):
    """Holds the two names above in the auto classes, which find a processor by config or by name."""


class _OwnNames(OpenVLAConfig):
    """Holds ours there, also after a script has registered the published ones for `OpenVLAConfig`."""


def register() -> None:
    """Make the auto classes of transformers know this package, under its own and the published names."""
    AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        auto_class.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
    for config, image_processor, processor in (
        (OpenVLAConfig, OpenVLAImageProcessor, OpenVLAProcessor),
        (_OwnNames, OpenVLAImageProcessor, OpenVLAProcessor),
        (_PublishedNames, PrismaticImageProcessor, PrismaticProcessor),
    ):
        AutoImageProcessor.register(config, image_processor, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
