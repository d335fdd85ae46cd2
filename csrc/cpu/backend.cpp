#include "backend.h"

#include <memory>
#include <stdexcept>

#include "isa.h"

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

// Runs one parallel region over all tiles and all elementwise parameters, then `after`.
template <class OnTile, class OnElementwise>
void for_each_task(const Header& header, int64_t n_bytes, int threads, OnTile on_tile,
                   OnElementwise on_elementwise, int64_t n_others = 0) {
  const Tile* tiles = reinterpret_cast<const Tile*>(header.tiles);
  const int64_t n_tasks = header.n_tiles + header.n_elementwise + n_others;
  const int useful = useful_threads(n_bytes, threads);
#pragma omp parallel num_threads(useful)
  {
    const std::unique_ptr<double[]> scratch(
        new double[scratch_rows(header.r) * header.scratch_size]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n_tasks; ++i) {
      if (i < header.n_tiles)
        on_tile(tiles[i], i + useful < header.n_tiles ? &tiles[i + useful] : nullptr,
                scratch.get());
      else
        on_elementwise(i - header.n_tiles);
    }
  }
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
      header, header.n_bytes, threads,
      [&](const Tile& tile, const Tile* next, double* scratch) {
        kernels.gram_matvec(header, tile, next, scratch);
      },
      [&](int64_t index) { kernels.elementwise_norm(header, index); });
}

void transposed(const Header& header, int threads) {
  const CpuKernels& kernels = *current->kernels;
  Header now = header;
  now.n_elementwise = 0;
  for_each_task(
      now, header.n_bytes, threads,
      [&](const Tile& tile, const Tile*, double* scratch) {
        kernels.transposed(header, tile, scratch);
      },
      [](int64_t) {});
}

void collect(const Header& header, int64_t t, int64_t gram, int threads) {
  const CpuKernels& kernels = *current->kernels;
  const int64_t n_tasks = header.n_tiles + header.n_matrices;
#pragma omp parallel for schedule(dynamic, 1) num_threads(useful_threads(header.n_bytes, threads))
  for (int64_t i = 0; i < n_tasks; ++i) kernels.collect(header, i, t, gram);
}

void normalize(const Header& header, int threads) {
  const CpuKernels& kernels = *current->kernels;
#pragma omp parallel for schedule(dynamic, 1) num_threads(useful_threads(header.n_bytes, threads))
  for (int64_t i = 0; i < header.n_matrices; ++i) kernels.normalize(header, i);
}

void rank_one(const Header& header, bool accumulate, int threads) {
  const CpuKernels& kernels = *current->kernels;
  for_each_task(
      header, header.n_bytes, threads,
      [&](const Tile& tile, const Tile*, double* scratch) {
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
  for_each_task(
      header, n_bytes, threads,
      [&](const Tile& tile, const Tile* next, double* scratch) {
        kernels.update_tile(header, update, tile, next, scratch);
      },
      [&](int64_t index) { kernels.update_elementwise(header, update, index); }, update.n_others);
}

}  // namespace cpu
}  // namespace spectral
