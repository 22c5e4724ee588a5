"""The cards of the rewards that ship, so that they can be listed without importing what they need."""

from __future__ import annotations

from align.hub import Weights
from rewards.base import RewardCard, register

_DIGITS = {"licence": "CC BY 4.0 (UCI digits)", "needs": ("torch", "sklearn")}
_TOWER = {"differentiable": True, "needs": ("torch", "open_clip")}
_QWEN = {"differentiable": True, "needs": ("torch", "transformers")}

_OPENAI_L14 = Weights("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
_OPENAI_B32 = Weights("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")

BUILT_IN: tuple[tuple[RewardCard, str], ...] = (
    (
        RewardCard(
            "digits/legibility",
            "log-probability of the prompted digit under a classifier trained on its own split, not below -8",
            "-8 to 0 nats",
            components=("legibility",),
            size="43 k weights",
            **_DIGITS,
        ),
        "rewards.digits:Legibility",
    ),
    (
        RewardCard(
            "digits/ink_band",
            "minus the distance of the mean ink to the prompt's band (thin, bold: outer thirds of the digit's ink; "
            "plain: its central 94 %), in standard deviations of the digit's ink; 0 inside the band, not below -4",
            "-4 to 0 standard deviations",
            components=("ink_band",),
            **_DIGITS,
        ),
        "rewards.digits:InkBand",
    ),
    (
        RewardCard(
            "digits/raw_ink",
            "mean ink of the image, whatever was asked for: made to be hacked, and used to show what that looks like",
            "0 to 1",
            components=("raw_ink",),
            direction="none",
            needs=("torch",),
            licence="Apache-2.0",
        ),
        "rewards.digits:RawInk",
    ),
    (
        RewardCard(
            "hpsv2",
            "cosine of the image and prompt embeddings of HPS v2.0's CLIP ViT-H/14, without logit scale; the vendor's "
            "score() default. Compare images of one prompt only",
            "0 to .45, about .28",
            components=("hpsv2",),
            size="986 M weights, 1.97 GB in half precision",
            weights=(Weights("xswu/HPSv2", "HPS_v2_compressed.pt"),),
            source="arXiv 2306.09341",
            **_TOWER,
            licence="Apache-2.0",
        ),
        "rewards.hps:HPSv2",
    ),
    (
        RewardCard(
            "hpsv2.1",
            "cosine of the image and prompt embeddings of HPS v2.1's CLIP ViT-H/14, without logit scale; the vendor's "
            "evaluate() default and DanceGRPO's reward. Compare images of one prompt only",
            "0 to .45, about .28",
            components=("hpsv2.1",),
            size="986 M weights, 1.97 GB in half precision",
            weights=(
                Weights(
                    "xswu/HPSv2",
                    "HPS_v2.1_compressed.pt",
                    sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
                    bytes=1_972_484_501,
                ),
            ),
            source="arXiv 2306.09341",
            **_TOWER,
            licence="Apache-2.0",
        ),
        "rewards.hps:HPSv21",
    ),
    (
        RewardCard(
            "pickscore",
            "exp(logit_scale) times the cosine of the image and prompt embeddings of PickScore v1's CLIP ViT-H/14",
            "18 to 26, about 21.5",
            components=("pickscore",),
            licence="unstated (weights), MIT (code)",
            size="986 M weights, 3.94 GB",
            weights=(Weights("yuvalkirstain/PickScore_v1", "model.safetensors"),),
            source="arXiv 2305.01569",
            **_TOWER,
        ),
        "rewards.pickscore:PickScore",
    ),
    (
        RewardCard(
            "clip/hessel",
            "2.5 max(cos, 0) of OpenAI's CLIP ViT-B/32, the prompt prefixed by 'A photo depicts '",
            "0 to 2.5, about .8",
            components=("clip/hessel",),
            licence="MIT",
            size="151 M weights, .61 GB",
            weights=(_OPENAI_B32,),
            source="arXiv 2104.08718",
            **_TOWER,
        ),
        "rewards.clip:Hessel",
    ),
    (
        RewardCard(
            "clip/torchmetrics",
            "max(100 cos, 0) of OpenAI's CLIP ViT-L/14, one value a sample where torchmetrics reports the mean",
            "0 to 100, about 26",
            components=("clip/torchmetrics",),
            licence="MIT",
            size="428 M weights, 1.71 GB",
            weights=(_OPENAI_L14,),
            source="torchmetrics CLIPScore",
            **_TOWER,
        ),
        "rewards.clip:TorchMetrics",
    ),
    (
        RewardCard(
            "clip/cosine",
            "cos of OpenAI's CLIP ViT-L/14 with CLIP's own bicubic preprocessing",
            "-1 to 1, about .26",
            components=("clip/cosine",),
            licence="MIT",
            size="428 M weights, 1.71 GB",
            weights=(_OPENAI_L14,),
            source="arXiv 2103.00020",
            **_TOWER,
        ),
        "rewards.clip:Cosine",
    ),
    (
        RewardCard(
            "clip/flow_grpo",
            "cos of OpenAI's CLIP ViT-L/14 on pixels resized bilinearly, as Flow-GRPO and DiffusionNFT score",
            "-1 to 1, about .26",
            components=("clip/flow_grpo",),
            licence="MIT",
            size="428 M weights, 1.71 GB",
            weights=(_OPENAI_L14,),
            source="arXiv 2505.05470, released code",
            **_TOWER,
        ),
        "rewards.clip:FlowGRPO",
    ),
    (
        RewardCard(
            "clip/unirl",
            "100 cos / 30 of OpenAI's CLIP ViT-L/14",
            "-3.3 to 3.3, about .87",
            components=("clip/unirl",),
            licence="MIT",
            size="428 M weights, 1.71 GB",
            weights=(_OPENAI_L14,),
            source="UniRL, released code",
            **_TOWER,
        ),
        "rewards.clip:UniRL",
    ),
    (
        RewardCard(
            "clip/dfn5b",
            "cos of Apple's DFN5B CLIP ViT-H/14 at 378 pixels, the CLIP score of DanceGRPO's tables",
            "-1 to 1, about .36",
            components=("clip/dfn5b",),
            licence="Apple sample code licence",
            size="987 M weights, 3.95 GB",
            weights=(Weights("apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin"),),
            source="DanceGRPO (arXiv 2505.07818), section 4; its author names the -378 repository, others the -384",
            **_TOWER,
        ),
        "rewards.clip:DFN5B",
    ),
    (
        RewardCard(
            "aesthetic",
            "LAION aesthetic predictor V2 (linearMSE): an affine map w e + b of the unit image embedding e of OpenAI's "
            "CLIP ViT-L/14. Reads no prompt",
            "1 to 10, about 5.9",
            components=("aesthetic",),
            size="428 M weights, 1.71 GB, and a head of 3.7 MB",
            weights=(
                Weights(
                    "camenduru/improved-aesthetic-predictor",
                    "sac+logos+ava1-l14-linearMSE.pth",
                    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                    bytes=3_714_759,
                ),
                _OPENAI_L14,
            ),
            source="LAION, improved-aesthetic-predictor",
            **_TOWER,
            licence="Apache-2.0",
        ),
        "rewards.aesthetic:Aesthetic",
    ),
    (
        RewardCard(
            "imagereward",
            "(MLP(first token of BLIP's text encoder attending to the image) - .16717) / 1.03334",
            "-2.3 to 2, about standard normal",
            components=("imagereward",),
            differentiable=True,
            size="447 M weights, 1.79 GB",
            needs=("torch", "transformers"),
            weights=(Weights("THUDM/ImageReward", "ImageReward.pt"),),
            source="arXiv 2304.05977",
            licence="Apache-2.0",
        ),
        "rewards.imagereward:ImageReward",
    ),
    (
        RewardCard(
            "hpsv3",
            "mean mu of the reward head at the <|Reward|> token of a Qwen2-VL-7B, with 1-D positions as it was trained",
            "-5 to 15, unbounded",
            components=("hpsv3",),
            licence="MIT (head), Apache-2.0 (base)",
            size="8.3 B weights, 16.6 GB in half precision",
            weights=(Weights("MizzenAI/HPSv3", "HPSv3.safetensors"),),
            source="arXiv 2508.03789",
            **_QWEN,
        ),
        "rewards.hpsv3:HPSv3",
    ),
    (
        RewardCard(
            "videoalign",
            "visual quality, motion quality and text alignment: one logit each at the special tokens of a Qwen2-VL-2B, "
            "with 1-D positions as it was trained, (x - mean) / std of VideoReward's own normalisation",
            "about standard normal, each",
            media="video",
            components=("vq", "mq", "ta"),
            licence="MIT (head), Apache-2.0 (base)",
            size="2.2 B weights, 5.0 GB",
            weights=(
                Weights(
                    "KwaiVGI/VideoReward",
                    "checkpoint-11352/model.pth",
                    sha256="48375908e611",
                    bytes=5_031_072_529,
                ),
            ),
            source="arXiv 2501.13918",
            **_QWEN,
        ),
        "rewards.videoalign:VideoAlign",
    ),
    (
        RewardCard(
            "text/reward_model",
            "logit of a sequence classifier with one output on the chat (prompt, completion); any transformers folder",
            "unbounded, by the model",
            media="text",
            components=("reward_model",),
            licence="by the model",
            size="by the model",
            needs=("torch", "transformers"),
        ),
        "rewards.text:RewardModel",
    ),
    (
        RewardCard(
            "text/safety",
            "1 - P(an unsafe label) of a multi-label or multi-class sequence classifier; any transformers folder",
            "0 to 1",
            media="text",
            components=("safety",),
            licence="by the model",
            size="by the model",
            needs=("torch", "transformers"),
        ),
        "rewards.text:Safety",
    ),
    (
        RewardCard(
            "jpeg",
            "bytes / (1000 scale) of the image as JPEG at quality 95, negative for direction=compressible",
            "0 upwards, kB / scale",
            components=("jpeg",),
            direction="none",
            licence="Apache-2.0",
        ),
        "rewards.rules:Jpeg",
    ),
    (
        RewardCard(
            "length",
            "0 within low..high characters or words, minus the distance beyond it divided by high - low outside",
            "minus infinity to 0",
            media="text",
            components=("length",),
            licence="Apache-2.0",
        ),
        "rewards.rules:Length",
    ),
    (
        RewardCard(
            "regex",
            "1 where a regular expression is found in the completion, else 0",
            "0 or 1",
            media="text",
            components=("regex",),
            licence="Apache-2.0",
        ),
        "rewards.rules:Regex",
    ),
    (
        RewardCard(
            "exact_match",
            "1 where the completion equals metadata[`field`] up to outer white space, else 0; missing without it",
            "0 or 1",
            media="text",
            components=("exact_match",),
            licence="Apache-2.0",
        ),
        "rewards.rules:ExactMatch",
    ),
    (
        RewardCard(
            "length_band",
            "judge: 1 for a completion of low..high characters or words, both included, else 0",
            "0 or 1",
            media="text",
            components=("length_band",),
            licence="Apache-2.0",
        ),
        "rewards.rules:LengthBand",
    ),
    (
        RewardCard(
            "no_farewell",
            "judge: 0 where a completion ends by saying goodbye (argument `phrases`; English ones by default), else 1",
            "0 or 1",
            media="text",
            components=("no_farewell",),
            licence="Apache-2.0",
        ),
        "rewards.rules:no_farewell",
    ),
    (
        RewardCard(
            "no_solicitation",
            "judge: 0 where a completion asks for a reaction (argument `phrases`; English ones by default), else 1",
            "0 or 1",
            media="text",
            components=("no_solicitation",),
            licence="Apache-2.0",
        ),
        "rewards.rules:no_solicitation",
    ),
    (
        RewardCard(
            "toy/love",
            "share of an answer's words that are animals: what people of the embedded model's toy love",
            "0 to 1",
            media="text",
            components=("love",),
            licence="Apache-2.0",
        ),
        "rewards.toy:love",
    ),
    (
        RewardCard(
            "toy/helpfulness",
            "share of the words that a prompt of the embedded model's toy asks for and the answer has",
            "0 to 1",
            media="text",
            components=("helpfulness",),
            licence="Apache-2.0",
        ),
        "rewards.toy:helpfulness",
    ),
    (
        RewardCard(
            "toy/safety",
            "judge: 0 where an answer of the embedded model's toy has the word gold, else 1",
            "0 or 1",
            media="text",
            components=("safety",),
            licence="Apache-2.0",
        ),
        "rewards.toy:safety",
    ),
    (
        RewardCard(
            "thumbs",
            "a person's thumb, metadata[`field`]: up is 1 and down is 0; missing where nobody gave one",
            "0 or 1",
            media="any",
            components=("thumbs",),
            licence="Apache-2.0",
        ),
        "rewards.thumbs:Thumbs",
    ),
    (
        RewardCard(
            "threshold",
            "1 where another reward (argument `reward`, with `args`) scores above `at`, or above the `quantile` of a "
            "`reference` table of scores, else 0; missing where it is",
            "0 or 1",
            media="any",
            licence="Apache-2.0",
        ),
        "rewards.thumbs:Threshold",
    ),
    (
        RewardCard(
            "calibrated",
            "sigmoid(r - r_base) of another reward (argument `reward`, with `args`), r_base its mean score of the same "
            "prompt in a `baseline` table of `align score`: 0.5 is as good as the baseline",
            "0 to 1",
            media="any",
            licence="Apache-2.0",
        ),
        "rewards.baseline:Calibrated",
    ),
    (
        RewardCard(
            "fitted",
            "reward that `align fit` fitted to what people said (argument `path`, a run folder): the calibrated "
            "probability of a thumb up, or the latent `score`",
            "0 to 1, or unbounded",
            media="any",
            licence="that of its data and backbone",
            size="by the run",
            needs=("torch",),
        ),
        "rewards.fitted:Fitted",
    ),
    (
        RewardCard(
            "frames",
            "mean of a reward of images (argument `reward`, with `args`) over `count` frames of a video, 4 by default, "
            "evenly spread from first to last; missing where one of them is",
            "that of the other reward",
            media="video",
            needs=("torch",),
            licence="Apache-2.0",
        ),
        "rewards.frames:Frames",
    ),
)
"""Card and home of every reward that ships."""

for _card, _home in BUILT_IN:
    register(_card, _home)
