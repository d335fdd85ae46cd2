#include "backend.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#ifdef SPECTRAL_X86_LEVELS
#include <cpuid.h>
#endif

#include "isa.h"
#include "scratch.h"

namespace spectral {
namespace cpu {
namespace {

struct Level {
  const char* name;
  const CpuKernels* kernels;
  bool supported;
  double products, gradient, update;  // nanoseconds per byte of the weights, with one thread
};

#ifdef SPECTRAL_X86_LEVELS
// Clang's __builtin_cpu_supports does not know f16c. Whether the system saves the registers is not
// asked here: it does if avx2 is supported.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

const std::vector<Level>& all_levels() {
  static const std::vector<Level> table = [] {
    std::vector<Level> found{{"baseline", &baseline::kernels, true, 0.09, 0.08, 0.8}};
#ifdef SPECTRAL_X86_LEVELS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && has_f16c();
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    found.push_back({"v3", &v3::kernels, v3, 0.06, 0.045, 0.35});
    found.push_back({"v4", &v4::kernels, v4, 0.05, 0.035, 0.28});
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

// Where one thread needs less time than this, a second one is not asked: on a busy machine it may
// have to be waited for a thousand times as long.
constexpr double kWorthwhile = 200e3;  // ns

int useful_threads(double expected_time, int threads) {
  return expected_time < kWorthwhile || threads < 1 ? 1 : threads;
}

// Tasks that may run at the same time, in any order: run(i, scratch) for i < n_tasks, of which the
// first n_users use the scratch. They throw nothing.
template <class Run>
struct Stage {
  int64_t n_tasks, n_users;
  Run run;

  void alone(const Scratch& scratch) {
    for (int64_t i = 0; i < n_tasks; ++i) run(i, scratch);
  }

  // In a parallel region; all threads wait at the end.
  void shared(ScratchBlock& block, Scratch& scratch, bool& has_scratch) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n_tasks; ++i) {
      if (i < n_users && !has_scratch) {
        scratch = block.take();
        has_scratch = true;
      }
      run(i, scratch);
    }
  }
};

template <class Run>
Stage<Run> stage(int64_t n_tasks, int64_t n_users, Run run) {
  return {n_tasks, n_users, run};
}

// What one thread does while the others wait.
template <class Run>
struct Once {
  static constexpr int64_t n_users = 0;
  Run run;

