"""Tiny models of all families whose topology must be found: decoders, encoders, pairs of both, pictures and text.

See `tiny_towers` for what a case is.
"""

from __future__ import annotations

import torch
import transformers as hf
from tiny_decoders import DECODERS
from tiny_towers import (
    BASE,
    BATCH,
    DOWN,
    IMAGE,
    LENGTH,
    O_PROJ,
    POST_NORM,
    SANDWICH,
    UNGROUPED,
    VOCAB,
    Case,
    one,
    text,
    tower,
)

PAIR = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=56,
    decoder_ffn_dim=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
PLACES = dict(max_position_embeddings=64)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4
)
SIGLIP = (("self_attn.out_proj", "mlp.fc2"), {})


def pair():
    return text(decoder_input_ids=text()["input_ids"][:, :10])


def spoken():
    return {"input_features": torch.randn(BATCH, 8, 32), "decoder_input_ids": text()["input_ids"][:, :10]}


def pictured(n_tokens, shape, **changes):
    """A batch of text with a picture of so many tokens in each sequence."""
    batch = text()
    batch["input_ids"][:, 2 : 2 + n_tokens] = IMAGE
    return {**batch, "pixel_values": torch.randn(shape), **changes}


def encoder(family, attention, mlp, settings, **expected):
    return one(family, attention, mlp, settings, head="ForMaskedLM", stack="encoder", **expected)


def encoder_decoder(model_class, config_class, settings, *, inputs=pair, sum_fails=None):
    """BART and its kin."""

    def towers(c):
        def half(which, **cross):
            sizes = {"blocks": getattr(c, f"{which}_layers"), "heads": getattr(c, f"{which}_attention_heads")}
            return tower(c, "self_attn.out_proj", "fc2", sum_fails=sum_fails, **sizes, **cross)

        return {"encoder": half("encoder"), "decoder": half("decoder", cross="encoder_attn.out_proj")}

    return Case(build=lambda: model_class(config_class(**PAIR, **settings)), towers=towers, inputs=inputs)


def picture_and_text(build, vision, inputs, **expected):
    """`vision`: names of the writes in the vision tower's blocks, and what its configuration calls otherwise."""
    names, settings = vision
    return Case(
        build=build,
        towers=lambda c: {
            "vision": tower(c.vision_config, *names, **settings),
            "decoder": tower(c.get_text_config(), O_PROJ, DOWN, **expected),
        },
        inputs=inputs,
    )


def qwen_vl(family, vision, **text_settings):
    config = getattr(hf, family + "Config")
    rope = dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4))
    ids = dict(image_token_id=IMAGE, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59)
    vision = dict(depth=2, num_heads=3, patch_size=4, **vision)
    return lambda: getattr(hf, family + "ForConditionalGeneration")(
        config(text_config={**BASE, **rope, **text_settings}, vision_config=vision, **ids)
    )


def qwen_picture():
    patches, kinds = BATCH * 16, text()["input_ids"].new_zeros(BATCH, LENGTH)
    kinds[:, 2:6] = 1
    return pictured(4, (patches, 96), image_grid_thw=torch.tensor([[1, 4, 4]] * BATCH), mm_token_type_ids=kinds)


def llava():
    settings = dict(text_config=hf.LlamaConfig(**BASE, head_dim=12), vision_config=hf.CLIPVisionConfig(**VISION))
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**settings, image_token_index=IMAGE))


