"""Fine-tuning by arithmetic: adapters, memory of each form of the base, and what is recommended or missing."""

from dataclasses import replace

import pytest

from cluster.plan.finetune.memory import Training, num_adapter_parameters, training_memory
from cluster.plan.finetune.planner import finetune_refusal, make_finetune_plans
from cluster.plan.gpus import GPUS
from cluster.plan.models import V0_3, PlannedModel
from cluster.plan.offers import OFFERS
from workers.errors import ConfigError
from workers.stored_weights import StoredWeights

MISTRAL = PlannedModel(name="mistral", config=V0_3)
USUAL = Training(rank=16, batch_size=4, max_length=1024)


def test_adapters_have_the_parameters_that_peft_makes():
    peft = pytest.importorskip("peft")
    from support.checkpoints.tiny import make_tiny_model

    model = make_tiny_model()
    config = model.config
    ours = replace(
        V0_3,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets))
    assert num_adapter_parameters(ours, 3) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert num_adapter_parameters(V0_3, 16) == 41_943_040


def test_a_7b_fits_one_gpu_of_24_gb():
    memory = training_memory(V0_3, USUAL, None)
    assert memory.weights == pytest.approx(14.5e9, rel=0.01)
    assert memory.total < GPUS["A10G"].memory_bytes
    quarter = training_memory(V0_3, USUAL, "int4")
    assert quarter.weights == pytest.approx(4.3e9, rel=0.02)
    assert quarter.adapters == memory.adapters
    longer = training_memory(V0_3, replace(USUAL, max_length=8192), "int4")
    assert longer.kept == 8 * quarter.kept
    assert longer.most == pytest.approx(8 * quarter.most, rel=0.1)


def test_the_cheapest_gpu_with_the_least_rounding_is_recommended():
    plans = make_finetune_plans(MISTRAL, USUAL, offers=OFFERS)
    best = plans[0]
    assert best.fits and best.offer is not None and best.quantization is None
    fitting = [p for p in plans if p.fits and p.price is not None]
    assert best.price.usd_per_hour == min(p.price.usd_per_hour for p in fitting)
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)


def test_what_does_not_fit_is_said_with_what_would():
    large = replace(USUAL, batch_size=16, max_length=4096)
    plans = make_finetune_plans(MISTRAL, large, gpus=(GPUS["A10G"],))
    assert not any(p.fits for p in plans)
    error = finetune_refusal(MISTRAL, large, plans)
    assert "does not fit on one A10G" in str(error)
    size = int(str(error).partition("--batch-size ")[2].split()[0])
    smaller = [p for p in make_finetune_plans(MISTRAL, replace(large, batch_size=size), gpus=(GPUS["A10G"],)) if p.fits]
    assert smaller and not any(
        p.fits for p in make_finetune_plans(MISTRAL, replace(large, batch_size=size + 1), gpus=(GPUS["A10G"],))
    )
    assert "--gpu " in str(error)


def test_a_quantized_checkpoint_is_refused_and_a_gguf_file_is_not():
    stored = StoredWeights(method="gptq", label="GPTQ int4", layer_bits=4.5, file_bits=4.5)
    with pytest.raises(ConfigError, match="quantized already"):
        make_finetune_plans(replace(MISTRAL, config=replace(V0_3, stored=stored)), USUAL)
    gguf = replace(V0_3, stored=replace(stored, method="gguf"))
    plan = make_finetune_plans(replace(MISTRAL, config=gguf), USUAL, gpus=(GPUS["A10G"],), forms=(None,))[0]
    assert plan.memory == training_memory(V0_3, USUAL, None)
