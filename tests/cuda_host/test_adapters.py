"""Adapters on the fake device: an engine with slots starts, its steps launch two kernels more for each layer, and graphs repeat them."""

from dataclasses import replace

import msgspec
import pytest
from cuda_host.engines import make_config, make_core, make_request
from cuda_host.fake_device import FakeDevice
from support.checkpoints.adapters import write_adapter

from workers.engine.core import EngineCore
from workers.gpu_check.models import MISTRAL_7B

pytestmark = pytest.mark.cuda_host

NUM_LAYERS = 2
MODEL = replace(MISTRAL_7B, num_hidden_layers=NUM_LAYERS)
SETTINGS = {"model": MODEL, "num_kv_blocks": 4096, "max_model_len": 4096, "max_num_seqs": 64}
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter"), MODEL, rank=8)


def decode_together(core: EngineCore, adapters: list[str | None]) -> None:
    """Returns when all of them are in a decode step."""
    for i, adapter in enumerate(adapters):
        core.add_request(msgspec.structs.replace(make_request(str(i), 8, max_tokens=400), adapter=adapter))
    while any(request.num_output_tokens < 3 for request in core.scheduler.running) or core.scheduler.waiting:
        core.step()


def end_all(core: EngineCore) -> None:
    for request in list(core.scheduler.running):
        core.abort(request.request_id)
    while core.has_work():
        core.step()


def lora_launches(record) -> list[str]:
    return [x for x in record.details("launch") if x.startswith(("shrink_kernel ", "expand_kernel "))]


def test_each_layer_launches_two_kernels_for_any_number_of_adapters(device: FakeDevice, folder):
    core = make_core(make_config(cuda_graphs=False, **LORA, **SETTINGS))
    for name in ("a", "b"):
        core.runner.adapters.load(name, folder)
    for adapters in ([None] * 3, ["a", None, "a"], ["a", "b", None]):
        decode_together(core, adapters)
        with device.recorded() as record:
            core.step()
        assert len(lora_launches(record)) == 2 * 4 * NUM_LAYERS
        assert record.num_synchronizations == 1
        end_all(core)


def test_a_graph_goes_on_while_adapters_change_and_a_change_waits_for_nothing(device, folder):
    core = make_core(make_config(**LORA, **SETTINGS))
    while core.runner.size_to_capture(is_idle=True) is not None:
        core.heartbeat()
    for name in ("a", "b", "c"):
        core.runner.adapters.load(name, folder)
    decode_together(core, ["a", "b"])
    with device.recorded() as record:
        core.step()
    assert record.num_graphs == record.num_synchronizations == 1
    end_all(core)
    core.add_request(msgspec.structs.replace(make_request("c", 8, max_tokens=2), adapter="c"))
    with device.recorded() as record:
        core.step()
    assert record.num_synchronizations <= 1
    end_all(core)


def test_without_adapters_nothing_is_launched(device):
    core = make_core(make_config(cuda_graphs=False, **SETTINGS))
    decode_together(core, [None])
    with device.recorded() as record:
        core.step()
    assert not lora_launches(record)
    end_all(core)
