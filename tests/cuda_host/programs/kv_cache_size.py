"""Starts a 7B engine with all defaults on the GPU that this process sees, fills it, and prints what that took, as JSON:
`kv_cache_size.py [QUANTIZATION]`.
"""

import json
import sys

from cuda_host.engines import make_config, make_core, make_request
from cuda_host.fake_device import FakeDevice

from workers.device.require import require_gpu
from workers.device.sizes import DEVICE_SIZES, sized_for

device = FakeDevice()
quantization = {"quantization": sys.argv[1]} if len(sys.argv) > 1 else {}
config = make_config(sized_by_device=DEVICE_SIZES, **quantization)
config = sized_for(config, require_gpu("This process"), lambda value: value)
core = make_core(config)
while core.runner.size_to_capture(is_idle=True) is not None:
    core.heartbeat()
peak = device.used_bytes
core.add_request(make_request("long", config.max_num_batched_tokens * 2, max_tokens=2, prompt_logprobs=1))
for i in range(config.max_num_seqs - 1):
    core.add_request(
        make_request(str(i), 20, max_tokens=4, presence_penalty=0.1, logprobs=5, temperature=0.7, top_p=0.9)
    )
while core.has_work():
    core.step()
    peak = max(peak, device.used_bytes)
facts = {
    "num_blocks": core.kv_cache.pool.num_blocks,
    "num_tokens": core.kv_cache.pool.num_blocks * config.block_size,
    "max_num_seqs": config.max_num_seqs,
    "max_num_batched_tokens": config.max_num_batched_tokens,
    "captured_sizes": core.runner.graphs.captured_sizes,
    "peak_used_bytes": peak,
}
json.dump(facts, sys.stdout)
