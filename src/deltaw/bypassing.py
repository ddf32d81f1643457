"""Layers whose weights the module around them reads past their forward."""

from collections.abc import Mapping

from torch import nn

from deltaw.swap import origin_of

READ: Mapping[str, str] = {
    "MambaMixer": "conv1d x_proj dt_proj out_proj",
    "FalconMambaMixer": "conv1d x_proj dt_proj out_proj",
    "JambaMambaMixer": "conv1d dt_proj",
    "ZambaMambaMixer": "conv1d",
    "Mamba2Mixer": "conv1d out_proj",
    "Zamba2MambaMixer": "conv1d out_proj",
    "BambaMixer": "conv1d out_proj",
    "FalconH1Mixer": "conv1d out_proj",
    "GraniteMoeHybridMambaLayer": "conv1d out_proj",
    "NemotronHMamba2Mixer": "conv1d out_proj",
    "BailingHybridDeltaAttention": "conv1d",
    "Glm5NextTextLinearAttention": "conv1d",
    "InklingShortConvolution": "conv1d",
    "Inkling2ShortConvolution": "conv1d",
    "Inkling2LoopShortConvolution": "conv1d",
    "KimiLinearDeltaAttention": "conv1d",
    "LaraMiniGatedDeltaNet": "conv1d",
    "OlmoHybridGatedDeltaNet": "conv1d",
    "Qwen3NextGatedDeltaNet": "conv1d",
    "Qwen3_5GatedDeltaNet": "conv1d",
    "Qwen3_5MoeGatedDeltaNet": "conv1d",
    "Qwen4ExpTextGatedDeltaNet": "conv1d",
    "Lfm2ShortConv": "conv",
    "Lfm2MoeShortConv": "conv",
    "Lfm3ShortConv": "conv",
    "RecurrentGemmaRecurrentBlock": "conv_1d",
    "ConditionalDetrMHAttentionMap": "k_proj",
    "DabDetrMHAttentionMap": "k_linear",
    "DetrMHAttentionMap": "k_proj",
    "MaskFormerDetrMHAttentionMap": "k_proj",
    "WavLMAttention": "q_proj k_proj v_proj out_proj",
    "LSHSelfAttention": "query_key value",
    "LayoutLMv2Encoder": "rel_pos_bias rel_pos_x_bias rel_pos_y_bias",
    "LongcatFlashTopkRouter": "classifier",
    "Gemma3nTextAltUp": "correction_coefs",
    "NeoMMEForMaskedLM": "unembedding_projection",
    "TDNNLayer": "kernel",
}
"""By the class of a module of transformers, the linear and convolutional children whose weights it
reads by itself: in every forward pass, in some (training, one token at a time), or where it has
kernels of a GPU, which take weights and no layers."""


def reader_of(layers: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the class of the module that reads the weight at `path` by itself, if one does."""
    parent, _, name = path.rpartition(".")
    reader = origin_of(layers[parent]).__name__ if parent in layers else ""
    return reader if name in READ.get(reader, "").split() else None
