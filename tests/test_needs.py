"""What a dry run says of the large-model commands, on GPUs of given memory."""

import os
import shutil
import types

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

CPU = torch.device("cpu")
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


# --------------------------------------------------------------------------------------------------
# All parts by hand, of a small model

# Two blocks of 8 hidden sizes, words for 10: in a block 64 + 2 x 32 + 64 of the attention (one head
# of 4 for keys and values), 3 x 96 of the MLP, two norms; the words twice, the last norm
SMALL = LlamaConfig(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
)  # fmt: skip
N = 2 * (64 + 64 + 64 + 288 + 16) + 160 + 8
ROWS = {"short": Encoded([0] * 20, 9), "long": Encoded([0] * 30, 9)}
ACTIVATIONS = 8 * 2 * 34  # numbers a token: 34 hidden sizes a layer
CHECKPOINTED = 8 * (2 + 34)
CACHE = 2 * 2 * 1 * 4  # keys and values, layers, heads, their size


def fomaml_needs(world: World, **options) -> Needs:
    settings = {"inner_optimizer": "sgd", "support_batch": 6, "query_batch": 4}
    args = fomaml.Args(**settings | {"eval_max_new_tokens": 5} | options)
    return fomaml.needs(args, SMALL, world, ROWS)


def evaluation_of(width: int, gathered: int, answers: int = 128 * 35) -> dict:
    """128 answers of 30 + 5 tokens; 16 rows of 30 tokens are scored."""
    cache = answers * CACHE * width
    logits = 16 * 30 * 10 * (2 * width + 8)
    return {"gathered weights": gathered, "cache": cache, "logits": logits}


def test_needs_of_fomaml_on_a_cpu():
    assert fomaml_needs(World(CPU)) == Needs(
        device={"weights": 4 * N, "Adam": 8 * N, "theta and accumulator": 8 * N},
        host={},
        training={"activations": 180 * ACTIVATIONS * 4, "logits": 180 * 10 * 16},
        evaluation=evaluation_of(4, 0),
        disk=16 * N,
    )


def test_needs_of_fomaml_on_gpus():
    """Two replicas of two shards, each of which has three of six rows."""
    world = World(torch.device("cuda"), rank=0, size=4, replicas=2)
    needs = fomaml_needs(world, activation_checkpointing=True)
    assert needs == Needs(
        device={"weights": 2 * N, "Adam": 4 * N, "theta and accumulator": 4 * N},
        host={"weights while loading": 4 * N},
        training={"activations": 90 * CHECKPOINTED * 2, "logits": 90 * 10 * 12},
        evaluation=evaluation_of(2, 2 * N),
        disk=14 * N,
    )
    assert fomaml_needs(World(torch.device("cuda"), rank=1, size=4, replicas=2)).host == {}
    assert fomaml_needs(World(CPU, size=2)).evaluation["gathered weights"] == 4 * N
    assert fomaml_needs(World(CPU, size=2, replicas=2)).evaluation["gathered weights"] == 0


def test_needs_of_offloaded_runs():
    world = World(torch.device("cuda"))
    parts = {"weights": 4 * N, "Adam": 8 * N, "theta and accumulator": 8 * N}
    loading = {"weights while loading": 4 * N}
    needs = fomaml_needs(world, cpu_offload=True, offload_theta=True)
    assert (needs.device, needs.host) == ({}, parts | loading)
    needs = fomaml_needs(world, offload_theta=True)
    copies = {"theta and accumulator": parts.pop("theta and accumulator")}
    assert (needs.device, needs.host) == (parts | {"gradients": 4 * N}, copies | loading)
    for options in ({"cpu_offload": True}, {"offload_theta": True}):  # there is no GPU
        needs = fomaml_needs(World(CPU), **options)
        assert (needs.device, needs.host) == (parts | copies, {})


@pytest.mark.parametrize(
    "options,buffer,tokens",
    [
        ({"micro_batch": 1}, {"gradients": 4 * N}, 30),
        ({"inner_clip": 0.5}, {"gradients": 4 * N}, 180),
        ({"inner_optimizer": "adam"}, {"inner Adam": 8 * N}, 180),
        ({"query_batch": 9}, {}, 270),
        # Each of four query rows behind six support rows of an episode of 30
        ({"meta_gradient": "in_context", "inner_steps": 5, "shots": 6}, {}, 4 * 7 * 30),
    ],
)
def test_needs_of_other_settings(options, buffer, tokens):
    needs = fomaml_needs(World(CPU), **options)
    parts = {"weights": 4 * N, "Adam": 8 * N, "theta and accumulator": 8 * N}
    assert needs.device == parts | buffer
    assert needs.training == {"activations": tokens * ACTIVATIONS * 4, "logits": tokens * 10 * 16}


def test_needs_without_answers():
    for needs in (
        fomaml_needs(World(CPU), eval_max_new_tokens=0),
        meta_lora.needs(meta_lora.Args(eval_max_new_tokens=0), SMALL, World(CPU), ROWS),
    ):
        assert needs.evaluation == evaluation_of(4, 0, answers=0)


@pytest.mark.parametrize("script", [fomaml, meta_lora])
def test_needs_of_long_answers(script):
    """Of 8,192 tokens, 2^29 bytes of keys and values each in fp32: 16 rows fill 8 GB; in bf16
    twice as many do."""
    longest = {"row": Encoded([0] * 2048, 100)}
    args = script.Args(eval_max_new_tokens=6144)
    for world in (World(CPU), gpus(1)):
        assert script.needs(args, LLAMA_1B, world, longest).evaluation["cache"] == 2**33