  void alone(const Scratch&) { run(); }
  void shared(ScratchBlock&, Scratch&, bool&) {
#pragma omp single
    run();
  }
};

template <class Run>
Once<Run> once(Run run) {
  return {run};
}

// Runs stages one after the other in one parallel region. Throws NoScratch before any has run.
template <class... Stages>
void run_stages(int threads, const ScratchBytes& bytes, Stages... stages) {
  const int64_t n_users = (stages.n_users + ...);  // each stage's may be other threads
  ScratchBlock block(bytes, std::min<int64_t>(n_users, threads));
  if (threads == 1) {
    const Scratch scratch = n_users > 0 ? block.take() : Scratch{};
    (stages.alone(scratch), ...);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch{};
    bool has_scratch = false;
    (stages.shared(block, scratch, has_scratch), ...);
  }
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

ScratchBytes larger(const ScratchBytes& a, const ScratchBytes& b) {
  return {std::max(a.rows, b.rows), std::max(a.v, b.v), std::max(a.gradient_v, b.gradient_v),
          std::max(a.ritz, b.ritz)};
}

// What the products of the weights need.
ScratchBytes bytes_for_products(const Header& header) {
  ScratchBytes bytes;
  bytes.rows = kMaxRows * size_of(header.weight_dtype) *
               widest(header, [](const Matrix& m) { return m.outer != 1; });
  if (splits(header.weight_dtype))
    bytes.v = header.r * (int64_t)sizeof(float) * widest(header, any);
  return bytes;
}

ScratchBytes bytes_for_normalize(const Header& header) {
  ScratchBytes bytes;
  if (header.operators != 0)
    bytes.ritz = header.most_taps * (int64_t)sizeof(Complex);
  else if (header.r > 1)
    bytes.ritz = kRitzBytes;
  return bytes;
}

// Vectors that a gradient is made of.
int64_t n_terms(const Header& header) { return header.operators != 0 ? 2 : 1; }

ScratchBytes bytes_for_gradient(const Header& header) {
  ScratchBytes bytes;
  bytes.gradient_v = n_terms(header) * (int64_t)sizeof(float) * widest(header, [](const Matrix& m) {
                       return m.grad != 0 && splits(m.grad_dtype);
                     });
  return bytes;
}

ScratchBytes bytes_for_update(const Header& header, const Update& update) {
  ScratchBytes bytes = bytes_for_products(header);
  if (splits(header.weight_dtype) && update.moment_dtype == header.weight_dtype)
    bytes.gradient_v = (update.constraint == kCap ? header.r : n_terms(header)) *
                       (int64_t)sizeof(float) * widest(header, any);
  return bytes;
}

// The stages of a step.

const Tile* tiles_of(const Header& header) { return reinterpret_cast<const Tile*>(header.tiles); }

// The tile that a thread probably takes after tile i.
const Tile* after(const Header& header, int64_t i, int threads) {
  return i + threads < header.n_tiles ? tiles_of(header) + i + threads : nullptr;
}

auto products(const Header& header, int threads) {
  return stage(header.n_tiles + header.n_elementwise, header.n_tiles,
               [&header, threads](int64_t i, const Scratch& scratch) {
                 if (i < header.n_tiles)
                   current->kernels->gram_matvec(header, tiles_of(header)[i],
                                                 after(header, i, threads), scratch);
                 else
                   current->kernels->elementwise_norm(header, i - header.n_tiles);
               });
}

void copy_next(const Header& header, int64_t matrix) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[matrix];
  const int64_t size = header.weight_dtype == kFloat64 ? 8 : 4, start = m.v_offset * size;
  std::memcpy(reinterpret_cast<char*>(header.v) + start,
              reinterpret_cast<const char*>(header.v_next) + start,
              header.r * m.outer * m.inner * size);
}

// `v_is_next`: the products were taken with v_next, which is copied to v first.
auto normalizing(const Header& header, bool v_is_next = false) {
  return stage(header.n_matrices, header.n_matrices,
               [&header, v_is_next](int64_t i, const Scratch& scratch) {
                 if (v_is_next) copy_next(header, i);
                 current->kernels->normalize(header, i, scratch);
               });
}

auto gradient(const Header& header, bool accumulate, const bool& is_left_out) {
  return stage(header.n_tiles + header.n_elementwise, header.n_tiles,
               [&header, accumulate, &is_left_out](int64_t i, const Scratch& scratch) {
                 if (is_left_out) return;
                 if (i < header.n_tiles)
                   current->kernels->rank_one(header, tiles_of(header)[i], accumulate, scratch);
                 else
                   current->kernels->elementwise_gradient(header, i - header.n_tiles, accumulate);
               });
}

auto updates(const Header& header, const Update& update, int threads) {
  return stage(header.n_tiles + header.n_elementwise + update.n_others, header.n_tiles,
               [&header, &update, threads](int64_t i, const Scratch& scratch) {
                 if (i < header.n_tiles)
                   current->kernels->update_tile(header, update, tiles_of(header)[i],
                                                 after(header, i, threads), scratch);
                 else
                   current->kernels->update_elementwise(header, update, i - header.n_tiles);
               });
}

double n_bytes_of_update(const Header& header, const Update& update) {
  int64_t n_others = 0;
  for (int64_t i = 0; i < update.n_others; ++i)
    n_others += reinterpret_cast<const Elementwise*>(update.others)[i].size;
  return (double)(header.n_bytes + n_others * size_of(header.weight_dtype));
}

// Nanoseconds with one thread of each stage, roughly; measured on weights that are in the cache.
constexpr double kPerTask = 300;

double time_of(const Header& header, double n_bytes, int64_t n_tasks, double per_byte) {
  // Numbers of 16 bits take as long as those of 32.
  const double per_number = size_of(header.weight_dtype) == 2 ? 2 : 1;
  return n_bytes * per_number * per_byte + (double)n_tasks * kPerTask;
}

double time_of_products(const Header& header) {
  return time_of(header, header.n_bytes, header.n_tiles + header.n_elementwise, current->products);
}

double time_of_gradient(const Header& header) {
  return time_of(header, header.n_bytes, header.n_tiles + header.n_elementwise, current->gradient);
}

double time_of_update(const Header& header, const Update& update) {
  return time_of(header, n_bytes_of_update(header, update),
                 header.n_tiles + header.n_elementwise + update.n_others, current->update);
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
      throw std::invalid_argument("level: expected one that this processor can run, got '" + name +
                                  "'");
    current = &candidate;
    return;
  }
  throw std::invalid_argument("level: expected one that this build has, got '" + name + "'");
}

std::string without_openmp() {
#if defined(_OPENMP)
  return "";
#elif defined(__linux__) && defined(__clang__)
  return "the compiler was Clang, whose OpenMP runtime is not torch's; reinstall with CXX=g++";
#else
  return "the compiler had no OpenMP";
#endif
}

void gram_matvec(const Header& header, int threads) {
  threads = useful_threads(time_of_products(header), threads);
  run_stages(threads, bytes_for_products(header), products(header, threads));
}

void transposed(const Header& header, int threads) {
  ScratchBytes bytes = bytes_for_products(header);
  bytes.v = 0;  // s is given
  run_stages(useful_threads(time_of_products(header), threads), bytes,
             stage(header.n_tiles, header.n_tiles, [&](int64_t i, const Scratch& scratch) {
               current->kernels->transposed(header, tiles_of(header)[i], scratch);
             }));
}

void collect(const Header& header, int64_t t, int64_t gram, int threads) {
  run_stages(useful_threads(time_of_products(header), threads), {},
             stage(header.n_tiles + header.n_matrices, 0, [&](int64_t i, const Scratch&) {
               current->kernels->collect(header, i, t, gram);
             }));
}

void normalize(const Header& header, int threads) {
  run_stages(useful_threads(time_of_products(header), threads), bytes_for_normalize(header),
             normalizing(header));
}

void rank_one(const Header& header, bool accumulate, int threads) {
  const bool is_left_out = false;
  run_stages(useful_threads(time_of_gradient(header), threads), bytes_for_gradient(header),
             gradient(header, accumulate, is_left_out));
}

bool jumps(const Header& header, int64_t ratios, double least, double factor) {
  double* known = reinterpret_cast<double*>(ratios);
  return header.weight_dtype == kFloat64 ? jumps_of<double>(header, known, least, factor)
                                         : jumps_of<float>(header, known, least, factor);
}

void update(const Header& header, const Update& update, int threads) {
  threads = useful_threads(time_of_update(header, update), threads);
  run_stages(threads, bytes_for_update(header, update), updates(header, update, threads));
}

double expected_time(const Job& job) {
  const Header& header = *reinterpret_cast<const Header*>(job.header);
  if (job.update != 0) return time_of_update(header, *reinterpret_cast<Update*>(job.update));
  return time_of_products(header) + time_of_gradient(header);
}

bool run(const Job& job, double expected_time, int threads) {
  Header& header = *reinterpret_cast<Header*>(job.header);
  header.tolerance = 0;  // should extra iterations have been interrupted
  threads = useful_threads(expected_time, threads);
  bool have_jumped = false;
  const auto looking = once([&] {
    if (job.ratios == 0) return;
    reinterpret_cast<double*>(job.ratios)[header.n_matrices] += 1;
    have_jumped = jumps(header, job.ratios, job.least, job.factor);
  });
  if (job.update == 0) {
    Header from_next = header;
    from_next.v = header.v_next;
    const ScratchBytes bytes =
        larger(larger(bytes_for_products(header), bytes_for_normalize(header)),
               bytes_for_gradient(header));
    run_stages(threads, bytes, products(from_next, threads), normalizing(header, true), looking,
               gradient(header, true, have_jumped));
    return have_jumped;
  }
  const Update& update = *reinterpret_cast<const Update*>(job.update);
  const auto counting = once([&] {
    for (int64_t i = 0; i < job.n_steps; ++i)
      reinterpret_cast<float*>(job.steps)[i] += reinterpret_cast<const float*>(job.acts)[i];
  });
  run_stages(threads, larger(bytes_for_update(header, update), bytes_for_normalize(header)),
             counting, updates(header, update, threads), normalizing(header, true), looking);
  return have_jumped;
}

}  // namespace cpu
}  // namespace spectral
