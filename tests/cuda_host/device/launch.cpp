// What the runtime knows of kernels and of the device's properties. A launch is checked against the device's limits.
#include <cstring>
#include <unordered_map>

#include "device.h"

namespace fake {
namespace {

std::unordered_map<const void *, std::string> kernels;  // by their host function

struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  void *stream;
};
thread_local std::vector<Configuration> configurations;

std::string name_of(const void *function) {
  auto kernel = kernels.find(function);
  return kernel == kernels.end() ? "?" : kernel->second;
}

}  // namespace

cudaError_t launch(const std::string &name, dim3 grid, dim3 block, size_t shared_memory, void *stream) {
  size_t threads = (size_t)block.x * block.y * block.z;
  bool fits = grid.x >= 1 && grid.x <= 2147483647u && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && threads >= 1 &&
              threads <= 1024 && shared_memory <= gpu().shared_memory_optin;
  std::string shape = " grid=" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," + std::to_string(grid.z) +
                      " threads=" + std::to_string(threads) + " shared=" + std::to_string(shared_memory);
  if (!fits) {
    note("refused", "launch of " + name + shape);
    return fail(cudaErrorInvalidConfiguration);
  }
  return work(stream, "launch", name + shape);
}

int attribute(int which) {
  switch (which) {  // the numbers of the runtime's attributes are those of the driver's
    case cudaDevAttrComputeCapabilityMajor: return gpu().capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return gpu().capability % 10;
    case cudaDevAttrMultiProcessorCount: return gpu().multiprocessors;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return (int)gpu().shared_memory_optin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return (int)gpu().shared_memory_per_multiprocessor;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return gpu().capability == 86 || gpu().capability == 89 ? 1536 : 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 16;
    case cudaDevAttrL2CacheSize: return 6 << 20;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrClockRate: return 1700000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 6251000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 384;
    default: return 0;
  }
}

}  // namespace fake

using namespace fake;

// --- Registration, which the compiler writes into every library with kernels ---

EXPORT void **__cudaRegisterFatBinary(void *) {
  static long handle = 1;
  return (void **)handle++;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **) {}
EXPORT void __cudaUnregisterFatBinary(void **) {}
EXPORT char __cudaInitModule(void **) { return 1; }
EXPORT void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  kernels[host] = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, void *stream) {
  configurations.push_back({grid, block, shared_memory, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_memory, void *stream) {
  Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared_memory = top.shared_memory;
  *(void **)stream = top.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

// --- Launches ---

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **, size_t shared_memory, cudaStream_t stream) {
  return launch(name_of(kernel), grid, block, shared_memory, stream);
}
EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **, size_t shared_memory, cudaStream_t stream) {
  return launch(name_of(function), grid, block, shared_memory, stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **, size_t shared_memory, cudaStream_t stream) {
  return launch(name_of(function), grid, block, shared_memory, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **) {
  return launch(name_of(function), config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute which, int value) {
  bool too_much = which == cudaFuncAttributeMaxDynamicSharedMemorySize && (size_t)value > gpu().shared_memory_optin;
  return too_much ? fail(cudaErrorInvalidValue) : cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->maxDynamicSharedSizeBytes = (int)gpu().shared_memory_optin;
  attributes->ptxVersion = attributes->binaryVersion = gpu().capability;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// --- Devices ---

static thread_local int current_device = 0;

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
  *count = gpu().count;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= gpu().count) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  memset(properties, 0, sizeof *properties);
  strncpy(properties->name, gpu().name.c_str(), sizeof properties->name - 1);
  properties->totalGlobalMem = gpu().memory;
  properties->major = gpu().capability / 10;
  properties->minor = gpu().capability % 10;
  properties->multiProcessorCount = gpu().multiprocessors;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->maxBlocksPerMultiProcessor = 16;
  properties->warpSize = 32;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = gpu().shared_memory_optin;
  properties->sharedMemPerMultiprocessor = gpu().shared_memory_per_multiprocessor;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->l2CacheSize = 6 << 20;
  properties->totalConstMem = 65536;
  properties->unifiedAddressing = properties->concurrentKernels = 1;
  properties->asyncEngineCount = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
  *can = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
