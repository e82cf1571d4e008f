// Streams, events, and CUDA's rules of stream capture: what may not happen while a stream is captured fails here as it does there.
#include <algorithm>
#include <map>
#include <thread>

#include "device.h"

namespace fake {
namespace {

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool is_valid = true;
  std::vector<std::string> nodes;
};

struct Stream {
  Capture *capture = nullptr;
  bool began_capture = false;
  // Captured work so far, and how much of it another captured stream waits for.
  size_t num_works = 0, num_joined = 0;
  // Events recorded so far, and up to which of them the host has waited.
  size_t num_events = 0, num_reached = 0;
};

// Not reached until the host has waited for it, or for something later on its stream, or asks a second time: a host that asks before it
// waits is taken to be faster than the device.
struct Event {
  Capture *capture = nullptr;
  Stream *stream = nullptr;
  size_t num_works = 0, number = 0;
  bool was_asked_for = false;

  bool is_reached() {
    bool reached = !stream || number <= stream->num_reached || was_asked_for;
    was_asked_for = true;
    return reached;
  }
};

struct Graph {
  std::vector<std::string> nodes;
};

std::map<void *, Stream *> streams;  // also stands for the default streams
std::vector<Capture *> captures;     // in progress
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
unsigned long long num_captures = 0;

Stream *stream_at(void *handle) {
  Stream *&stream = streams[handle];
  if (!stream) stream = new Stream;
  return stream;
}

cudaError_t refuse(Capture *capture, cudaError_t error, const std::string &what) {
  capture->is_valid = false;
  note("refused", what);
  return fail(error);
}

bool in_progress(const Capture *capture) {
  for (auto *other : captures)
    if (other == capture) return true;
  return false;
}

}  // namespace

cudaError_t work(void *handle, const char *kind, const std::string &detail, bool allowed_in_capture) {
  Lock lock(mutex);
  Stream *stream = stream_at(handle);
  if (!stream->capture) {
    note(kind, detail);
    return cudaSuccess;
  }
  if (!stream->capture->is_valid) return fail(cudaErrorStreamCaptureInvalidated);
  if (!allowed_in_capture) return refuse(stream->capture, cudaErrorStreamCaptureUnsupported, std::string(kind) + " " + detail);
  stream->capture->nodes.push_back(std::string(kind) + " " + detail);
  note("captured", stream->capture->nodes.back());
  stream->num_works++;
  return cudaSuccess;
}

