// Runs the blocks of a launch in random order on a few threads of the CPU. The threads of a block
// are fibers of one of these; a fiber runs until it waits at a barrier, a shuffle or a vote.
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace emulator {

constexpr int kWorkers = 3;                 // threads of the CPU
constexpr int kMostThreads = 256;           // of a block
constexpr size_t kStackBytes = 256 * 1024;  // of a fiber
constexpr size_t kStacksBytes = kMostThreads * kStackBytes;
// Of shared memory: an H100's multiprocessor, what its driver keeps, and what a block may ask for.
constexpr int kBothShared = 228 * 1024, kReserved = 1024, kMostShared = kBothShared - kReserved;
constexpr int kBeyond = 1024;  // bytes behind it, where nothing may be written

}  // namespace emulator

thread_local uint3 threadIdx, blockIdx;
namespace spectral::cuda {
extern thread_local float4 dynamic_shared[];
thread_local float4 dynamic_shared[(emulator::kMostShared + emulator::kBeyond) / sizeof(float4)];
}  // namespace spectral::cuda

namespace emulator {
namespace {

enum class State { kReady, kAtShuffle, kAtBarrier, kEnded };

struct Fiber {
  jmp_buf here;
  ucontext_t start;
  bool begun = false;
  State state = State::kReady;
  unsigned exchanges = 0;
};

// A block that runs, or the place of one.
struct Block {
  Fiber fibers[kMostThreads];
  char* const stacks = static_cast<char*>(mmap(nullptr, kStacksBytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  uint64_t exchanged[kMostThreads / 32][2][32];
  bool any;            // of the votes so far
  int count, current;  // threads, and which of them runs
  jmp_buf scheduler;
  const std::function<void()>* kernel;
  const char* problem;
  std::mt19937 random;
};

thread_local Block* block;
std::atomic<const char*> problem{nullptr};  // of the last launch

void wait(State state) {
  Fiber& own = block->fibers[block->current];
  own.state = state;
  if (!_setjmp(own.here)) _longjmp(block->scheduler, 1);
}

void run_thread() {
  (*block->kernel)();
  block->fibers[block->current].state = State::kEnded;
  _longjmp(block->scheduler, 1);
}

// Returns when the thread waits or has ended.
__attribute__((noinline)) void resume(int i) {
  Fiber& fiber = block->fibers[i];
  block->current = i;
  threadIdx.x = i;
  if (_setjmp(block->scheduler)) return;
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = block->stacks + i * kStackBytes;
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, run_thread, 0);
  setcontext(&fiber.start);
}

int64_t count(int begin, int end, State state) {
  return std::count_if(block->fibers + begin, block->fibers + end,
                       [=](const Fiber& fiber) { return fiber.state == state; });
}

void make_ready(int begin, int end) {
  for (int i = begin; i < end; ++i) block->fibers[i].state = State::kReady;
}

// Runs the threads of a warp up to a barrier or their end, from any lane on and in either direction
// from each shuffle to the next. Returns what went wrong, or null.
const char* run_warp(int warp) {
  const int begin = 32 * warp, end = std::min(begin + 32, block->count);
  for (;;) {
    const unsigned first = block->random() % 32, step = block->random() % 2 ? 1 : 31;
    for (unsigned k = 0; k < 32; ++k) {
      const int i = begin + (int)((first + k * step) % 32);
      if (i >= end || block->fibers[i].state != State::kReady) continue;
      resume(i);
      if (block->problem) return block->problem;
    }
    const int64_t shuffling = count(begin, end, State::kAtShuffle);
    if (shuffling == 0) return nullptr;
    if (shuffling < end - begin) return "some lanes of a warp shuffle without the others";
    make_ready(begin, end);
  }
}

const char* run_block(int64_t shared) {
  for (Fiber& fiber : block->fibers) fiber.begun = false, fiber.exchanges = 0;
  make_ready(0, block->count);
  block->problem = nullptr;
  block->any = false;
  char* const dynamic = (char*)spectral::cuda::dynamic_shared;
  memset(dynamic, 0xff, shared + kBeyond);  // NaN
  const int warps = (block->count + 31) / 32;
  for (;;) {
    const unsigned first = block->random() % warps;
    for (int k = 0; k < warps; ++k)
      if (const char* found = run_warp((first + k) % warps)) return found;
    const int64_t ended = count(0, block->count, State::kEnded);
    if (ended == block->count) break;
    if (ended > 0) return "some threads wait at a barrier, others have ended";
    make_ready(0, block->count);
    pause();
  }
  const auto untouched = [](char x) { return x == (char)0xff; };
  if (!std::all_of(dynamic + shared, dynamic + shared + kBeyond, untouched))
    return "a block writes beyond its shared memory";
  return nullptr;
}

}  // namespace

void fail(const char* what) {
  block->problem = what;
  _longjmp(block->scheduler, 1);
}

void pause() {
  if (block->random() % 64 == 0) std::this_thread::yield();
}

void wait_for_block() { wait(State::kAtBarrier); }

bool any_of_block(bool x) {
  if (x) block->any = true;
  wait_for_block();
  const bool result = block->any;
  wait_for_block();
  block->any = false;
  wait_for_block();
  return result;
}

uint64_t exchange(unsigned mask, uint64_t own, int lane) {
  if (mask != 0xffffffffu) fail("the mask of a shuffle is not whole");
  const int i = block->current;
  uint64_t* exchanged = block->exchanged[i / 32][block->fibers[i].exchanges++ % 2];
  exchanged[i % 32] = own;
  wait(State::kAtShuffle);
  return exchanged[lane];
}

cudaError_t run(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel) {
  static std::mutex mutex;
  static Block places[kWorkers];
  static unsigned launches = 0;
  const std::lock_guard<std::mutex> one_at_a_time(mutex);
  const bool possible = blocks > 0 && threads <= kMostThreads && shared <= kMostShared;
  problem = possible ? nullptr : "there is no such launch";
  std::mt19937 random(++launches);
  std::vector<int64_t> order(possible ? blocks : 0);
  std::iota(order.begin(), order.end(), 0);
  if (launches % 4) std::shuffle(order.begin(), order.end(), random);
  std::atomic<size_t> next{0};
  const auto work = [&](int worker) {
    block = &places[worker];
    block->random.seed(launches * kWorkers + worker);
    block->kernel = &kernel;
    block->count = threads;
    for (size_t i; !problem && (i = next++) < order.size();) {
      blockIdx.x = (unsigned)order[i];
      if (const char* found = run_block(shared)) problem = found;
    }
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < std::min<int64_t>(kWorkers, order.size()); ++i) workers.emplace_back(work, i);
  for (std::thread& worker : workers) worker.join();
  return problem ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return emulator::problem; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrReservedSharedMemoryPerBlock ? emulator::kReserved
                                                            : emulator::kBothShared;
  return cudaSuccess;
}
}
