"""What a dry run says of the large-model commands, on GPUs of given memory."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import amft
import fomaml
import meta_lora
from data import Encoded
from measure import rows_to_answer, rows_to_score
from model import World, activation_bytes
from run import Needs, _space, check_space

GB = 1e9
LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_4B = Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
QWEN2_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
LONGEST = {"row": Encoded([0] * 2048, 100)}  # MATH's longest rows under the default --max-length
COMMAND = {
    "inner_optimizer": "sgd", "support_batch": 4, "query_batch": 4, "inner_steps": 5,
    "eval_max_new_tokens": 512, "steps": 5000,
}  # fmt: skip


def gpus(size: int, replicas: int = 1) -> World:
    return World(torch.device("cuda"), size=size, replicas=replicas)


def verdict(world: World, needs, device=79, host=1000, disk=10000) -> list[str]:
    have = {"device": device * GB, "host": host * GB, "disk": disk * GB}
    return check_space(world, needs, ".", kept=2, have=have)


def of_fomaml(config, world: World, **options):
    args = fomaml.Args(**COMMAND | options)
    return fomaml.needs(args, config, world, LONGEST)


def test_fomaml_commands_are_ready():
    alone = of_fomaml(LLAMA_1B, gpus(1), activation_checkpointing=True)
    assert verdict(gpus(1), alone) == []
    four = of_fomaml(QWEN3_4B, gpus(4), activation_checkpointing=True)
    assert verdict(gpus(4), four) == []
    flags = {"activation_checkpointing": True, "offload_theta": True, "cpu_offload": True}
    offloaded = of_fomaml(QWEN3_4B, gpus(1), micro_batch=1, **flags)
    assert verdict(gpus(1), offloaded) == []


def test_fomaml_what_does_not_fit():
    too_large = of_fomaml(QWEN3_4B, gpus(1), activation_checkpointing=True)
    (reason,) = verdict(gpus(1), too_large)
    assert "per rank are needed" in reason
    flags = {"activation_checkpointing": True, "cpu_offload": True, "micro_batch": 1}
    offloaded = of_fomaml(QWEN3_4B, gpus(1), **flags)
    (reason,) = verdict(gpus(1), offloaded, host=64)
    assert "CPU memory" in reason
    (reason,) = verdict(gpus(1), offloaded, disk=50)
    assert "--keep" in reason


def test_disk_is_for_all_checkpoints(tmp_path):
    """--keep of them, and the one that is being written."""
    needs = Needs({}, {}, {"a": 1}, {"a": 1}, disk=10 * GB)
    for free, fits in ((29, False), (31, True)):
        have = {"device": GB, "host": GB, "disk": free * GB}
        reasons = check_space(gpus(1), needs, str(tmp_path), kept=3, have=have)
        assert (reasons == []) == fits, free
    assert fomaml.kept(fomaml.Args(steps=100, save_every=40, keep=5)) == 4
    assert fomaml.kept(fomaml.Args(steps=100, save_every=10, keep=5)) == 6


def test_ranks_of_a_machine_share_its_memory(monkeypatch, tmp_path):
    sizes = []
    for ranks in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        sizes.append(_space(World(torch.device("cpu")), str(tmp_path / "new"))["device"])
    assert sizes[1] == sizes[0] / 4


def test_offloading_moves_bytes_from_the_gpu():
    """20 bytes a parameter; theta and the accumulator are 8 of them, one comes back as gradient."""
    n = sum(of_fomaml(QWEN3_4B, gpus(1)).device.values()) / 20
    assert n == pytest.approx(4.02e9, rel=0.01)
    theta = of_fomaml(QWEN3_4B, gpus(1), offload_theta=True)
    assert sum(theta.device.values()) == pytest.approx(16 * n)
    everything = of_fomaml(QWEN3_4B, gpus(1), cpu_offload=True)
    assert everything.device == {}
    assert sum(everything.host.values()) == pytest.approx(24 * n)  # and the weights while loading


def test_rows_at_a_time():
    """Of an evaluation: fewer where logits pass 2^29 numbers or keys and values 8 GB."""
    assert rows_to_score(QWEN3_4B, 32) == 16
    assert rows_to_score(QWEN3_4B, 512) == 6
    assert rows_to_score(QWEN3_4B, 100_000) == 1
    assert rows_to_answer(LLAMA_1B, 2048, 2) == 128  # 67 MB a row
    assert rows_to_answer(QWEN3_4B, 8192, 2) == 7  # 1.2 GB
    assert rows_to_answer(QWEN3_4B, 8192, 4) == 3
    assert rows_to_answer(QWEN3_4B, 10**6, 2) == 1


def test_more_buffers():
    """Two for an inner Adam, one where gradients are kept; shards share all of them."""
    n = sum(of_fomaml(QWEN3_4B, gpus(1)).device.values()) / 20
    for options, size in (
        ({"inner_optimizer": "adam"}, 28),
        ({"inner_clip": 1.0}, 24),
        ({"micro_batch": 1}, 24),
    ):
        device = of_fomaml(QWEN3_4B, gpus(1), **options).device
        assert sum(device.values()) == pytest.approx(size * n), options
    for world, parts in ((gpus(4), 4), (gpus(4, replicas=2), 2)):
        device = of_fomaml(QWEN3_4B, world).device
        assert sum(device.values()) == pytest.approx(20 * n / parts)
    plain = amft.needs(amft.with_defaults(amft.Args(method="rl")), QWEN3_4B, gpus(1), 100)
    learned = amft.needs(amft.with_defaults(amft.Args()), QWEN3_4B, gpus(1), 100)
    assert sum(plain.device.values()) == pytest.approx(20 * n)
    assert sum(learned.device.values()) == pytest.approx(24 * n)  # D
    assert plain.disk == pytest.approx(14 * n)  # fp32 weights and moments, the weights in bf16


def test_meta_lora_needs_more_activations():
    args = meta_lora.Args(activation_checkpointing=False, support_batch=4, query_batch=4)
    needs = meta_lora.needs(args, QWEN3_4B, gpus(4), LONGEST)
    assert verdict(gpus(4), needs) != []  # four rows of 2,048 tokens at 52 hidden sizes a layer
    args.activation_checkpointing = True
    needs = meta_lora.needs(args, QWEN3_4B, gpus(4), LONGEST)
    assert verdict(gpus(4), needs) == []


def test_checkpointing_keeps_the_inputs_of_blocks():
    """And one block's rest."""
    for adapters, numbers in ((False, 34), (True, 52)):  # hidden sizes of a layer and token
        sizes = [activation_bytes(LLAMA_1B, 10, 2, kept, adapters) for kept in (False, True)]
        assert sizes == [10 * 2048 * 2 * n for n in (16 * numbers, 16 + numbers)]


def test_amft_counts_cache_and_gathered_weights():
    options = {"prompts_per_step": 128, "validation_size": 128, "max_new_tokens": 8192}
    options |= {"micro_batch": 2, "activation_checkpointing": True, "max_length": 9216}
    longest = 8192 + 300
    args = amft.with_defaults(amft.Args(generation_batch=128, **options))
    needs = amft.needs(args, QWEN2_7B, gpus(8), longest)
    assert needs.evaluation["cache of rollouts"] == pytest.approx(128 * longest * 57344)
    assert verdict(gpus(8), needs) != []
    args = amft.with_defaults(amft.Args(generation_batch=32, **options))
    assert verdict(gpus(8), amft.needs(args, QWEN2_7B, gpus(8), longest)) == []
