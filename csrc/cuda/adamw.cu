// AdamW, see update.cuh.

#include "update.cuh"

namespace spectral {
namespace cuda {
namespace {

// Accurate to about one ulp, without the branches of sqrtf.
__device__ __forceinline__ float fast_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

struct Math {
  static __device__ __forceinline__ float root_of(float x) { return fast_sqrt(x); }
  static __device__ __forceinline__ float quotient_of(float x, float y) { return __fdividef(x, y); }
};

}  // namespace

void adamw(const Header& header, const Update& update, int device, int64_t stream) {
  if (caps_several(header, update))
    launch_rule<AdamW<float, Math>, true>(header, update, device, stream);
  else
    launch_rule<AdamW<float, Math>>(header, update, device, stream);
}

}  // namespace cuda
}  // namespace spectral
