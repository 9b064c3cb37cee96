// SPDX-License-Identifier: Apache-2.0
// Streams, which do everything at once, and graphs: what a captured stream was asked for, in order.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "tests/emulator/stream.hpp"

namespace {

using Work = std::vector<std::function<void()>>;
Work* captured = nullptr;  // nullptr: no stream is being captured
cudaStream_t captured_stream = nullptr;

bool is_captured(cudaStream_t stream) {
  return captured != nullptr && stream == captured_stream;
}

}  // namespace

namespace gemma4::emulator {

cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  if (is_captured(stream)) {
    captured->push_back(std::move(work));
  } else {
    work();
  }
  return cudaSuccess;
}

}  // namespace gemma4::emulator

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static std::uintptr_t n_stream = 0;
  *stream = reinterpret_cast<cudaStream_t>(16 * ++n_stream);  // a name: there is nothing to point to
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  captured = new Work;
  captured_stream = stream;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(captured);
  captured = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, std::size_t* n_node) {
  *n_node = reinterpret_cast<const Work*>(graph)->size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
  *instance = reinterpret_cast<cudaGraphExec_t>(new Work(*reinterpret_cast<const Work*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t) {
  for (const auto& work : *reinterpret_cast<const Work*>(instance)) work();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Work*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
  delete reinterpret_cast<Work*>(instance);
  return cudaSuccess;
}

}  // extern "C"
