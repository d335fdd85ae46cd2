#include "backend.h"

#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "scratch.h"

namespace spectral {
namespace cpu {
namespace {

struct Level {
  const char* name;
  const CpuKernels* kernels;
  bool supported;
};

const std::vector<Level>& all_levels() {
  static const std::vector<Level> table = [] {
    std::vector<Level> found{{"baseline", &baseline::kernels, true}};
#ifdef SPECTRAL_X86_LEVELS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    found.push_back({"v3", &v3::kernels, v3});
    found.push_back({"v4", &v4::kernels, v4});
#endif
    return found;
  }();
  return table;
}

const Level* best_level() {
  const Level* best = nullptr;
  for (const Level& candidate : all_levels())
    if (candidate.supported) best = &candidate;
  return best;
}

const Level* current = best_level();

// For fewer bytes than this, a second thread costs more than it saves.
constexpr int64_t kSerialBytes = 256 * 1024;

int useful_threads(int64_t n_bytes, int threads) {
  return n_bytes < kSerialBytes || threads < 1 ? 1 : threads;
}

// Runs body(i, scratch) for i < n_tasks in one parallel region. Only the first n_users of them use
// the scratch. Throws NoScratch before any of them has run; bodies throw nothing.
template <class Body>
void in_parallel(int64_t n_tasks, int threads, const ScratchBytes& bytes, int64_t n_users,
                 Body body) {
  ScratchBlock block(bytes, std::min<int64_t>(n_users, threads));
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch{};
    bool has_scratch = false;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < n_tasks; ++i) {
      if (i < n_users && !has_scratch) {
        scratch = block.take();
        has_scratch = true;
      }
      body(i, scratch);
    }
  }
}

// Runs all tiles and all elementwise parameters, then `n_others` more of the latter.
template <class OnTile, class OnElementwise>
void for_each_task(const Header& header, int64_t n_bytes, int threads, const ScratchBytes& bytes,
                   OnTile on_tile, OnElementwise on_elementwise, int64_t n_others = 0) {
  const Tile* tiles = reinterpret_cast<const Tile*>(header.tiles);
  const int64_t n_tiles = header.n_tiles;
  const int useful = useful_threads(n_bytes, threads);
  in_parallel(n_tiles + header.n_elementwise + n_others, useful, bytes, n_tiles,
              [&](int64_t i, const Scratch& scratch) {
                if (i < n_tiles)
                  on_tile(tiles[i], i + useful < n_tiles ? &tiles[i + useful] : nullptr, scratch);
                else
                  on_elementwise(i - n_tiles);
              });
}

// Returns the columns of the widest matrix that a condition holds for; 0: there is none.
template <class Condition>
int64_t widest(const Header& header, Condition condition) {
  const Matrix* matrices = reinterpret_cast<const Matrix*>(header.matrices);
  int64_t most = 0;
  for (int64_t i = 0; i < header.n_matrices; ++i)
    if (condition(matrices[i])) most = std::max(most, matrices[i].outer * matrices[i].inner);
  return most;
}

int64_t size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

bool any(const Matrix&) { return true; }

// Returns what the products of the weights need.
ScratchBytes bytes_for_products(const Header& header) {
  ScratchBytes bytes;
  bytes.rows = kMaxRows * size_of(header.weight_dtype) *
               widest(header, [](const Matrix& m) { return m.outer != 1; });
  if (splits(header.weight_dtype))
    bytes.v = header.r * (int64_t)sizeof(float) * widest(header, any);
  return bytes;
}

template <class S>
bool jumps_of(const Header& header, double* ratios, double least, double factor) {
  const S* sigmas = reinterpret_cast<const S*>(header.sigmas);
  const S* residuals = reinterpret_cast<const S*>(header.residuals);
  const auto ratio_of = [&](int64_t i) {
    return sigmas[i] == 0 ? 0 : (double)residuals[i] / (double)sigmas[i];
  };
  for (int64_t i = 0; i < header.n_matrices; ++i)
    if (ratio_of(i) > least && ratio_of(i) > factor * ratios[i]) return true;
  for (int64_t i = 0; i < header.n_matrices; ++i) ratios[i] = ratio_of(i);
  return false;
}

}  // namespace

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level& candidate : all_levels())
    if (candidate.supported) names.emplace_back(candidate.name);
  return names;
}

