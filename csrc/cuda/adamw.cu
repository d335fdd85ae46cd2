// AdamW, see update.cuh.

#include "update.cuh"

namespace spectral {
namespace cuda {
namespace {

// Right to about one rounding; without the branches of sqrtf.
__device__ __forceinline__ float fast_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

struct AdamW {
  static constexpr int kMoments = 2;
  float keep, weight1, beta2, weight2, step_size, inverse_root, eps;

  AdamW() = default;  // in shared memory
  __device__ AdamW(const Group& group, double step)
      : keep((float)(1 - group.lr * group.weight_decay)),
        weight1((float)(1 - group.option_1)),
        beta2((float)group.option_2),
        weight2((float)(1 - group.option_2)),
        step_size((float)(group.lr / (1 - pow(group.option_1, step)))),
        inverse_root((float)(1 / sqrt(1 - pow(group.option_2, step)))),
        eps((float)group.eps) {}

  __device__ __forceinline__ void operator()(float& p, float g, float& m1, float& m2) const {
    m1 += weight1 * (g - m1);
    m2 = beta2 * m2 + weight2 * g * g;
    p = keep * p - __fdividef(step_size * m1, fast_sqrt(m2) * inverse_root + eps);
  }
};

}  // namespace

void adamw(const Header& header, const Update& update, int device, int64_t stream) {
  launch_rule<AdamW>(header, update, device, stream);
}

}  // namespace cuda
}  // namespace spectral
