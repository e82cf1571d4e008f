"""The GPUs that the fake device plays: what the driver says of each, as its environment variables. Knows nothing of the project."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FakeGpu:
    """`memory_bytes` is the total that cudaMemGetInfo reports on such a machine; shared memory is in bytes."""

    name: str
    capability: int
    multiprocessors: int
    memory_bytes: int
    shared_memory_optin: int
    shared_memory: int

    def environment(self, count: int = 1) -> dict[str, str]:
        """For a process that is to see `count` of them."""
        return {
            "FAKE_GPU_NAME": self.name,
            "FAKE_GPU_COUNT": str(count),
            "FAKE_GPU_CAPABILITY": str(self.capability),
            "FAKE_GPU_MULTIPROCESSORS": str(self.multiprocessors),
            "FAKE_GPU_MEMORY": str(self.memory_bytes),
            "FAKE_GPU_SHARED_MEMORY_OPTIN": str(self.shared_memory_optin),
            "FAKE_GPU_SHARED_MEMORY": str(self.shared_memory),
        }


A10G = FakeGpu("NVIDIA A10G", 86, 80, 23_696_375_808, 101_376, 102_400)
A100_40 = FakeGpu("NVIDIA A100-SXM4-40GB", 80, 108, 42_298_834_944, 166_912, 167_936)
A100_80 = FakeGpu("NVIDIA A100-SXM4-80GB", 80, 108, 84_974_239_744, 166_912, 167_936)
H200 = FakeGpu("NVIDIA H200", 90, 132, 150_109_880_320, 232_448, 233_472)
GPUS = {"A10G": A10G, "A100-40GB": A100_40, "A100-80GB": A100_80, "H200": H200}
