"""OpenVLA as a Hugging Face Hub model package. `import openvla` registers it with the auto classes of transformers."""

from .configuration_openvla import OpenVLAConfig  # isort: skip - first, it says which transformers is needed

from .action_tokenizer import ActionTokenizer, normalize_actions, unnormalize_actions
from .image_processing_openvla import OpenVLAImageProcessor
from .modeling_openvla import ActionPrediction, OpenVLAForActionPrediction, OpenVLAOutput
from .pixels_openvla import load_image
from .processing_openvla import OpenVLAProcessor
from .prompts_openvla import PROMPT_TEMPLATES
from .published_names import (
    AutoModelForVision2Seq,
    PrismaticCausalLMOutputWithPast,
    PrismaticImageProcessor,
    PrismaticProcessor,
    register,
)


register()

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
    "PrismaticCausalLMOutputWithPast",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "load_image",
    "normalize_actions",
    "unnormalize_actions",
]
