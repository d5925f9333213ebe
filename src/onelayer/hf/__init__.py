"""Models of this application as citizens of `transformers`: importing this room makes its Auto classes know them.

>>> import onelayer.hf
>>> from transformers import AutoModelForCausalLM
>>> type(AutoModelForCausalLM.from_config(onelayer.hf.DEQConfig(width=64, heads=2))).__name__
'DEQForCausalLM'
"""

from transformers import AutoConfig, AutoModelForCausalLM

from onelayer.hf.configuration import DEQConfig
from onelayer.hf.modeling import DEQForCausalLM, DEQOutput

AutoConfig.register(DEQConfig.model_type, DEQConfig)
AutoModelForCausalLM.register(DEQConfig, DEQForCausalLM)

__all__ = ["DEQConfig", "DEQForCausalLM", "DEQOutput"]
