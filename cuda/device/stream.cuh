// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "cuda/device/check.cuh"

/// Owners of CUDA's streams, events and graphs; all move-only, destroyed without a throw.
namespace gemma4::cuda {

namespace detail {

/// A handle that is destroyed by kDestroy and empty when moved from.
template <class THandle, cudaError_t (*kDestroy)(THandle)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(THandle handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_ != nullptr) kDestroy(handle_);
  }
  [[nodiscard]] THandle get() const { return handle_; }

 private:
  THandle handle_ = nullptr;
};

}  // namespace detail

/// A stream that does not wait for the default one. Converts to the handle that CUDA calls take.
class Stream {
 public:
  Stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creation of a stream");
    handle_ = decltype(handle_)(stream);
  }
  [[nodiscard]] operator cudaStream_t() const { return handle_.get(); }
  void synchronize() const { check(cudaStreamSynchronize(handle_.get()), "wait for a stream"); }

 private:
  detail::Handle<cudaStream_t, cudaStreamDestroy> handle_;
};

/// A point in a stream, with a time.
class Event {
 public:
  Event() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "creation of an event");
    handle_ = decltype(handle_)(event);
  }
  void record(cudaStream_t stream) const { check(cudaEventRecord(handle_.get(), stream), "record of an event"); }
  void synchronize() const { check(cudaEventSynchronize(handle_.get()), "wait for an event"); }

  /// What is put into `stream` from now on waits until this point has been reached; nothing if it was never recorded.
  void delay(cudaStream_t stream) const {
    check(cudaStreamWaitEvent(stream, handle_.get(), 0), "wait of a stream for an event");
  }

  /// Microseconds from `begin` to this event; both must have been recorded, and this one reached.
  [[nodiscard]] double us_since(const Event& begin) const {
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, begin.handle_.get(), handle_.get()), "time between two events");
    return 1e3 * static_cast<double>(ms);
  }

 private:
  detail::Handle<cudaEvent_t, cudaEventDestroy> handle_;
};

/// A recorded sequence of launches that can be replayed.
class Graph {
 public:
  /// Records what `enqueue()` puts into `stream`; nothing of it runs. If enqueue throws, the recording is ended and
  /// dropped, and the stream is usable again.
  template <class TEnqueue>
  [[nodiscard]] static Graph capture(cudaStream_t stream, TEnqueue&& enqueue) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of a graph capture");
    cudaGraph_t graph = nullptr;
    try {
      enqueue();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph), "end of a graph capture");
    const detail::Handle<cudaGraph_t, cudaGraphDestroy> owner(graph);
    cudaGraphExec_t exec = nullptr;
    check(cudaGraphInstantiate(&exec, graph, 0), "instantiation of a graph");
    Graph result;
    check(cudaGraphGetNodes(graph, nullptr, &result.n_node_), "count of the nodes of a graph");
    result.exec_ = decltype(result.exec_)(exec);
    return result;
  }

  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(exec_.get(), stream), "launch of a graph"); }
  [[nodiscard]] std::size_t n_node() const { return n_node_; }

 private:
  detail::Handle<cudaGraphExec_t, cudaGraphExecDestroy> exec_;
  std::size_t n_node_ = 0;
};

}  // namespace gemma4::cuda
