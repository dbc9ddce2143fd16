"""Tables from the published parameter names to ours. `None` means dropped on purpose; what no row names is an error."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

KeyTable = dict[str, str | None]

# --- the quantizer (torch names) ---------------------------------------------------------------------------------

_STACKS = {
    "enc_spatial_transformer": "spatial_encoder",
    "enc_temporal_transformer": "temporal_encoder",
    "dec_spatial_transformer": "decoder",
}
_ATTENTION: KeyTable = {
    r"norm\.gamma": "norm.weight",
    r"norm\.beta": None,
    r"context_norm\.gamma": "context_norm.weight",
    r"context_norm\.beta": None,
    r"to_q\.weight": "q_proj.weight",
    r"to_kv\.weight": "kv_proj.weight",
    r"to_out\.weight": "out_proj.weight",
    r"q_scale": "q_scale",
    r"k_scale": "k_scale",
}
_LAYER: KeyTable = {
    r"0\.dsconv\.(weight|bias)": r"position_convolution.convolution.\g<2>",
    **{rf"1\.{key}": name and f"self_attention.{name}" for key, name in _ATTENTION.items()},
    # Self attention sees no null pairs: the published tensor has none.
    r"1\.null_kv": None,
    **{rf"2\.{key}": name and f"cross_attention.{name}" for key, name in _ATTENTION.items()},
    r"2\.null_kv": "cross_attention.null_key_values",
    r"3\.0\.(weight|bias)": r"feed_forward.norm.\g<2>",
    r"3\.1\.weight": "feed_forward.up_proj.weight",
    r"3\.4\.weight": "feed_forward.down_proj.weight",
}
QUANTIZER_TABLE: KeyTable = {
    r"spatial_rel_pos_bias\.net\.([01])\.0\.(weight|bias)": r"position_bias.layers.\1.\2",
    r"spatial_rel_pos_bias\.net\.2\.(weight|bias)": r"position_bias.layers.2.\1",
    r"to_patch_emb_first_frame\.1\.(weight|bias)": r"patch_embedding.norm_in.\1",
    r"to_patch_emb_first_frame\.2\.(weight|bias)": r"patch_embedding.projection.\1",
    r"to_patch_emb_first_frame\.3\.(weight|bias)": r"patch_embedding.norm_out.\1",
    r"vq\.project_in\.(weight|bias)": r"bottleneck.projection_in.\1",
    # A ReLU lies between the two convolutions.
    r"vq\.cnn_encoder\.0\.(weight|bias)": r"bottleneck.convolutions.0.\1",
    r"vq\.cnn_encoder\.2\.(weight|bias)": r"bottleneck.convolutions.1.\1",
    r"vq\.codebooks": "vector_quantizer.codebook",
    r"vq\.project_out\.(weight|bias)": r"latent_projection.\1",
    r"to_pixels_first_frame\.0\.(weight|bias)": r"to_pixels.\1",
    **{
        rf"{stack}\.layers\.(\d+)\.{key}": name and rf"{ours}.layers.\1.{name}"
        for stack, ours in _STACKS.items()
        for key, name in _LAYER.items()
    },
    **{rf"{stack}\.norm_out\.gamma": f"{ours}.norm.weight" for stack, ours in _STACKS.items()},
    **{rf"{stack}\.norm_out\.beta": None for stack in _STACKS},
}

# --- the vision tokenizer (flax names, slashes) ------------------------------------------------------------------

_BLOCKS = {
    r"encoder/DownsamplingBlock_(\d+)": r"encoder.down_blocks.\1",
    r"decoder/UpsamplingBlock_(\d+)": r"decoder.up_blocks.\1",
    r"(encoder|decoder)/MidBlock_0": r"\1.mid_block",
}
_RESNET = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2", "Conv_2": "shortcut"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_VISION_MODULES = {
    r"(encoder|decoder)/Conv_0": r"\1.conv_in",
    r"(encoder|decoder)/GroupNorm_0": r"\1.norm_out",
    r"(encoder|decoder)/Conv_1": r"\1.conv_out",
    r"encoder/DownsamplingBlock_(\d+)/Downsample_0/Conv_0": r"encoder.down_blocks.\1.resample.conv",
    r"decoder/UpsamplingBlock_(\d+)/Upsample_0/Conv_0": r"decoder.up_blocks.\1.resample.conv",
    r"(quant_conv|post_quant_conv)": r"\1",
    **{
        rf"{block}/ResnetBlock_(\d+)/{layer}": rf"{ours}.resnets.\2.{name}"
        for block, ours in _BLOCKS.items()
        for layer, name in _RESNET.items()
    },
}
VISION_TOKENIZER_TABLE: KeyTable = {
    r"quantize/embeddings": "codebook.weight",
    **{
        f"{module}/{leaf}": f"{ours}.{name}"
        for module, ours in _VISION_MODULES.items()
        for leaf, name in _LEAVES.items()
    },
}

# --- the policy (flax names, slashes) ----------------------------------------------------------------------------

# Published tables of each segment, in the order of the id space: embedding, head.
POLICY_SEGMENTS = {
    "text": ("transformer/wte/embedding", "lm_head/kernel"),
    "vision": ("transformer/vte/embedding", "vision_head/kernel"),
    "latent": ("transformer/dte/embedding", "delta_head/kernel"),
    "action": ("transformer/ate/embedding", "action_head/kernel"),
}
FINAL_NORM = ("transformer/ln_f/kernel", "model.norm.weight")
# Published leaf of a layer -> our parameter of a layer and how it is laid out.
POLICY_LAYER = {
    "attention/wq/kernel": ("self_attn.q_proj.weight", "rope"),
    "attention/wk/kernel": ("self_attn.k_proj.weight", "rope"),
    "attention/wv/kernel": ("self_attn.v_proj.weight", "transpose"),
    "attention/wo/kernel": ("self_attn.o_proj.weight", "transpose"),
    "feed_forward/w1/kernel": ("mlp.gate_proj.weight", "transpose"),
    "feed_forward/w3/kernel": ("mlp.up_proj.weight", "transpose"),
    "feed_forward/w2/kernel": ("mlp.down_proj.weight", "transpose"),
    "attention_norm/kernel": ("input_layernorm.weight", "copy"),
    "ffn_norm/kernel": ("post_attention_layernorm.weight", "copy"),
}
STACKED_LAYERS = "transformer/h/scan_decoder"
SINGLE_LAYER = "transformer/h/{layer}"


def rename(keys: Iterable[str], table: Mapping[str, str | None], what: str) -> dict[str, str | None]:
    """
    Our name of every published key; None where it is dropped.

    Raises:
        ValueError: If the table lacks keys; it names them all.
    """
    names: dict[str, str | None] = {}
    unknown = []
    for key in keys:
        matches = ((re.fullmatch(pattern, key), target) for pattern, target in table.items())
        match, target = next(((match, target) for match, target in matches if match), (None, None))
        if match is None:
            unknown.append(key)
        else:
            names[key] = target if target is None else match.expand(target)
    if unknown:
        raise ValueError(f"{what} has {len(unknown)} unknown keys: {', '.join(sorted(unknown))}.")
    return names


def compare_parameters(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """
    Compares parameter names and shapes with those of the model.

    Args:
        found (`Mapping[str, tuple[int, ...]]`): Shapes of what was converted, by our names.
        expected (`Mapping[str, tuple[int, ...]]`): Shapes of the model's parameters.
        what (`str`): What the error calls the checkpoint.

    Raises:
        ValueError: One message with every missing, extra and mis-shaped name.
    """
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"{len(extra)} too many: {', '.join(extra)}")
    mis_shaped = [
        f"{name} has {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if mis_shaped:
        problems.append(f"{len(mis_shaped)} mis-shaped: {', '.join(mis_shaped)}")
    if problems:
        raise ValueError(f"{what} does not fit the configured sizes: {'; '.join(problems)}.")


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """
    Reorders the rows of a query or key projection for the rotary embedding of transformers.

    The published code rotates the channels 2i and 2i + 1 of a head together, transformers i and i + head_dim / 2.

    Args:
        weight (`torch.Tensor` of shape `(heads * head_dim, hidden)`): Rows in the published order.
        head_dim (`int`): Channels per head.

    Returns:
        `torch.Tensor` of shape `(heads * head_dim, hidden)`
    """
    out_features, hidden = weight.shape
    pairs = weight.view(out_features // head_dim, head_dim // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(out_features, hidden)


@dataclass(frozen=True)
class Piece:
    """
    One published array, or one layer of it, that becomes rows of our parameter.

    Args:
        key (`str`): Published key.
        layer (`int`, *optional*): Index on the first axis of a stacked array.
        layout (`str`): `"copy"`, `"transpose"` (kernels are (in, out)) or `"rope"` (transposed, rows reordered).
    """

    key: str
    layout: str
    layer: int | None = None


def policy_pieces(keys: Iterable[str], num_layers: int, fresh_segments: Iterable[str] = ()) -> dict[str, list[Piece]]:
    """
    Which published arrays make which parameter of the policy.

    Args:
        keys (`Iterable[str]`): Keys of the checkpoint.
        num_layers (`int`): Layers of the trunk.
        fresh_segments (`Iterable[str]`): Segments without arrays; pieces of the key `"fresh/<segment>"` stand there.

    Returns:
        `dict[str, list[Piece]]`: Pieces by our parameter name, to be concatenated on the first axis.

    Raises:
        ValueError: If keys are missing or left over; it names them all.
    """
    keys = set(keys)
    segments = [name for name in POLICY_SEGMENTS if name != "action" or keys & set(POLICY_SEGMENTS["action"])]
    embeddings, heads = [], []
    for segment in segments:
        embedding, head = POLICY_SEGMENTS[segment]
        if segment in fresh_segments:
            embeddings.append(Piece(f"fresh/{segment}/embedding", "copy"))
            heads.append(Piece(f"fresh/{segment}/head", "copy"))
        else:
            embeddings.append(Piece(embedding, "copy"))
            heads.append(Piece(head, "transpose"))
    pieces = {"model.embed_tokens.weight": embeddings}
    stacked = any(key.startswith(f"{STACKED_LAYERS}/") for key in keys)
    for layer in range(num_layers):
        prefix = STACKED_LAYERS if stacked else SINGLE_LAYER.format(layer=layer)
        for leaf, (name, layout) in POLICY_LAYER.items():
            pieces[f"model.layers.{layer}.{name}"] = [Piece(f"{prefix}/{leaf}", layout, layer if stacked else None)]
    pieces[FINAL_NORM[1]] = [Piece(FINAL_NORM[0], "copy")]
    pieces["lm_head.weight"] = heads
    _compare_keys(keys, {piece.key for parts in pieces.values() for piece in parts})
    return pieces


def _compare_keys(found: set[str], needed: set[str]) -> None:
    needed = {key for key in needed if not key.startswith("fresh/")}
    problems = [
        f"{len(keys)} {verb}: {', '.join(sorted(keys))}"
        for verb, keys in (("missing", needed - found), ("unknown", found - needed))
        if keys
    ]
    if problems:
        raise ValueError(f"The policy checkpoint has other keys than expected: {'; '.join(problems)}.")
