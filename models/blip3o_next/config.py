"""Check a model folder's config.json: every size has bounds, and no setting is one that this code would not honour.

Whatever is not listed is refused, not handed on: transformers would fetch and run a kernel of the hub that
`attn_implementation` names, and settings that only half of the code knows would draw other pictures in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, model_validator

from imagerl.models.common.settings import Dropout, SamplingSettings, Settings
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import MAX_PIXELS

Width = Annotated[int, Field(ge=1, le=1 << 17)]
Heads = Annotated[int, Field(ge=1, le=1 << 10)]
Layers = Annotated[int, Field(ge=1, le=1 << 9)]
Side = Annotated[int, Field(ge=1, le=1 << 12)]  # of a picture or a grid of latents
Epsilon = Annotated[float, Field(ge=1e-12, le=0.1)]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]
Tuple = Strict(False)  # JSON has lists, our own code tuples
Pair = Annotated[tuple[Side, Side], Tuple]  # height, width
Blocks = Annotated[list[Width], Tuple, Field(min_length=1, max_length=10)]
BlockLayers = Annotated[list[Annotated[int, Field(ge=0, le=64)]], Tuple]
BlockType = Literal["ResBlock", "EfficientViTBlock"]
Norm = Literal["rms_norm", "batch_norm"]
Activation = Literal["silu", "relu", "relu6", "gelu"]
BlockTypes = BlockType | Annotated[list[BlockType], Tuple]
Kernel = Annotated[int, Field(ge=1, le=31)]
Multiscales = Annotated[list[Annotated[list[Kernel], Tuple]], Tuple]


class DiffusersSettings(Settings):
    """Settings of a diffusers class, which may stand beside its name."""

    @model_validator(mode="before")
    @classmethod
    def _without_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {
            key: value for key, value in values.items() if key not in ("_class_name", "_diffusers_version")
        }


class Rope(Settings):
    rope_type: Literal["default"] = "default"
    rope_theta: float = Field(10000.0, ge=1, le=1e12)


class Qwen3Settings(Settings):
    """Fields of transformers' `Qwen3Config`, with its defaults where they count. What the sampler does not repeat
    (biases, windows, other activations, stretched positions) has one value."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads = 32
    head_dim: int = Field(128, ge=2, le=1 << 12, multiple_of=2)
    vocab_size: int = Field(151936, ge=1, le=1 << 24)
    max_position_embeddings: int = Field(32768, ge=1, le=1 << 22)
    rope_parameters: Rope | None = None
    rope_theta: float = Field(10000.0, ge=1, le=1e12)
    rope_scaling: None = None
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    attention_dropout: Dropout = 0.0
    use_sliding_window: Literal[False] = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    use_cache: bool = True
    initializer_range: float = Field(0.02, ge=0, le=1)
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None

    @model_validator(mode="after")
    def _groups(self) -> Qwen3Settings:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} num_attention_heads cannot share {self.num_key_value_heads} "
                "num_key_value_heads evenly"
            )
        return self


class SanaSettings(DiffusersSettings):
    """Arguments of diffusers' `SanaTransformer2DModel`. `models.blip3o_next.flow_decoder` gives it no guidance to
    embed, and times a thousand."""

    in_channels: Width
    out_channels: Width | None = 32
    num_attention_heads: Heads = 70
    attention_head_dim: Width = 32
    num_layers: Layers = 20
    num_cross_attention_heads: Heads = 20
    cross_attention_head_dim: Width = 112
    cross_attention_dim: Width = 2240
    caption_channels: Width
    mlp_ratio: float = Field(2.5, gt=0, le=64)
    dropout: Dropout = 0.0
    attention_bias: bool = False
    sample_size: Side = 32
    patch_size: Annotated[int, Field(ge=1, le=32)] = 1
    norm_elementwise_affine: bool = False
    norm_eps: Epsilon = 1e-6
    interpolation_scale: Annotated[int, Field(ge=1, le=64)] | None = None
    guidance_embeds: Literal[False] = False
    guidance_embeds_scale: float = 0.1
    qk_norm: Literal["rms_norm_across_heads"] | None = None
    timestep_scale: Annotated[float, Field(ge=1, le=1)] = 1.0

    @property
    def inner(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @model_validator(mode="after")
    def _fits(self) -> SanaSettings:
        if (self.out_channels or self.in_channels) != self.in_channels:
            raise ValueError("out_channels must be in_channels: a velocity has the shape of its latents")
        if self.cross_attention_dim != self.inner:
            raise ValueError(
                f"cross_attention_dim is {self.cross_attention_dim}, but num_attention_heads times "
                f"attention_head_dim is {self.inner}"
            )
        if self.interpolation_scale is not None and self.sample_size**2 * self.inner > 1 << 26:
            raise ValueError("sample_size is so large that the embedding of places does not fit in memory")
        return self


class VaeSettings(DiffusersSettings):
    """Arguments of diffusers' `AutoencoderDC`."""

    in_channels: Literal[3] = 3
    latent_channels: Width = 32
    attention_head_dim: Width = 32
    encoder_block_types: BlockTypes = "ResBlock"
    decoder_block_types: BlockTypes = "ResBlock"
    encoder_block_out_channels: Blocks
    decoder_block_out_channels: Blocks
    encoder_layers_per_block: BlockLayers
    decoder_layers_per_block: BlockLayers
    encoder_qkv_multiscales: Multiscales
    decoder_qkv_multiscales: Multiscales
    upsample_block_type: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    downsample_block_type: Literal["pixel_unshuffle", "Conv", "conv"] = "pixel_unshuffle"
    decoder_norm_types: Norm | Annotated[list[Norm], Tuple] = "rms_norm"
    decoder_act_fns: Activation | Annotated[list[Activation], Tuple] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Activation = "relu"
    scaling_factor: float = Field(1.0, ge=1e-4, le=1e4)

    @model_validator(mode="after")
    def _blocks(self) -> VaeSettings:
        count = len(self.encoder_block_out_channels)
        for name, value in self:
            if isinstance(value, list) and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries, encoder_block_out_channels {count}")
        return self

    @property
    def compression(self) -> int:
        """Pixels of a side that a latent stands for."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


class SchedulerSettings(DiffusersSettings):
    num_train_timesteps: int = Field(1000, ge=1, le=1_000_000)
    shift: float = Field(1.0, gt=0, le=1000)


class FsqSettings(Settings):
    """See `models.common.image_tokenizer.FSQTokenizerConfig`."""

    image_size: Pair
    patch: Pair
    width: int = Field(ge=8, le=1 << 14, multiple_of=8)  # 8 groups of channels are normalised
    depth: int = Field(ge=0, le=256)
    levels: Annotated[
        list[Annotated[int, Field(ge=2, le=1 << 16)]], Tuple, Field(min_length=1, max_length=16)
    ]

    @model_validator(mode="after")
    def _whole_patches(self) -> FsqSettings:
        if any(side % part for side, part in zip(self.image_size, self.patch, strict=True)):
            raise ValueError(f"pictures of {self.image_size} are no whole number of patches of {self.patch}")
        return self

    @property
    def codes(self) -> int:
        return math.prod(self.levels)


class SiglipSettings(Settings):
    """Fields of transformers' `SiglipVisionConfig`."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    image_size: Annotated[int, Field(ge=1, le=1 << 11)]
    patch_size: Annotated[int, Field(ge=1, le=1 << 11)]
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu_pytorch_tanh", "gelu", "silu", "relu"] = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6
    attention_dropout: Dropout = 0.0
    vision_use_head: bool = True

    @model_validator(mode="after")
    def _fits(self) -> SiglipSettings:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} has no {self.num_attention_heads} equal heads")
        if self.patch_size > self.image_size:
            raise ValueError("a patch cannot be larger than the picture")
        return self


