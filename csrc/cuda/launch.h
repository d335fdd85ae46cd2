// How kernels are launched: on the caller's device and stream, failures as exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "../table.h"

namespace spectral {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or a later call would report it again
  throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
}

inline void check_dtype(const Header& header, const char* what) {
  const int64_t dtype = header.weight_dtype;
  if (dtype != kFloat32 && dtype != kBFloat16 && dtype != kFloat16)
    throw std::invalid_argument(std::string(what) +
                                ": expected float32, bfloat16 or float16 weights, got others");
}

// Makes a device current, and restores the previous one at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) : device_(device) {
    check(cudaGetDevice(&before_), what);
    check(cudaSetDevice(device), what);
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// Runs kernel(arguments...) in blocks of the given threads, with so many bytes of shared memory
// besides what the kernel declares.
template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared, int64_t stream, Parameters... arguments) {
  constexpr int64_t kMaxBlocks = 0x7fffffff, kAlwaysGranted = 48 * 1024;
  if (blocks > kMaxBlocks)
    throw std::invalid_argument(std::string(what) + ": expected at most " +
                                std::to_string(kMaxBlocks) + " tiles, got " +
                                std::to_string(blocks));
  if (shared > kAlwaysGranted)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
          what);
  void* pointers[] = {&arguments...};
  check(
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3((unsigned)blocks), dim3(threads),
                       pointers, (size_t)shared, reinterpret_cast<cudaStream_t>(stream)),
      what);
}

}  // namespace cuda
}  // namespace spectral