def test_needs_of_meta_lora():
    """The frozen base and all tasks of a rank; adapters keep 52 hidden sizes a layer and token."""
    settings = {"support_batch": 6, "query_batch": 4, "eval_max_new_tokens": 5}
    args = meta_lora.Args(**settings, tasks_per_step=4)
    assert meta_lora.needs(args, SMALL, World(CPU), ROWS) == Needs(
        device={"weights": 4 * N},
        host={},
        training={"activations": 4 * 180 * 8 * 2 * 52 * 4, "logits": 4 * 180 * 10 * 16},
        evaluation=evaluation_of(4, 0),
        disk=4 * N,
    )
    args = meta_lora.Args(**settings, tasks_per_step=6, activation_checkpointing=True)
    world = World(torch.device("cuda"), size=2)
    assert meta_lora.needs(args, SMALL, world, ROWS) == Needs(
        device={"weights": N},
        host={"weights while loading": 2 * N},
        training={"activations": 3 * 180 * 8 * (2 + 52) * 2, "logits": 3 * 180 * 10 * 12},
        evaluation=evaluation_of(2, 2 * N),
        disk=2 * N,
    )
    assert meta_lora.needs(args, SMALL, World(torch.device("cuda"), 1, 2), ROWS).host == {}
    args.tasks_per_forward, args.query_batch = 1, 7
    needs = meta_lora.needs(args, SMALL, world, ROWS)
    assert needs.training["logits"] == 7 * 30 * 10 * 12


def test_checkpoints_that_are_kept():
    """Also where the steps are a multiple of --save-every, and where they are fewer."""
    for steps, save_every, keep, count in (
        (80, 40, 5, 3), (81, 40, 5, 4), (79, 40, 5, 3), (1, 40, 5, 2), (80, 40, 1, 2),
    ):  # fmt: skip
        args = fomaml.Args(steps=steps, save_every=save_every, keep=keep)
        assert fomaml.kept(args) == count
    none = fomaml.Args(steps=1000, save_every=40, keep=5, meta_gradient="none")
    assert fomaml.kept(none) == 1  # it takes no step


# --------------------------------------------------------------------------------------------------
# What is said of the space


def test_space_of_a_machine_with_a_gpu(capsys):
    """The larger phase counts; what fits to the byte is enough; one byte less is not."""
    needs = Needs(
        device={"weights": 2 * GB},
        host={"theta": 3 * GB, "weights while loading": 0.5 * GB},
        training={"activations": 1.25 * GB, "logits": 0.25 * GB},
        evaluation={"cache": 1.0 * GB},
        disk=2 * GB,
    )
    enough = {"device": 3.5 * GB, "host": 3.5 * GB, "disk": 6 * GB}
    assert check_space(gpus(1), needs, ".", 3, enough) == []
    assert capsys.readouterr().out == (
        "memory per rank about 3.50 GB in training (weights 2.00, activations 1.25, logits 0.25) "
        "of 3.5 GB\n"
        "CPU memory per rank about 3.50 GB (theta 3.00, weights while loading 0.50) of 3.5\n"
        "disk: up to 6.00 GB of checkpoints, 6.0 GB free\n"
    )
    reasons = {
        "device": "about 3.5 GB per rank are needed, 3.5 are there: the largest part is weights",
        "host": "about 3.5 GB of CPU memory per rank are needed, 3.5 are there",
        "disk": "checkpoints need 6.0 GB of disk, 6.0 are free: lower --keep",
    }
    for name, reason in reasons.items():
        less = enough | {name: enough[name] - 1}
        assert check_space(gpus(1), needs, ".", 3, less) == [reason]
    needs.evaluation["cache"] = 4.0 * GB
    capsys.readouterr()
    (reason,) = check_space(gpus(1), needs, ".", 3, enough)
    assert reason == ("about 6.0 GB per rank are needed, 3.5 are there: the largest part is cache")
    assert capsys.readouterr().out.startswith(
        "memory per rank about 6.00 GB in evaluation (weights 2.00, cache 4.00) of 3.5 GB\n"
    )


def test_space_of_a_machine_without_gpu(capsys):
    needs = Needs({"weights": 2 * GB}, {}, {"a": 0}, {"b": 0}, disk=0)
    have = {"device": 8 * GB, "host": 1, "disk": GB}
    assert check_space(World(CPU), needs, ".", 1, have) == []
    assert "CPU memory" not in capsys.readouterr().out
    needs.host["theta"] = 3 * GB
    del have["host"]
    assert check_space(World(CPU), needs, ".", 1, have) == []
    assert "CPU memory" not in capsys.readouterr().out


def test_space_is_that_of_the_machine(monkeypatch):
    asked = []

    def space(*where):
        asked.append(where)
        return {"device": 2 * GB, "disk": 2 * GB}

    monkeypatch.setattr("run._space", space)
    needs = Needs({"weights": GB}, {}, {"a": 0}, {"b": 0}, disk=GB)
    assert check_space(World(CPU), needs, "folder", 2) == []
    assert asked == [(World(CPU), "folder")]
    assert len(check_space(World(CPU), needs, "folder", 3)) == 1


def test_space_that_is_there(monkeypatch, tmp_path):
    """Memory: pages times their size, shared by the machine's ranks; of a GPU what is free; the
    disk is that of the nearest folder that is there already."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    asked = []

    def usage(folder):
        asked.append(folder)
        return types.SimpleNamespace(total=9, used=2, free=7)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = str(tmp_path / "new" / "run")
    assert _space(World(CPU), folder) == {"device": 2048000, "disk": 7}
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 10))
    assert _space(gpus(1), folder) == {"device": 5, "host": 4096000, "disk": 7}
    assert asked == [tmp_path.resolve()] * 2
