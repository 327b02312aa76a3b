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


AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
AutoModel.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoImageProcessor.register(OpenVLAConfig, OpenVLAImageProcessor, exist_ok=True)
AutoProcessor.register(OpenVLAConfig, OpenVLAProcessor, exist_ok=True)

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
