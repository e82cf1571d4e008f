"""Which plan is recommended, and the message if none fits."""

import re
from dataclasses import replace

import pytest

from cluster.plan.gpus import GPUS, find_gpu, find_gpus
from cluster.plan.models import FAMILY, V0_1, PlannedModel
from cluster.plan.offers import OFFERS
from cluster.plan.planner import MAX_REPLICAS, Question, make_plan, make_plans, refusal, sizes_of
from cluster.plan.roofline import Workload
from workers.errors import ConfigError


def question(model: str = "mistralai/Mistral-7B-v0.3", *, context: int = 8192, concurrency: int = 32) -> Question:
    return Question(
        model=PlannedModel(name=model, config=FAMILY[model]),
        workload=Workload(context=context, concurrency=concurrency, prompt_tokens=context // 2),
        dtype="bfloat16",
    )


def test_the_cheapest_machine_that_fits_is_recommended():
    plans = make_plans(question(), gpus=[GPUS["A10G"]], offers=OFFERS)
    assert [(p.tensor_parallel_size, p.num_replicas) for p in plans] == [(4, 1), (1, 7), (8, 1), (2, 2)]
    best = plans[0]
    assert [o.instance_type for o in best.offers] == ["g5.12xlarge"]
    assert best.price is not None
    # $5.672 per hour, divided by the tokens of an hour.
    assert best.usd_per_million_tokens(best.price) == pytest.approx(5.672 / 3600 / best.speed.tokens_per_s * 1e6)


def test_a_plan_that_is_not_on_sale_comes_after_those_that_are():
    plans = make_plans(question(concurrency=16), gpus=[GPUS["A10G"]], offers=OFFERS)
    assert [(p.tensor_parallel_size, p.num_replicas) for p in plans] == [(1, 4), (4, 1), (8, 1), (2, 1)]
    assert all(p.fits for p in plans)


def test_replicas_hold_together_what_one_card_cannot():
    """An A10G holds 5 requests of 8,192 tokens: 32 of them are 7 x 5."""
    asked = question()
    (plan,) = make_plans(asked, gpus=[GPUS["A10G"]], tensor_parallel_size=1, offers=OFFERS)
    assert (plan.num_replicas, plan.memory.num_sequences) == (7, 5)
    assert plan.fits
    (price,) = [offer.on_demand for offer in plan.offers]
    assert price is not None
    assert plan.usd_per_hour(price) == pytest.approx(7 * 1.006)
    alone = make_plan(question(concurrency=5), GPUS["A10G"], 1, offers=OFFERS)
    assert plan.tokens_per_s == pytest.approx(7 * alone.speed.tokens_per_s)
    assert plan.usd_per_million_tokens(price) == pytest.approx(alone.usd_per_million_tokens(price))
    six = make_plan(question(concurrency=6), GPUS["A10G"], 1)
    assert not six.fits, "fewer replicas would not do"
    (too_many,) = make_plans(question(concurrency=5 * MAX_REPLICAS + 1), gpus=[GPUS["A10G"]], tensor_parallel_size=1)
    assert not too_many.fits


def test_on_demand_plans_have_prices_on_demand():
    asked = replace(question(concurrency=4), cloud="gcp")
    on_demand, spot = (
        make_plans(replace(asked, spot=s), gpus=[GPUS["H100"]], tensor_parallel_size=1, offers=OFFERS)[0]
        for s in (False, True)
    )
    assert on_demand.fits and on_demand.offers == ()
    assert [o.instance_type for o in spot.offers] == ["a3-highgpu-1g"]
    anywhere = make_plans(question(concurrency=4), gpus=[GPUS["H100"]], tensor_parallel_size=1, offers=OFFERS)[0]
    assert [o.instance_type for o in anywhere.offers] == ["p5.4xlarge", "Standard_NC40ads_H100_v5"]


def test_without_prices_the_fewest_gpus_are_recommended():
    plans = make_plans(question(), gpus=[GPUS["A10G"]])
    assert [(p.tensor_parallel_size, p.num_replicas) for p in plans] == [(4, 1), (2, 2), (1, 7), (8, 1)]


def test_spot_and_cloud_decide_which_price_counts():
    asked = replace(question(concurrency=4), spot=True, cloud="aws")
    best = make_plans(asked, offers=OFFERS)[0]
    assert [o.instance_type for o in best.offers] == ["g6.xlarge"]
    assert best.price is best.offers[0].spot


def test_the_window_bounds_what_long_contexts_take():
    windowed = make_plan(question("mistralai/Mistral-7B-v0.1", context=32_768), GPUS["A100"], 1)
    whole = make_plan(question("mistralai/Mistral-7B-v0.3", context=32_768), GPUS["A100"], 1)
    assert windowed.fits
    assert not whole.fits
    assert windowed.memory.needed_blocks == 32 * 257 + 256  # a step of 4,096 tokens
    assert whole.memory.needed_blocks == 32 * 2048


@pytest.mark.parametrize("model", ["mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"])
@pytest.mark.parametrize(("gpu", "size"), [("A10G", 1), ("L4", 2), ("A100", 1)])
def test_a_refusal_has_the_numbers_and_every_remedy_works(model, gpu, size):
    asked = question(model, context=8192, concurrency=64)
    plan = make_plan(asked, GPUS[gpu], size)
    if plan.fits:
        asked = question(model, context=8192, concurrency=500)
        plan = make_plan(asked, GPUS[gpu], size)
    message = str(refusal(asked, [plan], offers=OFFERS))
    assert f"{plan.memory.missing_bytes / 1e9:.1f} GB are missing" in message
    assert f"may use {plan.memory.usable_bytes / 1e9:.1f} GB" in message
    fewer, shorter = re.search(r"--concurrency (\d+)", message), re.search(r"--context (\d+)", message)
    assert fewer is not None
    assert shorter is not None
    work = asked.workload
    for workload in (replace(work, concurrency=int(fewer[1])), replace(work, context=int(shorter[1]), prompt_tokens=1)):
        assert make_plan(replace(asked, workload=workload), GPUS[gpu], size).fits
    one_more = replace(work, concurrency=int(fewer[1]) + 1)
    assert not make_plan(replace(asked, workload=one_more), GPUS[gpu], size).fits
    if more := re.search(r"; --tensor-parallel-size (\d)", message):
        assert make_plan(asked, GPUS[gpu], int(more[1])).fits
    if other := re.search(r"--gpu (\S+) --tensor-parallel-size (\d)", message):
        assert make_plan(asked, find_gpu(other[1]), int(other[2])).fits


def test_a_kv_cache_in_8_bits_is_a_remedy():
    """A sequence of 32,768 tokens takes 4.3 GB in bfloat16, and 2.2 with 132 bytes instead of 256 for each key and value."""
    asked = question(context=32_768, concurrency=100)
    many, in_8_bits = (make_plan(replace(asked, kv_cache_dtype=form), GPUS["A100"], 1) for form in ("auto", "int8"))
    assert in_8_bits.memory.block_bytes * 128 == many.memory.block_bytes * 66
    assert in_8_bits.speed.step_s < many.speed.step_s
    assert in_8_bits.memory.max_sequences >= many.memory.max_sequences + 2
    asked = question(context=32_768, concurrency=many.memory.max_sequences + 2)
    plan = make_plan(asked, GPUS["A100"], 1)
    assert not plan.fits
    assert "--kv-cache-dtype int8" in str(refusal(asked, [plan], offers=OFFERS))
    assert make_plan(replace(asked, kv_cache_dtype="int8"), GPUS["A100"], 1).fits
    asked = question(context=32_768, concurrency=100)
    assert "--kv-cache-dtype" not in str(refusal(asked, [many], offers=OFFERS)), "that would not be enough"


@pytest.mark.parametrize(("concurrency", "quantization"), [(2, "int8"), (3, "int4")])
def test_quantised_weights_are_a_remedy(concurrency, quantization):
    """An A10G has 5.9 GB beside 14.5 GB of weights, 12.4 beside 7.9 and 16.0 beside 4.3; a context of 32,768 tokens takes 4.3 GB."""
    asked = question(context=32_768, concurrency=concurrency)
    plan = make_plan(asked, GPUS["A10G"], 1)
    assert not plan.fits
    assert f"--quantization {quantization}" in str(refusal(asked, [plan], offers=OFFERS))
    assert make_plan(replace(asked, quantization=quantization), GPUS["A10G"], 1).fits


def test_float8_doubles_the_operations_of_newer_gpus_only():
    asked = replace(question(context=8192, concurrency=1), quantization="fp8")
    dense = replace(asked, quantization=None)
    newer, older = GPUS["H100"], GPUS["A10G"]
    assert make_plan(asked, newer, 1).speed.prefill_s == pytest.approx(make_plan(dense, newer, 1).speed.prefill_s / 2)
    assert make_plan(asked, older, 1).speed.prefill_s == make_plan(dense, older, 1).speed.prefill_s
    assert make_plan(asked, older, 1).speed.step_s < 0.6 * make_plan(dense, older, 1).speed.step_s


def test_a_size_by_which_quantised_rows_cannot_be_divided_is_left_out():
    config = replace(FAMILY["mistralai/Mistral-7B-v0.3"], head_dim=20)  # 80 inputs on each of 8 ranks
    asked = replace(question(), model=PlannedModel(name="m", config=config), quantization="int8")
    assert {p.tensor_parallel_size for p in make_plans(asked, gpus=[GPUS["A100"]])} == {1, 2, 4}
    message = r"on 8 ranks: .* width would begin at 80, .* Use --tensor-parallel-size 1, 2 or 4,"
    with pytest.raises(ConfigError, match=message):
        make_plans(asked, gpus=[GPUS["A100"]], tensor_parallel_size=8)


def test_no_known_gpu_is_large_enough():
    asked = question(concurrency=100_000)
    message = str(refusal(asked, [make_plan(asked, GPUS["L4"], 1)], offers=OFFERS))
    assert "--gpu" not in message
    assert "--concurrency" in message


def test_heads_and_machines_limit_the_sizes():
    assert sizes_of(V0_1) == [1, 2, 4, 8], "32 would work, on no machine that is known"
    assert sizes_of(replace(V0_1, num_attention_heads=4, num_key_value_heads=4)) == [1, 2, 4]
    assert sizes_of(replace(V0_1, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)) == [1, 3]
    with pytest.raises(ConfigError, match=r"Use one of 1, 2, 4, 8"):
        make_plan(question(), GPUS["A10G"], 3)


def test_gpus_are_found_in_any_case_and_unknown_ones_name_the_known():
    assert find_gpu("a100-80gb") is GPUS["A100-80GB"]
    with pytest.raises(ConfigError, match=r"T4 is not known. Use one of A10G, .*H100"):
        find_gpu("T4")


def test_gpus_and_their_number_as_skypilot_writes_them():
    assert find_gpus("a10g:4") == (GPUS["A10G"], 4)
    assert find_gpus("H200") == (GPUS["H200"], None)
    for wrong in ("A10G:", "A10G:0", "A10G:four"):
        with pytest.raises(ConfigError, match=r"Write it like A10G:4"):
            find_gpus(wrong)