cudaError_t unsafe(const char *what) {
  Lock lock(mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto *capture : captures) {
    bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    bool others = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (own || others) return refuse(capture, cudaErrorStreamCaptureUnsupported, what);
  }
  return cudaSuccess;
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

// --- Streams ---

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned, int) {
  Lock lock(mutex);
  auto *stream = new Stream;
  streams[stream] = stream;
  *handle = (cudaStream_t)stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) { return cudaStreamCreateWithPriority(handle, flags, 0); }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(mutex);
  Stream *stream = stream_at(handle);
  if (stream->capture) return refuse(stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
  cudaError_t error = unsafe("cudaStreamSynchronize");
  if (error != cudaSuccess) return error;
  stream->num_reached = stream->num_events;
  note("synchronize", "stream");
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  Lock lock(mutex);
  for (auto *capture : captures) return refuse(capture, cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
  for (auto &[_, stream] : streams) stream->num_reached = stream->num_events;
  note("synchronize", "device");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(mutex);
  Stream *stream = stream_at(handle);
  if (stream->capture) return refuse(stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
  return unsafe("cudaStreamQuery");
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) {
  cudaError_t error = work(handle, "host function", "");
  if (error == cudaSuccess && !stream_at(handle)->capture) function(data);
  return error;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void *data, unsigned) {
  cudaError_t error = work(handle, "host function", "", false);
  if (error == cudaSuccess) function(handle, cudaSuccess, data);
  return error;
}

// --- Events ---

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned) {
  *handle = (cudaEvent_t) new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *handle) { return cudaEventCreateWithFlags(handle, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete (Event *)handle;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  Lock lock(mutex);
  Stream *stream = stream_at(on);
  *(Event *)handle = {stream->capture, stream, stream->num_works, ++stream->num_events, false};
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned) { return cudaEventRecord(handle, on); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(mutex);
  auto *event = (Event *)handle;
  if (event->capture && in_progress(event->capture)) return refuse(event->capture, cudaErrorCapturedEvent, "cudaEventQuery");
  cudaError_t error = unsafe("cudaEventQuery");
  if (error != cudaSuccess) return error;
  return event->is_reached() ? cudaSuccess : cudaErrorNotReady;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock(mutex);
  auto *event = (Event *)handle;
  if (event->capture && in_progress(event->capture)) return refuse(event->capture, cudaErrorCapturedEvent, "cudaEventSynchronize");
  cudaError_t error = unsafe("cudaEventSynchronize");
  if (error != cudaSuccess) return error;
  if (event->stream) event->stream->num_reached = std::max(event->stream->num_reached, event->number);
  note("synchronize", "event");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t waited, unsigned) {
  Lock lock(mutex);
  Stream *stream = stream_at(handle);
  auto *event = (Event *)waited;
  Capture *theirs = event->capture && in_progress(event->capture) ? event->capture : nullptr;
  if (!theirs) {
    if (stream->capture && event->stream) return refuse(stream->capture, cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
    return cudaSuccess;
  }
  if (stream->capture && stream->capture != theirs) return refuse(theirs, cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent");
  if (!stream->capture) {
    // This stream joins the capture.
    stream->capture = theirs;
    stream->num_works = stream->num_joined = 0;
  }
  event->stream->num_joined = std::max(event->stream->num_joined, event->num_works);
  return cudaSuccess;
}

// --- Capture and graphs ---

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  if (!handle) return fail(cudaErrorStreamCaptureUnsupported);  // the legacy default stream
  Stream *stream = stream_at(handle);
  if (stream->capture) return fail(cudaErrorIllegalState);
  stream->capture = new Capture{++num_captures, mode, std::this_thread::get_id(), true, {}};
  stream->began_capture = true;
  stream->num_works = stream->num_joined = 0;
  captures.push_back(stream->capture);
  note("capture begin");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Lock lock(mutex);
  *graph = nullptr;
  Stream *origin = stream_at(handle);
  Capture *capture = origin->capture;
  if (!capture || !origin->began_capture) return fail(cudaErrorIllegalState);
  cudaError_t error = cudaSuccess;
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return refuse(capture, cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture");
  if (!capture->is_valid) error = cudaErrorStreamCaptureInvalidated;
  for (auto &[_, stream] : streams) {
    if (stream->capture != capture) continue;
    if (stream != origin && stream->num_joined < stream->num_works && error == cudaSuccess) error = cudaErrorStreamCaptureUnjoined;
    stream->capture = nullptr;
  }
  origin->began_capture = false;
  captures.erase(std::remove(captures.begin(), captures.end(), capture), captures.end());
  note("capture end", std::to_string(capture->nodes.size()));
  if (error != cudaSuccess) return fail(error);
  // The capture itself stays: events may still name it.
  *graph = (cudaGraph_t) new Graph{capture->nodes};
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status) {
  Lock lock(mutex);
  Capture *capture = stream_at(handle)->capture;
  *status = !capture             ? cudaStreamCaptureStatusNone
            : capture->is_valid ? cudaStreamCaptureStatusActive
                                : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *num_nodes) {
  Lock lock(mutex);
  cudaStreamIsCapturing(handle, status);
  Capture *capture = stream_at(handle)->capture;
  if (id && capture) *id = capture->id;
  if (graph) *graph = (cudaGraph_t)capture;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
  *exec = (cudaGraphExec_t) new Graph(*(Graph *)graph);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return work(stream, "graph", std::to_string(((Graph *)exec)->nodes.size()));
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete (Graph *)graph;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete (Graph *)exec;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *num_nodes) {
  *num_nodes = ((Graph *)graph)->nodes.size();
  return cudaSuccess;
}