class SimVQArguments(Settings):
    """The two arguments that reading depends on; published ones hold more, of their training."""

    model_config = ConfigDict(extra="ignore")

    codebook_size: int = Field(ge=1, le=1 << 24)
    l2_normalized: bool = False


class Regularizer(Settings):
    name: Literal["simvq"]
    args: SimVQArguments


class BottleneckSettings(Settings):
    bottleneck_dim: Width
    regularizer: Regularizer


class TATokSettings(Settings):
    """See `models.blip3o_next.ta_tok`."""

    siglip: SiglipSettings
    bottleneck: BottleneckSettings
    decoder_depth: Layers = 3

    @property
    def codes(self) -> int:
        return self.bottleneck.regularizer.args.codebook_size


class ModelSettings(Settings):
    """config.json in our form. Keys that are not listed here have no meaning, at this level only."""

    model_config = ConfigDict(extra="ignore")

    qwen3: Qwen3Settings
    sana: SanaSettings
    vae: VaeSettings
    scheduler: SchedulerSettings
    sampling: SamplingSettings
    latent_size: Pair
    num_image_positions: int = Field(ge=1, le=1 << 16)
    image_tokenizer: FsqSettings | None = None
    ta_tok: TATokSettings | None = None
    edit: bool = False
    image_start_tag_id: TokenId
    image_end_tag_id: TokenId
    scale_start_token_id: TokenId
    scale_end_token_id: TokenId
    num_scale_tokens: int = Field(ge=1, le=1 << 10)
    image_start_token_id: TokenId
    image_end_token_id: TokenId
    num_image_tokens: int = Field(ge=1, le=1 << 24)

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelSettings:
        highest = max(value for name, value in self if name.endswith("_id"))
        if highest >= self.qwen3.vocab_size:
            raise ValueError(f"token {highest} is beyond qwen3.vocab_size, {self.qwen3.vocab_size}")
        if self.num_image_positions >= self.qwen3.max_position_embeddings:
            raise ValueError(
                f"qwen3.max_position_embeddings is {self.qwen3.max_position_embeddings}: no room for a prompt and "
                f"{self.num_image_positions} image tokens"
            )
        if self.sana.in_channels != self.vae.latent_channels:
            raise ValueError(
                f"sana.in_channels is {self.sana.in_channels}, vae.latent_channels {self.vae.latent_channels}"
            )
        height, width = self.latent_size
        if height % self.sana.patch_size or width % self.sana.patch_size:
            raise ValueError(f"latent_size {self.latent_size} is no whole number of sana.patch_size")
        if height * width * self.vae.compression**2 > MAX_PIXELS:
            raise ValueError(
                f"latent_size {self.latent_size} makes pictures of more than {MAX_PIXELS} pixels"
            )
        for name in ("image_tokenizer", "ta_tok"):
            tokenizer = getattr(self, name)
            if tokenizer is not None and tokenizer.codes != self.num_image_tokens:
                raise ValueError(
                    f"{name} has {tokenizer.codes} codes, num_image_tokens is {self.num_image_tokens}"
                )
        return self


class PublishedSettings(Settings):
    """The fields of a flat, published config.json that are read before it is brought into our form."""

    model_config = ConfigDict(extra="ignore")

    rope_parameters: Rope | None = None
    rope_theta: float | None = Field(None, ge=1, le=1e12)
    rope_scaling: None = None
    imagerl: dict[str, Any] | None = None


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Refuse a config in our form that describes no model that can be built and can draw.

    Raises ImageRLError, beginning with `place`, with the first key that is wrong and what should stand there."""
    validated(ModelSettings, dict(config), place)
