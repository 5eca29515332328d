"""policy.py and model.py on any model: sampling, log-probabilities, pictures, FSDP2, saving."""

import itertools
import math
import types

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
from learner import Pass, PolicyLearner, Row, collate_rows
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
from tests.helpers import (
    meta_gradient,
    one_rank_mesh,
    random_episodes,
    random_rows,
    small_llama,
)

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
    learner = PolicyLearner(args, actor, torch.optim.AdamW(groups), world, 0)
    rows = random_rows(6, vocab=96)
    amft.set_loss_weights(args, world, rows, [])
    losses = []
    for _ in range(3):
        gradient = learner.zeros()
        work = Pass(rows, {"sft": (amft.sft_loss, 1.0)}, [(gradient, 1.0)])
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
        rows.append(Row(turn, [0.0] * len(s.ids)))
    batch = collate_rows(rows, 0, torch.device("cpu"))
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


def test_an_answer_is_without_the_token_that_ended_it():
    assert policy.Sample([3, 4, 2], [0.0] * 3, True).answer == [3, 4]
    assert policy.Sample([3, 4, 5], [0.0] * 3, False).answer == [3, 4, 5]


def splitmix64(seed: int, t: int) -> float:
    """Number t of the stream of a seed, as published: in unsigned 64 bits, the upper 53 kept."""
    z = (seed + (t + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_streams_are_splitmix64():
    seeds = [0, 1, 42, 2**62 - 1, -1, -(2**62), 123456789012345]
    for t in (0, 1, 7, 1000):
        got = policy._uniform(torch.tensor(seeds), t)
        assert got.tolist() == [splitmix64(seed, t) for seed in seeds]


def test_a_running_sum_is_inverted():
    """A weight of 0 is never chosen; what lies at a boundary belongs to the next; the last one for
    what rounding has put beyond the sum."""
    weights = torch.tensor([[1.0, 0, 2, 1, 0]]).expand(6, 5)
    target = torch.tensor([0.0, 0.5, 1.0, 2.9, 3.0, 4.0])
    place, before = policy._invert(weights, target)
    assert place.tolist() == [0, 0, 2, 2, 3, 4]
    assert before.tolist() == [0, 0, 1, 1, 3, 4]


def test_the_smallest_nucleus():
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    for top_p, mass in (
        (0.5, [0.5, 0, 0, 0]),
        (0.51, [0.5, 0.25, 0, 0]),
        (0.75, [0.5, 0.25, 0, 0]),
    ):
        kept, order = policy._nucleus(probs, top_p)
        assert kept.tolist() == [mass], top_p
        assert order[0, :2].tolist() == [1, 2]


@pytest.mark.parametrize("size", [255, 256, 257, 512])
def test_draws_at_the_ends_of_blocks(size):
    """With equal probabilities u chooses token floor(u V), also the first and last of a block;
    almost 1 the last, which is in the vocabulary."""
    logits = torch.zeros(1, size, dtype=torch.float64)
    for token in {0, 1, 254, 255, 256, 257, size - 1}:
        if token < size:
            u = torch.tensor([(token + 0.5) / size], dtype=torch.float64)
            got, logprob = policy._draw(logits, u, 1.0, 1.0)
            assert got.item() == token
            assert logprob.item() == pytest.approx(-math.log(size))
    almost = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert policy._draw(logits, almost, 1.0, 1.0)[0].item() == size - 1


def test_log_probabilities_of_draws_are_untempered():
    logits = torch.tensor([[1.0, 3.0, 2.0], [400.0, 401.0, 399.0]])
    plain = logits.log_softmax(-1)
    for temperature, top_p in ((0, 1.0), (0.25, 1.0), (4.0, 1.0), (1.0, 0.1), (2.0, 0.1)):
        token, logprob = policy._draw(logits, torch.tensor([0.6, 0.6]).double(), temperature, top_p)
        expected = plain.gather(1, token[:, None]).squeeze(1)
        torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=5e-5)  # of logits near 400
        if temperature == 0 or top_p == 0.1:
            assert token.tolist() == [1, 1]
    # e^(4 x) of 1, 3, 2 leaves 1.8% to the third, 0.03% to the first; e^(x / 4) 26% to the first
    for temperature, u, token in (
        (0.25, 0.0002, 0),
        (0.25, 0.001, 1),
        (0.25, 0.99, 2),
        (4.0, 0.25, 0),
    ):
        got, _ = policy._draw(logits[:1], torch.tensor([u]).double(), temperature, 1.0)
        assert got.item() == token, (temperature, u)


def test_the_nucleus_is_of_the_tempered_distribution():
    """Of probabilities 0.67, 0.24 and 0.09: 0.6 of the mass is the first, but at temperature 4 it
    takes two (0.42, 0.33, 0.25)."""
    logits = torch.tensor([[3.0, 2.0, 1.0]]).log_softmax(-1).expand(1000, 3)
    u = ((torch.arange(1000) + 0.5) / 1000).double()
    for temperature, first in ((1.0, 1.0), (4.0, 1 / (1 + math.exp(-0.25)))):
        token, _ = policy._draw(logits, u, temperature, 0.6)
        assert (token == 0).double().mean().item() == pytest.approx(first, abs=0.002)
        assert (token < 2).all()


class HalfPrecision:
    """A model whose logits are bf16 and do not depend on what it reads."""

    def __init__(self):
        self.logits, self.forwards = torch.linspace(-3, 3, 40).bfloat16(), 0
        self.config = types.SimpleNamespace(get_text_config=types.SimpleNamespace)

    def parameters(self):
        return iter([self.logits])

    def __call__(self, input_ids, **_):
        self.forwards += 1
        return types.SimpleNamespace(
            logits=self.logits.expand(len(input_ids), 1, 40),
            past_key_values=types.SimpleNamespace(layers=[]),
        )


@pytest.mark.parametrize("rows", [True, False])
def test_log_probabilities_of_half_precision_are_fp32(rows, monkeypatch):
    monkeypatch.setattr(policy, "_has_rows", lambda _: rows)
    model, tokenizer = HalfPrecision(), types.SimpleNamespace(pad_token_id=0, eos_token_id=99)
    expected = model.logits.double().log_softmax(-1)
    for s in sample(model, tokenizer, [[5], [6]], 1, 8, seeds=[1, 2]):
        assert s.logprobs == pytest.approx(expected[s.ids].tolist(), abs=1e-5)


@pytest.mark.parametrize("rows", [True, False])
def test_no_forward_after_the_last_end(rows, monkeypatch):
    monkeypatch.setattr(policy, "_has_rows", lambda _: rows)
    model, tokenizer = HalfPrecision(), types.SimpleNamespace(pad_token_id=0, eos_token_id=99)
    sample(model, tokenizer, [[5], [6]], 1, 8, stop=frozenset(range(40)))
    assert model.forwards == 1


@pytest.mark.parametrize("rows", [True, False])
def test_a_bar_counts_what_is_cut(rows, monkeypatch):
    """Also what does not end; without a title it is not shown."""
    shown, counts = [], []

    def bar(disable, **_):
        shown.append(not disable)
        return types.SimpleNamespace(update=counts.append, close=lambda: None)

    monkeypatch.setattr(policy, "tqdm", bar)
    monkeypatch.setattr(policy, "_has_rows", lambda _: rows)
    model, tokenizer = HalfPrecision(), types.SimpleNamespace(pad_token_id=0, eos_token_id=99)
    sample(model, tokenizer, [[5], [6], [7], [8]], 1, 3)
    sample(model, tokenizer, [[5]], 1, 1, progress="title")
    assert shown == [False, True]
    assert counts == [4, 1]


def test_a_cache_with_room():
    """What it shows is what was written, as it grows, and as rows of the end fill gaps."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, tokens: int) -> tuple:
        return tuple(torch.randn(2, rows, 3, tokens, 4, generator=generator))

    keys, values = states(5, 6)
    cache.update(keys, values, 0)
    policy._with_room(cache, 2)
    (layer,) = cache.layers
    assert type(layer).__name__ == "RollingLayer"
    assert layer.get_seq_length() == 6
    kept = torch.arange(5)
    for t, tokens in enumerate((1, 1, 1, 2, 1, 1, 1)):
        more = states(len(kept), tokens)
        got = layer.update(*more)
        keys, values = torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)
        assert torch.equal(got[0], keys), t
        assert torch.equal(got[1], values), t
        if t in (1, 4):
            ended = torch.zeros(len(kept), dtype=torch.bool)
            ended[1] = True
            kept = policy._without_ended(ended)
            layer.batch_select_indices(kept)
            keys, values = keys[kept], values[kept]
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    assert layer.get_seq_length() == 14
    assert len(keys) == 3


def test_rows_that_go_on():
    """They keep their places; the last ones fill the gaps."""
    for ended, kept in (
        ("00000", [0, 1, 2, 3, 4]),
        ("10000", [4, 1, 2, 3]),
        ("01010", [0, 4, 2]),
        ("00011", [0, 1, 2]),
        ("11001", [2, 3]),
        ("11100", [3, 4]),
        ("11110", [4]),
        ("11111", []),
    ):
        flags = torch.tensor([c == "1" for c in ended])
        assert policy._without_ended(flags).tolist() == kept, ended


@pytest.mark.parametrize("longest,length", [(1, 32), (31, 32), (32, 32), (33, 64), (65, 96)])
def test_prompts_are_padded_on_the_left(longest, length):
    prompts = [list(range(1, longest + 1)), [7]]
    ids, mask = policy._left_padded(prompts, 99, torch.device("cpu"))
    assert ids.tolist() == [[99] * (length - len(p)) + p for p in prompts]
    assert mask.tolist() == [[0] * (length - len(p)) + [1] * len(p) for p in prompts]


def small_sampler(batch_size: int, n: int, rows: bool, monkeypatch, interrupted=policy.never):
    """(samples of four prompts, what the bar counted, the shapes of the prompts' forwards)."""
    if not rows:
        monkeypatch.setattr(policy, "_has_rows", lambda _: False)
    model = small_llama(torch.float32).eval()
    counted, shapes = [], []

    class Bar:
        def __init__(self, **settings):
            counted.append(settings)

        def update(self, count):
            counted.append(count)

        def close(self):
            counted.append("closed")

    monkeypatch.setattr(policy, "tqdm", Bar)
    forward = model.forward

    def noted(input_ids, **inputs):
        if inputs["past_key_values"] is None:
            shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **inputs)

    model.forward = noted
    tokenizer = types.SimpleNamespace(pad_token_id=0, eos_token_id=2)
    prompts = [[5, 6, 7], [8, 9], [5, 5, 5], [6, 4]]
    samples = sample(
        model, tokenizer, prompts, n, 6, stop=frozenset(range(32)), batch_size=batch_size,
        seeds=range(4 * n), progress="title", interrupted=interrupted,
    )  # fmt: skip
    return samples, counted, shapes


@pytest.mark.parametrize("rows", [True, False])
def test_batches_and_bar(rows, monkeypatch):
    """Shortest prompts first, batch_size // n of them together (at least one); the bar counts every
    response once. Models without rows to drop sample the same tokens."""
    expected, _, _ = small_sampler(64, 1, True, monkeypatch)
    lengths = [len(s.ids) for s in expected]
    assert len(set(lengths)) > 1
    for s in expected:
        assert s.finished == (s.ids[-1] < 32)
        assert s.answer == (s.ids[:-1] if s.finished else s.ids)
        assert all(token >= 32 for token in s.answer)
        assert s.finished or len(s.ids) == 6
    together = {
        (8, 1): [(4, 32)], (3, 1): [(3, 32), (1, 32)], (1, 1): [(1, 32)] * 4,
        (5, 2): [(2, 32)] * 2, (4, 2): [(2, 32)] * 2, (3, 2): [(1, 32)] * 4, (1, 2): [(1, 32)] * 4,
    }  # fmt: skip
    in_place = {
        (8, 1): [(2, 2), (2, 3)], (3, 1): [(2, 2), (2, 3)], (1, 1): [(1, 2)] * 2 + [(1, 3)] * 2,
        (5, 2): [(4, 2), (4, 3)], (4, 2): [(4, 2), (4, 3)], (3, 2): [(2, 2)] * 2 + [(2, 3)] * 2,
        (1, 2): [(2, 2)] * 2 + [(2, 3)] * 2,
    }  # fmt: skip
    drawn = {}
    for (batch_size, n), batches in (together if rows else in_place).items():
        samples, counted, shapes = small_sampler(batch_size, n, rows, monkeypatch)
        assert shapes == batches
        settings, *counts, end = counted
        assert settings["total"] == 4 * n
        assert settings["desc"] == "title"
        assert not settings["disable"]
        assert sum(counts) == 4 * n
        assert end == "closed"
        drawn.setdefault(n, []).append([s.ids for s in samples])
    for n, same in drawn.items():
        assert all(ids == same[0] for ids in same), n
    assert drawn[1][0] == [s.ids for s in expected]


@pytest.mark.parametrize("n", [1, 2])
def test_interrupted_without_rows(n, monkeypatch):
    """What has been drawn is kept, cut short; prompts that were not begun have nothing."""
    whole, _, _ = small_sampler(2 * n, n, False, monkeypatch)
    asked = itertools.count()
    # Asked before the first batch and before each of its tokens, until it has two of them
    cut, _, _ = small_sampler(2 * n, n, False, monkeypatch, lambda: next(asked) >= 3)
    assert [len(s.ids) for s in whole] != [2] * 4 * n
    for i, (s, uncut) in enumerate(zip(cut, whole, strict=True)):
        begun = i // n in (1, 3)  # the short prompts were first
        length = min(2, len(uncut.ids)) if begun else 0
        assert s.ids == uncut.ids[:length]
        assert s.finished == (uncut.finished and len(uncut.ids) == length)


def test_sampling_that_is_not_specified():
    """256 tokens, one sample of a prompt, the model's own distribution, its own end token."""
    model = small_llama(torch.float32, max_position_embeddings=512).eval()
    tokenizer = types.SimpleNamespace(pad_token_id=0, eos_token_id=99)  # not of its vocabulary
    (plain,) = sample(model, tokenizer, [[5, 6]], seeds=[1])
    (same,) = sample(model, tokenizer, [[5, 6]], 1, 20, 1.0, 1.0, seeds=[1])
    assert len(plain.ids) == 256
    assert plain.ids[:20] == same.ids
    tokenizer.eos_token_id = same.ids[4]
    (ended,) = sample(model, tokenizer, [[5, 6]], seeds=[1])
    shapes, forward = [], model.forward

    def noted(input_ids, **inputs):
        shapes.append(len(input_ids))
        return forward(input_ids=input_ids, **inputs)

    model.forward = noted
    sample(model, tokenizer, [[5, 6]] * 130, max_new_tokens=1)
    assert shapes == [128, 2]
    assert ended.ids == same.ids[: same.ids.index(same.ids[4]) + 1]
    assert ended.finished


def test_which_models_have_rows_to_drop():
    def has_rows(kinds, **more) -> bool:
        config = types.SimpleNamespace(layer_types=kinds)
        config.get_text_config = lambda: config
        return policy._has_rows(types.SimpleNamespace(config=config, **more))

    assert has_rows(None)
    assert has_rows(["full_attention", "sliding_attention", "chunked_attention"])
    assert not has_rows(["full_attention", "linear_attention"])
    assert not has_rows(None, _is_stateful=True)
    assert has_rows(None, _is_stateful=False)


# --------------------------------------------------------------------------------------------------
# Prompts with pictures, by hand


def test_encoded_prompts():
    """The pictures of a conversation in their order, beside the ids; without a processor the text
    alone."""
    _, tokenizer = load_config("tiny")
    chat = template(tokenizer)
    asked = [{"role": "user", "content": "Hi"}]
    (prompt,) = policy.encode_prompts(tokenizer, [asked])
    expected = tokenizer(chat.before + "Hi" + chat.after, add_special_tokens=False)["input_ids"]
    assert prompt == (expected, {})
    content = [
        {"type": "image", "image": "first"}, {"type": "text", "text": "Hi"},
        {"type": "image", "image": "second"},
    ]  # fmt: skip
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": content}]
    messages.append({"role": "user", "content": [{"type": "image", "image": "third"}]})
    assert policy._images(messages) == ["first", "second", "third"]
    seen = []

    def processor(text, images, return_tensors, add_special_tokens):
        seen.append((text, images, return_tensors, add_special_tokens))
        ids = torch.tensor([[4, 5, 6]])
        return {"input_ids": ids, "attention_mask": ids, "pixel_values": ids * 2}

    (prompt,) = policy.encode_prompts(tokenizer, [asked], processor)
    assert prompt.ids == [4, 5, 6]
    assert list(prompt.inputs) == ["pixel_values"]
    assert seen == [([chat.before + "Hi" + chat.after], [], "pt", False)]


def test_encoded_prompts_are_in_order(monkeypatch):
    """Each text with its own pictures; the template has the special tokens, and none are added."""
    monkeypatch.setattr(
        policy, "prompt_texts", lambda _, conversations: [c[0]["text"] for c in conversations]
    )

    def processor(text, images, return_tensors, add_special_tokens):
        ids = [len(text[0]), len(images), *([99] if add_special_tokens else [])]
        return {"input_ids": torch.tensor([ids]), "pixels": images}

    def tokenizer(texts, add_special_tokens=True):
        more = [99] if add_special_tokens else []
        return {"input_ids": [[len(text), *more] for text in texts]}

    conversations = []
    for text, images in (("a", []), ("abc", ["x", "y"]), ("ab", ["z"])):
        content = [{"type": "image", "image": image} for image in images]
        conversations.append([{"text": text, "content": content}])
    prompts = policy.encode_prompts(tokenizer, conversations, processor)
    expected = [([1, 0], []), ([3, 2], ["x", "y"]), ([2, 1], ["z"])]
    assert [(prompt.ids, prompt.inputs["pixels"]) for prompt in prompts] == expected
    prompts = policy.encode_prompts(tokenizer, conversations)
    assert [prompt.ids for prompt in prompts] == [[1], [3], [2]]


def test_inputs_of_pictures_are_stacked():
    """What is aligned with the prompt is padded with it: zeros on the left, the last entry on the
    right; all else is put behind each other."""
    items = [
        ({"kinds": torch.tensor([[1, 2, 3]]), "pixels": torch.tensor([[5.0, 6.0, 7.0]] * 2)}, 3),
        ({"kinds": torch.tensor([[4, 5]]), "pixels": torch.tensor([[8.0, 9.0, 10.0]])}, 2),
    ]
    left = policy.stack_inputs(items, 4, left=True)
    assert left["kinds"].tolist() == [[0, 1, 2, 3], [0, 0, 4, 5]]
    assert left["pixels"].tolist() == [[5, 6, 7], [5, 6, 7], [8, 9, 10]]
    right = policy.stack_inputs(items, 4, left=False)
    assert right["kinds"].tolist() == [[1, 2, 3, 3], [4, 5, 5, 5]]
    longest = policy.stack_inputs(items, 3, left=True)
    assert longest["kinds"].tolist() == [[1, 2, 3], [0, 4, 5]]
    masks = [
        ({"seen": torch.tensor([[[1, 0], [0, 1]]])}, 2),
        ({"seen": torch.tensor([[[1, 1]]])}, 1),
    ]
    assert policy.stack_inputs(masks, 2, left=True)["seen"].tolist() == [
        [[1, 0], [0, 1]],
        [[0, 0], [1, 1]],
    ]
    vector = [({"x": torch.tensor([1])}, 1)]
    assert policy.stack_inputs(vector, 3, left=True)["x"].tolist() == [1]


class Generator:
    """What sample_with_pictures asks of a model: its answers are 3, 2 and then 9 without end."""

    def __init__(self):
        self.asked, self.drawn = [], []

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, input_ids, **options):
        self.asked.append({"input_ids": input_ids.tolist(), **options})
        self.drawn.append(torch.rand(()).item())
        rows = len(input_ids) * options.get("num_return_sequences", 1)
        answers = torch.tensor([[3, 2, 0], [9, 9, 9]]).repeat(rows, 1)[:rows]
        prompts = input_ids.repeat_interleave(rows // len(input_ids), 0)
        logits = [torch.arange(10.0).expand(rows, 10) * (k + 1) for k in range(3)]
        sequences = torch.cat([prompts, answers], 1)
        return types.SimpleNamespace(sequences=sequences, logits=logits)


def test_pictures_by_the_librarys_generate():
    """Batches of batch_size // samples prompts, padded on the left, each with the seed of its first
    response; an answer ends with its first end token; log-probabilities are untempered."""
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    prompts = [Prompt([5, 6], {}), Prompt([7], {}), Prompt([8], {})]
    model = Generator()
    state = torch.get_rng_state()
    seeds = [4, 1, 2, 3, -1, 5]
    samples = sample_with_pictures(
        model, tokenizer, prompts, 2, 3, 0.5, frozenset([2, 1]), 5, seeds
    )
    assert torch.equal(torch.get_rng_state(), state)
    first, second = model.asked
    assert first["input_ids"] == [[5, 6], [0, 7]]
    assert first["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert second["input_ids"] == [[8]]
    for asked in (first, second):
        options = {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 1.0}
        options |= {"num_return_sequences": 2, "max_new_tokens": 3, "eos_token_id": [1, 2]}
        options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
        assert {name: asked[name] for name in options} == options
    expected = []
    for seed in (4, 2**63 - 1):
        torch.manual_seed(seed)
        expected.append(torch.rand(()).item())
    torch.set_rng_state(state)
    assert model.drawn == expected
    assert [s.ids for s in samples] == [[3, 2], [9, 9, 9]] * 3
    assert [s.finished for s in samples] == [True, False] * 3
    for s in samples:
        for k, (token, logprob) in enumerate(zip(s.ids, s.logprobs, strict=True)):
            total = math.log(sum(math.exp(x * (k + 1)) for x in range(10)))
            assert logprob == pytest.approx(token * (k + 1) - total, rel=1e-5)
    model = Generator()
    sample_with_pictures(model, tokenizer, prompts, 1, 3, 0.0, frozenset([2]), 1, [1, 2, 3])
    assert len(model.asked) == 3
    for asked in model.asked:
        assert asked["do_sample"] is False
        assert "temperature" not in asked
    model = Generator()
    sample_with_pictures(model, tokenizer, prompts, 4, 3, 1.0, frozenset([2]), 2, [0] * 12)
    assert len(model.asked) == 3  # one prompt at least


# --------------------------------------------------------------------------------------------------
# Log-probabilities, entropy and value of given responses


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
def test_log_probabilities_and_entropy(weights):
    """Values and gradients of autograd's own, each of the two alone and both together."""
    logits = 3 * torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).double()
    targets, scale = torch.tensor([2, 0, 6, 2]), torch.tensor([1.0, 2, -1, 0.5]).double()
    gradients = []
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        if ours:
            logprobs, entropy = policy.TokenLogprobs.apply(x, targets)
        else:
            log_p = x.log_softmax(-1)
            logprobs, entropy = log_p[torch.arange(4), targets], -(log_p.exp() * log_p).sum(-1)
        loss = 0.0
        for weight, values in zip(weights, (logprobs, entropy), strict=True):
            if weight:  # else autograd hands None on
                loss = loss + weight * (values * scale).sum()
        gradients.append((logprobs.detach(), entropy.detach(), torch.autograd.grad(loss, x)[0]))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_certain_token_has_no_entropy():
    logits = torch.tensor([[0.0, 1e4]], requires_grad=True)
    logprobs, entropy = policy.TokenLogprobs.apply(logits, torch.tensor([1]))
    (logprobs + entropy).sum().backward()
    assert (logprobs.item(), entropy.item()) == (0, 0)
    assert logits.grad.tolist() == [[0, 0]]


def test_a_policy_in_half_precision_answers_in_fp32():
    """From its bf16 logits: log-probabilities and entropy as in fp64; the value too is fp32."""
    actor = Policy(small_llama(torch.bfloat16), True).bfloat16()
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    logprobs, entropy, values = actor(ids, torch.ones(1, 8, dtype=torch.bool))
    assert logprobs.dtype == entropy.dtype == values.dtype == torch.float32
    hidden = policy.hidden_states(actor.lm, input_ids=ids)[0, :-1]
    log_p = policy.head(actor.lm, hidden).double().log_softmax(-1)
    expected = log_p.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logprobs[0].double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        entropy[0].double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-4
    )