def gemma3():
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**BASE, head_dim=12, sliding_window=8),
        vision_config=hf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=58,
        eoi_token_index=59,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def idefics(family):
    text_config = hf.LlamaConfig(**BASE, head_dim=12)
    settings = dict(text_config=text_config, vision_config=VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    return lambda: getattr(hf, family + "ForConditionalGeneration")(getattr(hf, family + "Config")(**settings))


ENCODERS = {
    "bert": encoder("Bert", "attention.output.dense", "output.dense", UNGROUPED, sum_fails=POST_NORM),
    "roberta": encoder("Roberta", "attention.output.dense", "output.dense", UNGROUPED, sum_fails=POST_NORM),
    "electra": encoder(
        "Electra", "attention.output.dense", "output.dense", {**UNGROUPED, "embedding_size": 16}, sum_fails=POST_NORM
    ),
    "distilbert": encoder(
        "DistilBert",
        "attention.out_lin",
        "ffn.lin2",
        dict(vocab_size=VOCAB, dim=32, n_layers=3, n_heads=4, hidden_dim=56, max_position_embeddings=64),
        sum_fails=POST_NORM,
    ),
    "deberta v2": encoder(
        "DebertaV2",
        "attention.output.dense",
        "output.dense",
        {**UNGROUPED, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        sum_fails=POST_NORM,
    ),
    "modernbert": encoder(
        "ModernBert", "attn.Wo", "mlp.Wo", {**UNGROUPED, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
    ),
}

PAIRS = {
    "t5": Case(
        build=lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=12,
                d_ff=56,
                num_layers=3,
                num_decoder_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        towers=lambda c: {
            "encoder": tower(c, "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo", head_dim=c.d_kv),
            "decoder": tower(
                c,
                "layer.0.SelfAttention.o",
                "layer.2.DenseReluDense.wo",
                head_dim=c.d_kv,
                blocks=c.num_decoder_layers,
                cross="layer.1.EncDecAttention.o",
            ),
        },
        inputs=pair,
    ),
    "bart": encoder_decoder(hf.BartForConditionalGeneration, hf.BartConfig, PLACES, sum_fails=POST_NORM),
    "mbart": encoder_decoder(hf.MBartForConditionalGeneration, hf.MBartConfig, PLACES),
    "pegasus": encoder_decoder(hf.PegasusForConditionalGeneration, hf.PegasusConfig, PLACES),
    "marian": encoder_decoder(hf.MarianMTModel, hf.MarianConfig, PLACES, sum_fails=POST_NORM),
    "whisper": encoder_decoder(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        dict(num_mel_bins=8, max_source_positions=16, max_target_positions=64),
        inputs=spoken,
    ),
}

PICTURES = {
    "llava": picture_and_text(llava, SIGLIP, lambda: pictured(16, (BATCH, 3, 16, 16))),
    "qwen2 vl": picture_and_text(
        qwen_vl("Qwen2VL", dict(embed_dim=24, hidden_size=32, mlp_ratio=2, in_channels=3)),
        (("attn.proj", "mlp.fc2"), dict(blocks=2, width=24, heads=3)),
        qwen_picture,
    ),
    "qwen2.5 vl": picture_and_text(
        qwen_vl(
            "Qwen2_5_VL",
            dict(hidden_size=24, out_hidden_size=32, intermediate_size=40, window_size=16, fullatt_block_indexes=[1]),
        ),
        (("attn.proj", DOWN), dict(blocks=2, heads=3)),
        qwen_picture,
    ),
    "qwen3 vl": picture_and_text(
        qwen_vl(
            "Qwen3VL",
            dict(hidden_size=24, out_hidden_size=32, intermediate_size=40, deepstack_visual_indexes=[]),
            head_dim=8,
        ),
        (("attn.proj", "mlp.linear_fc2"), dict(blocks=2, heads=3)),
        qwen_picture,
    ),
    "gemma3": picture_and_text(gemma3, SIGLIP, lambda: pictured(4, (BATCH, 3, 16, 16)), sum_fails=SANDWICH),
    "idefics3": picture_and_text(idefics("Idefics3"), SIGLIP, lambda: pictured(4, (BATCH, 1, 3, 16, 16))),
    "smolvlm": picture_and_text(idefics("SmolVLM"), SIGLIP, lambda: pictured(4, (BATCH, 1, 3, 16, 16))),
}

CASES = {**DECODERS, **ENCODERS, **PAIRS, **PICTURES}


def build(name, seed=0):
    """The model of a case, ready to be run in any precision: the fast way through experts has no float64."""
    torch.manual_seed(seed)
    model = CASES[name].build().eval()
    model.set_experts_implementation("eager")
    return model
