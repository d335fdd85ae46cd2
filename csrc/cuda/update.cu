// An optimizer's step by its rule.

#include "subspace.h"
#include "update.cuh"

namespace spectral {
namespace cuda {

void update(const Header& header, const Update& update, int device, int64_t stream) {
  check_dtype(header, "update");
  if (update.moment_dtype != header.weight_dtype && update.moment_dtype != kFloat32)
    throw std::invalid_argument(
        "moment_dtype: expected the weights' dtype or float32, got another");
  if (header.n_tiles + header.n_elementwise + update.n_others == 0) return;
  const DeviceGuard guard(device, "update");
  const auto step = update.rule == kAdamW ? adamw : sgd;
  if (header.r <= 1) return step(header, update, device, stream);
  // One pass cannot hold moments and several vectors: the weights are read again. The first launch
  // does without t, and the second writes s of all vectors.
  Header now = header;
  now.t_partial = 0;
  step(now, update, device, stream);
  now.t_partial = header.t_partial;
  now.v = header.v_next;
  now.n_elementwise = 0;
  if (now.n_tiles > 0) subspace_products("update", now, stream);
}

}  // namespace cuda
}  // namespace spectral