def test_values_train_the_model_too():
    """Their gradient is that of the head on the last hidden state."""
    actor = Policy(small_llama(), True).double()
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[False, True, True]])
    weights = list(actor.lm.model.parameters())
    got = torch.autograd.grad(actor(ids, mask)[2].sum(), weights)
    hidden = actor.lm(ids, output_hidden_states=True).hidden_states[-1][0, 1:3]
    expected = torch.autograd.grad((hidden @ actor.value.weight[0]).sum(), weights)
    assert max(g.abs().max() for g in got) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_policys_vocabulary_in_chunks(monkeypatch):
    """The same numbers in the same places, three response tokens at a time."""
    actor = Policy(small_llama(), True).double()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8)[None] >= torch.tensor([[1], [4]])
    expected = actor(ids, mask, True)
    by_chunks, sizes = policy.by_chunks, []

    def few(function, vocabulary, *rows):
        assert vocabulary == 64
        chunks = by_chunks(function, 2**27 // 3, *rows)
        sizes.extend(len(logprobs) for logprobs, _ in chunks)
        return chunks

    monkeypatch.setattr(policy, "by_chunks", few)
    got = actor(ids, mask, True)
    assert sizes == [3, 3, 3, 2]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_policy_has_the_generation_config_of_its_model():
    actor = Policy(small_llama(), False)
    assert actor.generation_config is actor.lm.generation_config
    assert actor.adapters is None
    other = transformers.GenerationConfig(top_k=7)
    actor.generation_config = other
    assert actor.lm.generation_config is other


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_policy_of_given_responses(entropy_gradient):
    """Log-probabilities, entropy and value of response tokens, in their places, 0 elsewhere; the
    entropy has a gradient where asked."""
    lm = small_llama()
    actor = Policy(lm, True).double()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()
    logprobs, entropy, values = actor(ids, mask, entropy_gradient)
    out = lm(ids, output_hidden_states=True)
    log_p = out.logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(2, ids[:, 1:, None]).squeeze(2) * mask
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1) * mask)
    torch.testing.assert_close(values, actor.value(out.hidden_states[-1][:, :-1])[..., 0] * mask)
    assert entropy.requires_grad == entropy_gradient
    assert logprobs.requires_grad
    assert not actor(ids, mask)[1].requires_grad  # not asked
    assert Policy(lm, False)(ids, mask)[2] is None