std::string level() { return current->name; }

void set_level(const std::string& name) {
  for (const Level& candidate : all_levels()) {
    if (name != candidate.name) continue;
    if (!candidate.supported)
      throw std::invalid_argument("level: this processor cannot run '" + name + "'");
    current = &candidate;
    return;
  }
  throw std::invalid_argument("level: got '" + name + "', which this build does not have");
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void gram_matvec(const Header& header, int threads) {
  const CpuKernels& kernels = *current->kernels;
  for_each_task(
      header, header.n_bytes, threads, bytes_for_products(header),
      [&](const Tile& tile, const Tile* next, const Scratch& scratch) {
        kernels.gram_matvec(header, tile, next, scratch);
      },
      [&](int64_t index) { kernels.elementwise_norm(header, index); });
}

void transposed(const Header& header, int threads) {
  const CpuKernels& kernels = *current->kernels;
  Header now = header;
  now.n_elementwise = 0;
  ScratchBytes bytes = bytes_for_products(header);
  bytes.v = 0;  // s is given
  for_each_task(
      now, header.n_bytes, threads, bytes,
      [&](const Tile& tile, const Tile*, const Scratch& scratch) {
        kernels.transposed(header, tile, scratch);
      },
      [](int64_t) {});
}

void collect(const Header& header, int64_t t, int64_t gram, int threads) {
  const CpuKernels& kernels = *current->kernels;
  in_parallel(header.n_tiles + header.n_matrices, useful_threads(header.n_bytes, threads), {}, 0,
              [&](int64_t i, const Scratch&) { kernels.collect(header, i, t, gram); });
}

void normalize(const Header& header, int threads) {
  const CpuKernels& kernels = *current->kernels;
  ScratchBytes bytes;
  if (header.r > 1) bytes.ritz = kRitzBytes;
  in_parallel(header.n_matrices, useful_threads(header.n_bytes, threads), bytes, header.n_matrices,
              [&](int64_t i, const Scratch& scratch) { kernels.normalize(header, i, scratch); });
}

void rank_one(const Header& header, bool accumulate, int threads) {
  const CpuKernels& kernels = *current->kernels;
  ScratchBytes bytes;
  bytes.gradient_v = (int64_t)sizeof(float) * widest(header, [](const Matrix& m) {
                       return m.grad != 0 && splits(m.grad_dtype);
                     });
  for_each_task(
      header, header.n_bytes, threads, bytes,
      [&](const Tile& tile, const Tile*, const Scratch& scratch) {
        kernels.rank_one(header, tile, accumulate, scratch);
      },
      [&](int64_t index) { kernels.elementwise_gradient(header, index, accumulate); });
}

bool jumps(const Header& header, int64_t ratios, double least, double factor) {
  double* known = reinterpret_cast<double*>(ratios);
  return header.weight_dtype == kFloat64 ? jumps_of<double>(header, known, least, factor)
                                         : jumps_of<float>(header, known, least, factor);
}

void update(const Header& header, const Update& update, int threads) {
  const CpuKernels& kernels = *current->kernels;
  constexpr int64_t kArrays = 4;  // weights, gradients and two moments
  int64_t n_others = 0;
  for (int64_t i = 0; i < update.n_others; ++i)
    n_others += reinterpret_cast<const Elementwise*>(update.others)[i].size;
  const int64_t n_bytes = kArrays * (header.n_bytes + n_others * (int64_t)sizeof(float));
  ScratchBytes bytes = bytes_for_products(header);
  if (splits(header.weight_dtype) && update.moment_dtype == header.weight_dtype)
    bytes.gradient_v = (int64_t)sizeof(float) * widest(header, any);
  for_each_task(
      header, n_bytes, threads, bytes,
      [&](const Tile& tile, const Tile* next, const Scratch& scratch) {
        kernels.update_tile(header, update, tile, next, scratch);
      },
      [&](int64_t index) { kernels.update_elementwise(header, update, index); }, update.n_others);
}

}  // namespace cpu
}  // namespace spectral
