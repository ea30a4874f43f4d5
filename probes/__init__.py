"""The probes that come with dit-probe, written with nothing but its public names."""

from probes.attention_sinks import AttentionSinks
from probes.concept_attention import ConceptAttention
from probes.cross_attention import CrossAttention
from probes.prompt_attention import PromptAttention
from probes.sparse_features import SparseFeatures
from probes.value_space import ValueSpace

__all__ = ["AttentionSinks", "ConceptAttention", "CrossAttention", "PromptAttention", "SparseFeatures", "ValueSpace"]
