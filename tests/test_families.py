"""Models of many families, tiny and with random weights: the sampler against the full forward, a
step of each algorithm; and families that are refused."""

import json
import math

import pytest
import torch
from transformers import AutoConfig

import amft
import fomaml
import meta_lora
from learner import PolicyLearner
from lora import Adapters, linear_layers
from model import ModelError, World, auto_class, check_head, load_config, turn_off_dropout
from policy import Policy, sample
from tests.helpers import (
    meta_gradient,
    one_rank_mesh,
    random_episodes,
    random_rows,
    save_small_model,
)

VOCAB = 96
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
FAMILIES = {
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"num_experts": 2, "shared_expert_intermediate_size": 16} | LINEAR | EXPERTS,
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "gpt2": {"n_inner": 48, "n_positions": 256},
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 16},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "qwen2_5_vl": {
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
}
PICTURES = ("gemma3", "qwen2_5_vl")
CPU = torch.device("cpu")


class Tokenizer:
    """What the sampler asks of one."""

    pad_token_id, eos_token_id = 0, 2


def random_model(family: str):
    """With weights large enough that its distribution is far from uniform."""
    settings = FAMILIES[family]
    if family not in PICTURES:
        settings = TEXT | settings
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3.0)
    return model


def assert_sampler_is_the_model(model) -> None:
    """The log-probabilities of sampled tokens are those of a forward over the whole text, alone."""
    model.eval()
    prompts = [[5, 6, 7, 8, 9], [4, 3, 7], [9, 8, 7, 6, 5], [11] * 40]
    generator = torch.Generator().manual_seed(1)
    samples = sample(model, Tokenizer, prompts, 3, 12, generator=generator)
    assert len(samples) == 12
    assert {s.finished for s in samples} == {True, False}, "none ended early: rows never left"
    policy = Policy(model, False)
    for i, s in enumerate(samples):
        assert len(s.ids) == 12 or s.ids[-1] == 2
        prompt = prompts[i // 3]
        ids = torch.tensor([prompt + s.ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            mask = torch.arange(1, ids.shape[1])[None] >= len(prompt)
            of_policy = policy(ids, mask)[0][mask]
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(of_policy, expected, rtol=0, atol=1e-4)


def norm_of(gradients: list[torch.Tensor]) -> float:
    return torch.nn.utils.get_total_norm(gradients).item()


def meta_learner_norm(model, world: World) -> float:
    episodes, tokens = random_episodes(2, 4, 4, vocab=90)  # no tokens of pictures
    args = fomaml.Args(inner_lr=0.05, inner_optimizer="sgd", support_batch=2, tasks_per_step=2)
    learner = fomaml.MetaLearner(model.train(), args, world, 0, tokens)
    losses = meta_gradient(learner, learner.fomaml, episodes)
    assert bool(losses.isfinite().all())
    return norm_of(learner.meta_gradient)


def policy_learner_norm(model, world: World) -> float:
    args = amft.with_defaults(amft.Args(method="fixed", micro_batch=3))
    policy = Policy(model, False)
    turn_off_dropout(policy)
    check_head(policy, world)
    still = {"params": list(policy.parameters()), "lr": 0.0, "peak": 0.0}
    learner = PolicyLearner(args, policy.train(), torch.optim.AdamW([still]), world, 0)
    shown = random_rows(2, 2, vocab=90, demonstration=True)
    step = amft.train_on(
        learner, 0.5, shown, random_rows(4, 1, vocab=90), schedule=1.0, with_D=False
    )
    assert step.finite
    assert step.norm == pytest.approx(norm_of(step.G), rel=1e-4)
    return step.norm


def adapter_learner_norm(model, world: World) -> float:
    episodes, tokens = random_episodes(2, 4, 4, vocab=90)
    args = meta_lora.Args(support_batch=2, tasks_per_step=2)
    there = {name.split(".")[-1] for name in linear_layers(model)}
    adapters = Adapters(
        model.requires_grad_(False),
        r=2,
        alpha=4,
        dropout=0.0,
        target_modules=sorted(there.intersection(args.target_modules)),
        rank_stabilised=False,
        seed=0,
        device=CPU,
    )
    assert adapters.layers
    for name in adapters.layers:
        assert "vision" not in name
        assert "visual" not in name
    learner = meta_lora.AdapterLearner(model, adapters, args, world, 0, tokens)
    losses = learner.fomaml(episodes)
    assert bool(torch.stack(losses).isfinite().all())
    return norm_of(learner.meta_gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, process_group):
    """The sampler's log-probabilities are the model's; a step of each algorithm has a finite
    gradient that is not 0."""
    model, world = random_model(family), World(CPU, mesh=one_rank_mesh())
    assert_sampler_is_the_model(model)
    norms = {
        "MetaLearner": meta_learner_norm(model, world),
        "PolicyLearner": policy_learner_norm(model, world),
    }
    if family != "gpt2":  # its layers are no torch.nn.Linear, which meta_lora.py says
        norms["AdapterLearner"] = adapter_learner_norm(model, world)
    for name, norm in norms.items():
        assert math.isfinite(norm), name
        assert norm > 1e-3, name


REFUSED = {
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "head_dim": 16},
}


@pytest.mark.parametrize("family", REFUSED)
def test_state_space_models_are_refused(family, tmp_path):
    """One line when the configuration is read."""
    save_small_model(tmp_path)
    config = AutoConfig.for_model(family, **REFUSED[family])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ModelError, match=f"is a {family} model, without attention") as error:
        load_config(str(tmp_path))
    assert "\n" not in str(error.value)
