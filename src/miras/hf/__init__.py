"""The models as `transformers` models: load, save, generate, train and fine-tune them with its
tools.

Importing this module makes `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`,
`AutoModelForSequenceClassification` and `AutoTokenizer` know the folders that `miras train` and
`save_pretrained` write.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from miras.hf.cache import MirasCache
from miras.hf.config import MirasConfig
from miras.hf.model import MirasForCausalLM, MirasForSequenceClassification, MirasModel, MirasPreTrainedModel
from miras.hf.tokenizer import MirasTokenizer, byte_tokenizer

__all__ = [
    "MirasCache",
    "MirasConfig",
    "MirasForCausalLM",
    "MirasForSequenceClassification",
    "MirasModel",
    "MirasPreTrainedModel",
    "byte_tokenizer",
]

AutoConfig.register(MirasConfig.model_type, MirasConfig)
AutoModel.register(MirasConfig, MirasModel)
AutoModelForCausalLM.register(MirasConfig, MirasForCausalLM)
AutoModelForSequenceClassification.register(MirasConfig, MirasForSequenceClassification)
AutoTokenizer.register(MirasConfig, tokenizer_class=MirasTokenizer)
