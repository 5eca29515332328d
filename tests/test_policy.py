"""policy.py and model.py on any model: sampling, log-probabilities, pictures, FSDP2, saving."""

import math

import pytest
import torch
import transformers
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import amft
import fomaml
import policy
from data import embedded_examples, template
from games.play import Turn
from model import (
    World,
    auto_class,
    check_head,
    full,
    full_weights,
    layers_to_shard,
    load_config,
    load_weights,
    materialize,
    save_pretrained,
    set_gradients,
    skeleton,
)
from policy import Policy, Prompt, sample, sample_with_pictures
from tests.helpers import meta_gradient, one_rank_mesh, random_episodes, random_rows

# --------------------------------------------------------------------------------------------------
# Any Hugging Face causal language model


def random_config(family: str):
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "gpt_neox":
        settings["num_key_value_heads"] = 1
    if family in ("qwen3", "gemma3"):
        settings["head_dim"] = 16
    if family in ("gemma3", "mistral"):
        settings["sliding_window"] = 16
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma3": transformers.Gemma3TextConfig,
        "mistral": transformers.MistralConfig,
        "phi3": transformers.Phi3Config,
        "olmo2": transformers.Olmo2Config,
        "gpt_neox": transformers.GPTNeoXConfig,
    }
    return classes[family](**settings)


FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "olmo2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_lm(family, process_group, tmp_path):
    """With FSDP2: a lower loss after meta-steps on one meta-batch, a saved model that loads with
    the same logits, and a lower loss after steps of AMFT."""
    torch.manual_seed(0)
    config = random_config(family)
    source = AutoModelForCausalLM.from_config(config)
    model = skeleton(config)
    blocks = layers_to_shard(model)
    assert len(blocks) == 2
    mesh = one_rank_mesh()
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh["shard"])
    materialize(model, source, torch.device("cpu"))
    ids = torch.randint(3, 96, (2, 20))
    torch.testing.assert_close(model(ids).logits, source(ids).logits)

    world = World(torch.device("cpu"), mesh=mesh)
    losses = losses_of_meta_steps(model.train(), world)
    assert losses[2] < losses[0]

    _, tokenizer = load_config("tiny")
    weights = full_weights(model, torch.float32)
    save_pretrained(tmp_path, model, tokenizer, weights, torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits = model.eval()(ids).logits
    torch.testing.assert_close(saved(ids).logits, logits, rtol=1e-4, atol=1e-5)

    actor = Policy(skeleton(config), False)
    for module in (*layers_to_shard(actor.lm), actor):
        fully_shard(module, mesh=mesh["shard"])
    materialize(actor, Policy(source, False), torch.device("cpu"))
    check_head(actor, world)
    losses = losses_of_sft_steps(actor.train(), world)
    assert losses[2] < losses[0]


def losses_of_meta_steps(model, world: World) -> list[float]:
    """The query loss in three meta-steps on the same meta-batch."""
    episodes, tokens = random_episodes(2, 4, 4, vocab=96)
    args = fomaml.Args(inner_lr=0.05, support_batch=2, tasks_per_step=2)
    learner = fomaml.MetaLearner(model, args, world, 0, tokens)
    optimizer = torch.optim.AdamW(learner.params, lr=3e-3, fused=True)
    losses = []
    for _ in range(3):
        losses.append(meta_gradient(learner, learner.fomaml, episodes)[:, 1].mean().item())
        set_gradients(learner.params, learner.meta_gradient)
        norm = full(torch.nn.utils.clip_grad_norm_(learner.params, 1.0))
        assert math.isfinite(norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def losses_of_sft_steps(actor: Policy, world: World) -> list[float]:
    """The loss in three steps of imitation on the same rows."""
    args = amft.with_defaults(amft.Args(method="fixed", micro_batch=4))
    groups = [{"params": list(actor.parameters()), "lr": 1e-2, "peak": 1e-2}]
    learner = amft.PolicyLearner(args, actor, torch.optim.AdamW(groups), world, 0)
    rows = random_rows(6, vocab=96)
    amft.set_loss_weights(args, world, rows, [])
    losses = []
    for _ in range(3):
        gradient = learner.zeros()
        work = amft.Pass(rows, {"sft": (amft.sft_loss, 1.0)}, [(gradient, 1.0)])
        losses.append(learner.backward(work)["sft"])
        norm, taken = learner.take_step(gradient, 1.0)
        assert taken, f"a gradient of norm {norm}"
    return losses


# --------------------------------------------------------------------------------------------------
# Pictures

PICTURE = 190  # the token of a picture's place, of Qwen2.5-VL


def vision_model(family: str) -> tuple:
    """(a random model, prompt ids that hold a picture)."""
    text = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        vision |= {
            "depth": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        }
        config = transformers.Qwen2_5_VLConfig(
            text_config=text | {"num_hidden_layers": 2, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=PICTURE,
            vision_start_token_id=192,
            tie_word_embeddings=True,
        )
        ids = [5, 6, 192, PICTURE, PICTURE, PICTURE, PICTURE, 193, 7]
    else:
        vision |= {
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "max_num_tiles": 2,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        }
        config = transformers.MllamaConfig(
            text_config=text | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config=vision,
            image_token_index=200,
        )
        ids = [200, 5, 6, 7, 1]
    torch.manual_seed(0)
    lm = auto_class(config).from_config(config).eval()
    for name, p in lm.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.ones_(p)  # Mllama's pictures count for nothing at initialisation
    return lm, ids


def random_picture(family: str, before: int, ids: list[int]) -> dict:
    """What the processor would make of a picture in ids, `before` other tokens before them."""
    if family == "qwen2_5_vl":
        kinds = [0] * before + [int(x == PICTURE) for x in ids]
        return {
            "pixel_values": torch.randn(16, 1176),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": torch.tensor([kinds]),
        }
    sees = [[[0, 0]]] * before + [[[1, 0]]] * len(ids)
    return {
        "pixel_values": torch.randn(1, 1, 2, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.tensor([sees]),
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
def test_vision_models(family):
    """Prompts with pictures of different lengths in one batch: the policy's log-probabilities of
    the sampled tokens are the sampler's."""
    lm, ids = vision_model(family)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    prompts = [Prompt([9] * n + ids, random_picture(family, n, ids)) for n in (0, 3)]

    def draw(prompts: list[Prompt]):
        seeds = [1] * (2 * len(prompts))
        return sample_with_pictures(lm, tokenizer, prompts, 2, 6, 1.0, frozenset([2]), 8, seeds)

    samples = draw(prompts)
    rows = []
    for i, s in enumerate(samples):
        prompt = prompts[i // 2]
        turn = Turn(prompt.ids, s.ids, s.logprobs, s.finished, "", 1.0, prompt.inputs)
        rows.append(amft.Row(turn, [0.0] * len(s.ids)))
    batch = amft.collate_rows(rows, 0, torch.device("cpu"))
    logprobs, _, _ = Policy(lm, False)(batch["ids"], batch["mask"], **batch["inputs"])
    mask = batch["mask"]
    torch.testing.assert_close(logprobs[mask], batch["old"][mask], rtol=0, atol=1e-4)
    inverted = {"pixel_values": -prompts[0].inputs["pixel_values"]}
    changed = Prompt(prompts[0].ids, prompts[0].inputs | inverted)
    other = draw([changed])
    assert other[0].logprobs[0] != samples[0].logprobs[0], "the picture makes no difference"


# --------------------------------------------------------------------------------------------------
# The sampler


@pytest.fixture(scope="module")
def tiny_and_prompts():
    """(tiny, its tokenizer, the tokens that end a response, prompts)."""
    _, tokenizer = load_config("tiny")
    chat = template(tokenizer)
    texts = []
    for examples in embedded_examples(3, 1, "test", "heldout").values():
        texts += [chat.before + e.prompt + chat.after for e in examples]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return load_weights("tiny").eval(), tokenizer, chat.stop, prompts


def test_greedy_equals_generate(tiny_and_prompts):
    """Our sampler at temperature 0 and transformers' generate give the same tokens, prompts of
    different lengths in one batch."""
    model, tokenizer, stop, prompts = tiny_and_prompts
    ours = sample(
        model, tokenizer, prompts, max_new_tokens=40, temperature=0, stop=stop, batch_size=8
    )
    for prompt, got in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=40, do_sample=False)[0]
        expected = out[len(prompt) :].tolist()
        assert got.ids == expected
        assert got.finished == (expected[-1] in stop)


def test_sampler(tiny_and_prompts):
    """Log-probabilities equal a fresh forward's; the same tokens for a seed however the prompts are
    batched; the right distribution."""
    model, tokenizer, stop, prompts = tiny_and_prompts

    def draw(seed: int, batch_size: int = 128):
        generator = torch.Generator().manual_seed(seed)
        return sample(
            model,
            tokenizer,
            prompts[:6],
            samples_per_prompt=4,
            max_new_tokens=24,
            generator=generator,
            stop=stop,
            batch_size=batch_size,
        )

    one, other = draw(1, batch_size=8), draw(1, batch_size=64)
    assert sum(a.ids == b.ids for a, b in zip(one, other, strict=True)) >= 23
    assert [a.ids for a in one] != [b.ids for b in draw(2)]
    for i, s in enumerate(one):
        prompt = prompts[i // 4]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + s.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(s.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, rtol=0, atol=1e-4)
    uniform_numbers_are_uniform()
    wide_draws_invert_the_distribution()
    draws_have_their_frequencies()


def uniform_numbers_are_uniform():
    streams = torch.arange(40_000)
    u, v = policy._uniform(streams, 5), policy._uniform(streams, 6)
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 0.02


def wide_draws_invert_the_distribution():
    """Several blocks of the vocabulary: the token is the inverse of the running sum."""
    wide = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 3
    cumulative = wide.double().softmax(-1).cumsum(-1)
    for x in torch.linspace(0, 0.9999, 50):
        token, logprob = policy._draw(wide, x.double().expand(3), 1.0, 1.0)
        for i, t in enumerate(token):
            assert cumulative[i, t] > x - 1e-5
            if t > 0:
                assert cumulative[i, t - 1] < x + 1e-5
        expected = wide.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        torch.testing.assert_close(logprob, expected)


def draws_have_their_frequencies():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, 4)
    u = policy._uniform(torch.arange(40_000), 5)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        p = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            p = torch.tensor([0.0, p[1], p[2], 0.0]) / (p[1] + p[2])  # 0.24 + 0.64 reach 0.8
        token, _ = policy._draw(logits, u, temperature, top_p)
        frequency = torch.bincount(token, minlength=4) / 40_000
        torch.testing.assert_close(frequency, p, rtol=0, atol=0.01)
