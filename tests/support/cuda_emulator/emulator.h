// Stands in for CUDA's compiler: put before a .cu file, it makes the kernels functions that the CPU
// can run, and a launch a call of emulator.cpp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <cmath>
#include <functional>

#undef __device__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local     // a block stays on one thread of the CPU
#define asm(...) root = ::sqrtf(x)  // adamw.cu's, and there is no other
#define __fdividef(x, y) ((x) / (y))
// In launch.h, where the kernel and its arguments still have their types.
#define cudaLaunchKernel(function, grid, block, pointers, shared, stream) \
  ((void)(pointers), (void)(stream),                                      \
   emulator::launch(kernel, (grid).x, (block).x, shared, arguments...))

using std::isfinite;
using std::sqrt;

namespace emulator {

cudaError_t run(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel);

// What follows is for a kernel's threads.
[[noreturn]] void fail(const char* problem);
void wait_for_block();
bool any_of_block(bool x);
uint64_t exchange(unsigned mask, uint64_t own, int lane);  // returns that lane's own
void pause();                                              // perhaps lets other blocks go ahead

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared,
                   A... arguments) {
  return run(blocks, threads, shared, [=] { kernel(arguments...); });
}

template <class T>
T& access(T* p) {
  if ((uintptr_t)p % sizeof(T)) fail("an access is not aligned");
  return *p;
}

template <class To, class From>
To bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y);
  memcpy(&y, &x, sizeof x);
  return y;
}

}  // namespace emulator

extern thread_local uint3 threadIdx, blockIdx;

inline void __syncthreads() { emulator::wait_for_block(); }
inline int __syncthreads_or(int x) { return emulator::any_of_block(x != 0); }
inline void __threadfence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  emulator::pause();
}

inline unsigned atomicInc(unsigned* p, unsigned most) {
  unsigned old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(p, &old, old >= most ? 0 : old + 1, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return old;
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  bits = emulator::exchange(mask, bits, lane);
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return __shfl_sync(mask, x, (int)(threadIdx.x % 32) ^ distance);
}

#define __ldcg emulator::access
#define __ldca emulator::access
#define __ldg emulator::access
#define __stcg(p, x) (emulator::access(p) = (x))
#define __float_as_uint emulator::bits<unsigned, float>
#define __uint_as_float emulator::bits<float, unsigned>
#define __double_as_longlong emulator::bits<long long, double>
#define __longlong_as_double emulator::bits<double, long long>
