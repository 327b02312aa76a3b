"""OpenVLA as a Hugging Face Hub model package. `import openvla` registers it with the auto classes of transformers."""

from .configuration_openvla import OpenVLAConfig  # isort: skip - first, it says which transformers is needed

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .action_tokenizer import ActionTokenizer, normalize_actions, unnormalize_actions
from .modeling_openvla import ActionPrediction, OpenVLAForActionPrediction, OpenVLAOutput
from .processing_openvla import PROMPT_TEMPLATES, OpenVLAImageProcessor, OpenVLAProcessor, load_image


class AutoModelForVision2Seq(AutoModelForImageTextToText):
    """The auto class scripts written against the original import, which transformers 5 no longer has."""

    @classmethod
    def from_pretrained(cls, *args, trust_remote_code=None, **kwargs):
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


class PrismaticConfig(OpenVLAConfig):
    """Holds the two names above in the auto classes, which find a processor by config or by name."""


AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
AutoModel.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoImageProcessor.register(OpenVLAConfig, OpenVLAImageProcessor, exist_ok=True)
AutoProcessor.register(OpenVLAConfig, OpenVLAProcessor, exist_ok=True)
AutoImageProcessor.register(PrismaticConfig, PrismaticImageProcessor, exist_ok=True)
AutoProcessor.register(PrismaticConfig, PrismaticProcessor, exist_ok=True)

__version__ = "0.1.0"
__all__ = [
    "PROMPT_TEMPLATES",
    "ActionPrediction",
    "ActionTokenizer",
    "AutoModelForVision2Seq",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAOutput",
    "OpenVLAProcessor",
    "load_image",
    "normalize_actions",
    "unnormalize_actions",
]
